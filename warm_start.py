"""Supervised fine-tuning on demonstrations: teaches a policy the form before GRPO teaches the rest.

A policy that never writes "# Analysis / # Response" gets the lowest reward for everything, so its
groups have no spread, so its advantages are zero, and nothing is learned. A few hundred updates on
demonstrations (`data.demonstrations`: generated anew, of uneven quality) change that.

    python warm_start.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-warm
    python warm_start.py --embedded --out new_embedded_policy       # the tiny policy, from nothing

One loss, cross-entropy on completion tokens and on the stop token after them:

    loss = − Σ log p(token | prompt, tokens before) / number of completion tokens in the batch

All else is as in training by reward: demonstrations of one record are one group, packed into one
row behind the prompt that they share; float32 weights are computed in bfloat16; what is sampled,
measured and saved is the copy in that type.
"""

import argparse
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from data import RecordError, SeekerRecord, load_records
from data.demonstrations import demonstrate, mix_records
from data.tiny_policy import new_policy, sharpen, train_tokenizer
from grpo.checkpoint import export_policy
from grpo.config import ConfigError, TrainConfig
from grpo.generation import generate_groups
from grpo.logprobs import score
from grpo.optimizer import make_optimizer, set_learning_rate
from grpo.packing import Group, pack
from grpo.parallel import Ranks, pick_device, start_ranks
from grpo.policy import Policy, encode_chat, load_policy
from grpo.sampling import Sampling
from grpo.sharding import gradient_norm, plain_copy, shard
from perm_reward import Seeker, policy_messages
from perm_reward.completion import parse_completion

SAMPLES_PER_RECORD = 4


def main(arguments: Sequence[str]) -> None:
    """Run warm_start.py. Errors that a user can cause end it with one line and exit code 2."""
    transformers_logging.set_verbosity_error()
    settings = parse_arguments(arguments)
    try:
        with start_ranks(pick_device("cpu" if settings.embedded else "auto")) as ranks:
            run(settings, ranks)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            # What loads a policy speaks of the setting of train.py.
            print(f"error: {error}".replace("policy.model", "--model"), file=sys.stderr)
        sys.exit(2)


def run(settings: argparse.Namespace, ranks: Ranks) -> None:
    """Load or build the policy, measure, train, measure again, save."""
    if ranks.world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE = {ranks.world_size}: a warm start runs in one process; "
            "start it with python, not with torchrun"
        )
    recipe = TrainConfig(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup_fraction=0.1,
        learning_rate_decay="linear",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.01,
        max_gradient_norm=1.0,
    )
    records, heldout = read_records(settings.records, settings.samples)
    check_out(settings.out)
    if settings.embedded:
        # One thread sums in one order, whatever the number of cores, and is as quick: the matrices
        # are small.
        torch.set_num_threads(1)
        policy = embedded_start(records, settings.seed)
    else:
        policy = load_policy(settings.model, ranks.device)
    check_lengths(policy, "--records", records, settings.max_new_tokens)
    check_lengths(policy, "bundled-heldout", heldout, settings.max_new_tokens)
    compute_dtype = getattr(torch, settings.compute_dtype)
    policy.model = shard(policy.model, ranks, compute_dtype, policy.weights.fill)

    def measure(when: str) -> None:
        share = share_well_formed(policy, heldout, settings.max_new_tokens, settings.seed)
        count = SAMPLES_PER_RECORD * len(heldout)
        print(f"{when}: {share:.0%} of {count} held-out samples are in the form")

    if not settings.embedded:  # random weights write no form
        measure("before")
    records = records + mix_records(records, settings.mixed_records, settings.seed)
    groups = demonstration_groups(policy, records, settings.group_size, settings.seed)
    train(policy.model, groups, recipe, settings.batch_size // settings.group_size)
    if settings.embedded:
        sharpen(policy.model)
    measure("after")
    export_policy(plain_copy(policy.model), policy.tokenizer, policy.stop_ids, settings.out)
    print(f"saved to {settings.out}")


# --- what is learned -----------------------------------------------------------------------------


def messages_of(record: SeekerRecord) -> list[dict[str, str]]:
    """The policy's chat prompt, the same as in training by reward."""
    return policy_messages(Seeker(record.persona, record.scenario, record.query))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, record: SeekerRecord) -> list[int]:
    """Token ids of the record's prompt, up to where the assistant begins to write."""
    return encode_chat(tokenizer, messages_of(record))[1]


def encode_completion(policy: Policy, text: str) -> list[int]:
    """Token ids of a completion and of the stop token, which is learned like any other."""
    own_stop = policy.tokenizer.eos_token_id
    stop = policy.stop_ids[0] if own_stop is None else own_stop
    return [*policy.tokenizer.encode(text, add_special_tokens=False), stop]


def demonstration_groups(
    policy: Policy, records: list[SeekerRecord], group_size: int, seed: int
) -> Iterator[Group]:
    """Groups without end: each record once, in random order, then again with new demonstrations."""
    generator = random.Random(seed)
    for first_sample in itertools.count(0, group_size):
        for record in generator.sample(records, len(records)):
            completions = [
                encode_completion(policy, demonstrate(record, seed=seed, sample=sample))
                for sample in range(first_sample, first_sample + group_size)
            ]
            yield encode_prompt(policy.tokenizer, record), completions


def embedded_start(records: list[SeekerRecord], seed: int) -> Policy:
    """The tiny policy before training, and its tokenizer trained on all it will ever read.

    Saved and loaded like any other: for a Qwen2 transformers puts its own way of cutting text in
    the place of the tokenizer's, and the tokens learned here must be those of train.py.
    """
    texts = [message["content"] for record in records for message in messages_of(record)]
    texts += [demonstrate(record, seed=seed, sample=k) for record in records for k in range(8)]
    tokenizer = train_tokenizer(texts)
    with TemporaryDirectory() as folder:
        new_policy(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_policy(folder, torch.device("cpu"))


# --- how it is learned ---------------------------------------------------------------------------


def completion_loss(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """The summed cross-entropy of one group's completion tokens, in nats: a scalar, in float32."""
    logprobs, _ = score(model, pack([group], model.device), temperature=1.0)
    return -logprobs.sum()


def train(
    model: PreTrainedModel, groups: Iterator[Group], recipe: TrainConfig, groups_per_step: int
) -> list[float]:
    """`recipe.steps` updates of a sharded model. Returns the loss of each: nats per token."""
    optimizer = make_optimizer(model, recipe)
    losses = []
    progress = tqdm(range(recipe.steps), desc="warm start", unit="update")
    for step in progress:
        batch = list(itertools.islice(groups, groups_per_step))
        token_count = sum(len(tokens) for _, completions in batch for tokens in completions)
        set_learning_rate(optimizer, recipe, step, recipe.steps)
        batch_loss = 0.0
        for group in batch:
            loss = completion_loss(model, group) / token_count
            loss.backward()
            batch_loss += loss.item()
        gradient_norm(model, recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(batch_loss)
        progress.set_postfix(loss=f"{batch_loss:.3f}")
    return losses


def share_well_formed(
    policy: Policy, records: Sequence[SeekerRecord], max_new_tokens: int, seed: int
) -> float:
    """How many samples on `records`, at temperature 1, are in the required form: from 0 to 1."""
    prompts = [encode_prompt(policy.tokenizer, record) for record in records]
    count = SAMPLES_PER_RECORD * len(prompts)
    with tqdm(total=count, desc="measuring", unit="sample") as progress:
        groups = generate_groups(
            policy.model,
            prompts,
            group_size=SAMPLES_PER_RECORD,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=1.0),
            stop_ids=policy.stop_ids,
            seed=seed,
            on_finish=lambda *_: progress.update(),
        )
    texts = [
        str(policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        for group in groups
        for completion in group
    ]
    return sum(parse_completion(text).well_formed for text in texts) / count


# --- what a user may get wrong -------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `--embedded` has its own defaults, for weights that start at random."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    positive = whole_number(1)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="hub name or folder of the policy to warm-start")
    start.add_argument("--embedded", action="store_true", help="train the tiny policy anew")
    parser.add_argument("--out", type=Path, required=True, help="new folder to save into")
    parser.add_argument("--records", default="bundled", help="bundled, or a file in PERM's format")
    parser.add_argument("--steps", type=positive, help="updates (100; embedded: 600)")
    parser.add_argument("--batch-size", type=positive, default=8, help="demonstrations per update")
    parser.add_argument("--group-size", type=positive, default=4, help="of which share one prompt")
    parser.add_argument("--learning-rate", type=float, help="peak (1e-4; embedded: 1.2e-3)")
    parser.add_argument(
        "--mixed-records", type=whole_number(0), help="jumbled from --records (0; embedded: 1000)"
    )
    parser.add_argument("--compute-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--samples",
        type=positive,
        default=64,
        help=f"completions that measure the form, {SAMPLES_PER_RECORD} of each held-out record",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="length of those")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0)
    settings = parser.parse_args(arguments)
    for name, usual, embedded in (
        ("steps", 100, 600),
        ("learning_rate", 1e-4, 1.2e-3),
        ("mixed_records", 0, 1000),
    ):
        if getattr(settings, name) is None:
            setattr(settings, name, embedded if settings.embedded else usual)
    if settings.batch_size % settings.group_size:
        parser.error(
            f"--batch-size {settings.batch_size} is not a multiple of --group-size "
            f"{settings.group_size}: choose one that is"
        )
    return settings


def whole_number(smallest: int, largest: float = math.inf) -> Callable[[str], int]:
    """A type for argparse: whole numbers in a range."""

    def number(text: str) -> int:
        if not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not from {smallest} to {largest}")
        return int(text)

    return number


def read_records(name: str, samples: int) -> tuple[list[SeekerRecord], list[SeekerRecord]]:
    """Records to learn from, and held-out ones on which `samples` completions measure the form."""
    heldout = load_records("bundled-heldout")
    if name == "bundled-heldout":
        raise ConfigError(f"--records {name}: the form is measured on these; name other records")
    try:
        records = load_records(name)
    except RecordError as error:
        raise ConfigError(f"--records: {error}") from error
    count = min(len(heldout), math.ceil(samples / SAMPLES_PER_RECORD))
    # They stand in the order of their emotions: taken from all over the file.
    return records, heldout[:: len(heldout) // count][:count]


def check_out(out: Path) -> None:
    """Raise ConfigError where `out` holds files already, or cannot be written in the end.

    A trial: saving makes a new folder and puts it in the place of this one.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_taken = any(out.iterdir())
        if not is_taken:
            out.rmdir()
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); name another folder"
        ) from error
    if is_taken:
        raise ConfigError(f"--out {out}: holds files already; name a new folder")


def check_lengths(
    policy: Policy, name: str, records: Sequence[SeekerRecord], max_new_tokens: int
) -> None:
    """Raise ConfigError for a record whose prompt is empty or leaves no room to answer."""
    config = policy.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", math.inf)
    for number, record in enumerate(records, start=1):
        length = len(encode_prompt(policy.tokenizer, record))
        if length == 0:
            raise ConfigError(
                f"policy.model: record {number} of {name} makes an empty prompt; see that the "
                "tokenizer's files are all there and that its chat template writes the messages"
            )
        if length + max_new_tokens > context:
            raise ConfigError(
                f"--max-new-tokens {max_new_tokens}: with the {length} tokens of the prompt of "
                f"record {number} of {name} that exceeds the model's context, {context} tokens; "
                "lower it or shorten the record"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
