"""Supervised fine-tuning on demonstrations: teaches a policy the form before GRPO teaches the rest.

A policy that never writes "# Analysis / # Response" gets the lowest reward for everything, so its
groups have no spread, so its advantages are zero, and nothing is learned. A few hundred updates on
demonstrations (`data.demonstrations`: generated anew, of uneven quality) change that.

    python warm_start.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-warm
    python warm_start.py --embedded --out data/embedded_policy      # the tiny policy, from nothing

One loss, cross-entropy on completion tokens and on the stop token after them:

    loss = − Σ log p(token | prompt, tokens before) / number of completion tokens in the batch

Demonstrations of one record share their prompt, as in GRPO's own update (grpo.shared_prefix), so
the prompt is computed once for all of them.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from data import RecordError, SeekerRecord, load_records
from data.demonstrations import demonstrate, mix_records
from data.tiny_policy import new_policy, sharpen, train_tokenizer
from grpo.config_loader import ConfigError
from grpo.packing import pack
from grpo.parallel import cast_copy
from grpo.policy import Policy, load_policy, stop_ids
from grpo.shared_prefix import use_shared_prefix
from perm_reward import Seeker, policy_messages
from perm_reward.completion import parse_completion

# A prompt's token ids and those of each of its demonstrations, with their stop token.
Group = tuple[list[int], list[list[int]]]


def messages_for(record: SeekerRecord) -> list[dict[str, str]]:
    """The policy's chat prompt, the same as in training by reward."""
    return policy_messages(
        Seeker(persona=record.persona, scenario=record.scenario, query=record.query)
    )


def encode_prompt(tokenizer: Tokenizer, record: SeekerRecord) -> list[int]:
    """Token ids of the record's prompt, up to where the assistant begins to write."""
    return tokenizer.apply_chat_template(
        messages_for(record), add_generation_prompt=True, return_dict=False
    )


def encode_completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a completion and of the stop token, which is learned like any other."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def demonstration_groups(
    records: list[SeekerRecord],
    tokenizer: Tokenizer,
    group_size: int,
    seed: int,
) -> Iterator[Group]:
    """Groups without end: each record once, in random order, then again with new demonstrations."""
    generator = random.Random(seed)
    first_sample = 0
    while True:
        for record in generator.sample(records, len(records)):
            completions = [
                encode_completion(tokenizer, demonstrate(record, seed=seed, sample=sample))
                for sample in range(first_sample, first_sample + group_size)
            ]
            yield encode_prompt(tokenizer, record), completions
        first_sample += group_size


def completion_loss(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """The summed cross-entropy of one group's completion tokens: a scalar, in float32."""
    prompt, completions = group
    row = pack([(prompt, completions)], model.device)
    hidden = model.base_model(
        input_ids=row.token_ids,
        position_ids=row.position_ids,
        attention_mask=row.mask,
        use_cache=False,
    ).last_hidden_state[0, row.predictors]  # [N, hidden], one for each completion token
    logits = model.get_output_embeddings()(hidden)  # [N, vocabulary]
    return F.cross_entropy(logits.float(), row.targets, reduction="sum")


def train(
    model: PreTrainedModel,
    groups: Iterator[Group],
    *,
    steps: int,
    groups_per_step: int,
    learning_rate: float,
    compute_dtype: torch.dtype,
) -> list[float]:
    """AdamW for `steps` updates: warm-up over a tenth of them, then linear decay to zero.

    Returns the loss per token of each update, in nats.
    """
    use_shared_prefix(model)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    losses = []
    progress = tqdm(range(steps), desc="warm start", unit="update")
    for _ in progress:
        batch = [next(groups) for _ in range(groups_per_step)]
        token_count = sum(len(tokens) for _, completions in batch for tokens in completions)
        batch_loss = 0.0
        for group in batch:
            with torch.autocast(
                model.device.type, compute_dtype, enabled=compute_dtype != torch.float32
            ):
                loss = completion_loss(model, group) / token_count
            loss.backward()
            batch_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(batch_loss)
        progress.set_postfix(loss=f"{batch_loss:.3f}")
    return losses


def share_well_formed(
    policy: Policy,
    records: list[SeekerRecord],
    *,
    samples_per_record: int,
    max_new_tokens: int,
    compute_dtype: torch.dtype,
    seed: int,
) -> float:
    """How many samples on `records`, at temperature 1, are in the required form: from 0 to 1."""
    torch.manual_seed(seed)
    # Sampled from a copy in the compute type, as in training by reward.
    model = cast_copy(policy.model, compute_dtype)
    texts = []
    for record in records:
        prompt = torch.tensor([encode_prompt(policy.tokenizer, record)], device=model.device)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples_per_record,
            max_new_tokens=max_new_tokens,
            eos_token_id=policy.stop_ids,
            pad_token_id=policy.tokenizer.eos_token_id,
        )
        completions = tokens[:, prompt.shape[1] :]
        texts += policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return sum(parse_completion(text).well_formed for text in texts) / len(texts)


def save(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write weights in `dtype`, tokenizer and every stop id in the Hugging Face format."""
    policy.model.generation_config.eos_token_id = policy.stop_ids
    policy.model.to(dtype).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def embedded_start(records: list[SeekerRecord], seed: int) -> Policy:
    """The tiny policy before training, and its tokenizer trained on all it will ever read."""
    texts = [message["content"] for record in records for message in messages_for(record)]
    texts += [demonstrate(record, seed=seed, sample=k) for record in records for k in range(8)]
    tokenizer = train_tokenizer(texts)
    model = new_policy(tokenizer, seed)
    return Policy(model, tokenizer, stop_ids(model, tokenizer))


def check_lengths(policy: Policy, records: list[SeekerRecord], max_new_tokens: int) -> None:
    """Raise RecordError, in one line, for a record whose prompt leaves no room to answer."""
    context = policy.model.config.get_text_config().max_position_embeddings
    for number, record in enumerate(records, start=1):
        length = len(encode_prompt(policy.tokenizer, record))
        if length + max_new_tokens > context:
            raise RecordError(
                f"record {number}: its prompt has {length} tokens, and with {max_new_tokens} for "
                f"the completion that is more than the model's {context}: shorten the record"
            )


def positive(text: str) -> int:
    """A command-line number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; `--embedded` has its own defaults, for weights that start at random."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="hub name or folder of the policy to warm-start")
    start.add_argument("--embedded", action="store_true", help="train the tiny policy anew")
    parser.add_argument("--out", type=Path, required=True, help="folder to save into")
    parser.add_argument("--records", default="bundled", help="bundled, or a file in PERM's format")
    parser.add_argument("--steps", type=positive, help="updates (100; embedded: 600)")
    parser.add_argument("--batch-size", type=positive, default=8, help="demonstrations per update")
    parser.add_argument("--group-size", type=positive, default=4, help="of which share one prompt")
    parser.add_argument("--learning-rate", type=float, help="peak (1e-4; embedded: 1.2e-3)")
    parser.add_argument(
        "--mixed-records", type=int, help="jumbled from --records (0; embedded: 1000)"
    )
    parser.add_argument("--compute-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--samples", type=positive, default=64, help="completions that measure the form"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="length of those")
    parser.add_argument("--seed", type=int, default=0)
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


def main(arguments: list[str]) -> None:
    """Load or build the policy, measure, train, measure again, save."""
    settings = parse_arguments(arguments)
    records, held_out = load_records(settings.records), load_records("bundled-heldout")
    held_out = held_out[:: max(1, 4 * len(held_out) // settings.samples)]
    compute_dtype = getattr(torch, settings.compute_dtype)
    if settings.embedded:
        # One thread sums in one order, whatever the number of cores, and is as quick: the matrices
        # are small.
        torch.set_num_threads(1)
        policy = embedded_start(records, settings.seed)
        saved_dtype = torch.bfloat16
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy = load_policy(settings.model, device)
        saved_dtype = AutoConfig.from_pretrained(settings.model).dtype or torch.float32
    check_lengths(policy, records + held_out, settings.max_new_tokens)

    def measure(when: str) -> None:
        share = share_well_formed(
            policy,
            held_out,
            samples_per_record=4,
            max_new_tokens=settings.max_new_tokens,
            compute_dtype=compute_dtype,
            seed=settings.seed,
        )
        print(f"{when}: {share:.0%} of {4 * len(held_out)} held-out samples are in the form")

    if not settings.embedded:  # random weights write no form
        measure("before")
    records = records + mix_records(records, settings.mixed_records, settings.seed)
    train(
        policy.model,
        demonstration_groups(records, policy.tokenizer, settings.group_size, settings.seed),
        steps=settings.steps,
        groups_per_step=settings.batch_size // settings.group_size,
        learning_rate=settings.learning_rate,
        compute_dtype=compute_dtype,
    )
    if settings.embedded:
        sharpen(policy.model.to(saved_dtype))
    measure("after")
    save(policy, settings.out, saved_dtype)
    print(f"saved to {settings.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
