"""What --plan says, against real allocations: exactly where the plan claims to be exact."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import train
from grpo import generation, plan
from grpo.config import Config, ConfigError
from grpo.config_loader import fill
from grpo.decoding import Decoder, Size, Window
from grpo.generation import generate_groups
from grpo.loading import first_layers
from grpo.logprobs import score
from grpo.packing import pack
from grpo.parallel import pick_device, start_ranks
from grpo.plan import GIB, Machine, Plan, make_plan, parse_machine
from grpo.plan_report import report, savings
from grpo.policy import LAYERS_CHECKED
from grpo.rehearsal import attend_fused, rehearse_decoding, rehearse_row
from grpo.sampling import Sampling
from grpo.sharded_bytes import Moment
from grpo.sharding import frozen_copy, shard
from grpo.shared_prefix import attend_in_one
from grpo.trainer import enable_checkpointing
from tests.plan_worker import LORA_RANK, TOKENS, as_on_cuda, peak_bytes

ROOT = Path(__file__).parent.parent
QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
QWEN_1_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# Rows that neither two nor three ranks share evenly.
SMALL = Qwen2Config(
    vocab_size=3001,
    hidden_size=256,
    intermediate_size=1003,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    eos_token_id=None,
    pad_token_id=None,
)


def saved(config: Qwen2Config, folder: Path) -> str:
    """A folder with nothing but config.json in it: no weights, no tokenizer."""
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small(tmp_path: Path) -> str:
    return saved(SMALL, tmp_path / "small")


def small_config(tokens: int = TOKENS, **changes: object) -> Config:
    settings = {
        "policy.compute_dtype": "float32",
        "rollout.max_prompt_tokens": 60,
        "rollout.max_completion_tokens": 100,
        "train.tokens_per_row": tokens,
        **changes,
    }
    return fill(Config(), settings)


def moment(planned: Plan, name: str) -> Moment:
    [found] = [m for m in planned.moments if m.name == name]
    return found


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "published"), [(QWEN_7B, 7_615_616_512), (QWEN_1_5B, 1_543_714_304)]
)
def test_weights_are_counted_as_published(
    config: Qwen2Config, published: int, tmp_path: Path
) -> None:
    """The smaller one ties its embeddings to its head: they count once."""
    planned = make_plan(Config(), saved(config, tmp_path), Machine(1, 1, 80))
    assert planned.weights == published
    parts = moment(planned, "embeddings").parts
    assert parts["weights"] == parts["gradients"] == 4 * published
    assert parts["optimiser"] == 8 * published
    assert parts["generation copy"] == 2 * published


# --- against real allocations --------------------------------------------------------------------


def run_worker(model: str, ranks: int, folder: Path) -> list[dict]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = str(ROOT / "tests" / "plan_worker.py")
    subprocess.run(
        [*launcher, worker, model, str(folder)], check=True, env=environment, timeout=300
    )
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


WAYS = {
    "kept": {"train.gradient_checkpointing": False},
    "recomputed": {"train.gradient_checkpointing": True},
    "adapted": {"train.gradient_checkpointing": True, "policy.lora_rank": LORA_RANK},
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_real_step_holds_what_was_planned(ranks: int, small: str, tmp_path: Path) -> None:
    """Weights, gradients and moments to the byte on the fullest rank, the first; the others have
    fewer rows of their own, but FSDP2 pads their weights to as many. The peak of the update may be
    planned a little too high (a layer's gradients do not all live when most activations do)."""
    of_ranks = run_worker(small, ranks, tmp_path)
    for way, changes in WAYS.items():
        config = small_config(**changes)
        planned = make_plan(config, small, Machine(1, ranks, 80))
        parts = moment(planned, "embeddings").parts
        fullest = of_ranks[0][way]
        assert fullest["weights"] == parts["weights"]
        assert fullest["gradients"] == parts["gradients"]
        assert fullest["exp_avg"] + fullest["exp_avg_sq"] == parts["optimiser"]
        for other in of_ranks:
            assert other[way]["stored_weights"] == parts["weights"]
        if way != "adapted":
            assert sum(other[way]["weights"] for other in of_ranks) == 4 * planned.weights

        stays = parts["weights"] + parts["optimiser"]
        assert plan.rows_of_update(config, ranks)[1] > 1
        second_row = min(other[way]["second_row"] for other in of_ranks)
        measured = stays + parts["gradients"] + second_row
        assert 0.97 <= without_copies(planned) / measured <= 1.1

        one_row = fill(
            config,
            {
                "grpo.prompts_per_step": ranks,
                "grpo.group_size": 2,
                "rollout.max_prompt_tokens": 100,
                "rollout.max_completion_tokens": 301,
                "train.tokens_per_row": 2000,
            },
        )
        assert plan.rows_of_update(one_row, ranks) == (TOKENS, 1)
        planned = make_plan(one_row, small, Machine(1, ranks, 80))
        measured = stays + min(other[way]["first_row"] for other in of_ranks)
        assert 0.97 <= without_copies(planned) / measured <= 1.1


def without_copies(planned: Plan) -> int:
    """The peak of the update beside the reference and what generates."""
    apart = ("reference", "generation copy", "key-value cache", "decoding")
    return max(
        sum(size for kind, size in moment(planned, name).parts.items() if kind not in apart)
        for name in ("log-probs", "layers", "embeddings")
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rehearsed_row_takes_what_a_real_one_takes(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rehearsed = models(checkpointing)
    found = rehearse_row(rehearsed, TOKENS, 1.0)
    as_on_cuda(monkeypatch)
    row = pack([([1], [[1] * TOKENS])], "cpu")

    def forward() -> None:
        with torch.no_grad():
            score(real, row, 1.0)

    def update() -> None:
        score(real, row, 1.0)[0].sum().backward()

    for parameter in real.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    update()
    most = max(found.forward, found.scored)
    assert most == pytest.approx(peak_bytes(forward), rel=0.01)
    most = max(found.logprobs, found.backward)
    assert most == pytest.approx(peak_bytes(update), rel=0.01)
    if checkpointing:  # each layer's input, at least
        assert found.kept > SMALL.num_hidden_layers * TOKENS * SMALL.hidden_size * 4


def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in another way: each storage that autograd keeps, once, weights apart."""
    as_on_cuda(monkeypatch)
    real, rehearsed = models(checkpointing=False)
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack_saved(tensor: torch.Tensor) -> torch.Tensor:
        stored = tensor.untyped_storage()
        if stored.data_ptr() not in weights:
            kept[stored.data_ptr()] = stored
        return tensor

    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack_saved, lambda tensor: tensor):
        real.get_decoder()(
            input_ids=ids,
            position_ids=ids,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            use_cache=False,
            attend=attend_fused,
        )
    found = rehearse_row(rehearsed, TOKENS, 1.0)
    assert found.kept == pytest.approx(
        sum(map(torch.UntypedStorage.nbytes, kept.values())), rel=0.02
    )


def test_the_attention_that_is_rehearsed_keeps_what_a_fused_kernel_keeps() -> None:
    """PyTorch's own fused kernel on a CPU: query, key, value, output, and a number for each query
    of a head."""
    query, key, value = (torch.randn(1, 4, 256, 32, requires_grad=True) for _ in range(3))

    def kept_by(attend: Callable[[], torch.Tensor]) -> list[int]:
        kept: dict[int, int] = {}

        def remember(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            attend()
        return sorted(kept.values())

    fused = kept_by(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    assert kept_by(lambda: attend_fused(0, query, key, value, None, 1.0)) == fused
    assert len(fused) == 5


def models(checkpointing: bool) -> list:
    """SMALL with memory, and without it; random weights, which do not matter."""
    made = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(SMALL).eval()
        if checkpointing:
            enable_checkpointing(model.train())
        generation.use_shared_prefix(model)
        made.append(model)
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_were_not_rehearsed_add_what_the_third_does(
    checkpointing: bool, small: str
) -> None:
    found = plan.row_bytes(small, torch.bfloat16, 333, 0.7, checkpointing)
    model = plan.form_of(AutoConfig.from_pretrained(small), torch.bfloat16)
    if checkpointing:
        enable_checkpointing(model.train())
    assert found == rehearse_row(model, 333, 0.7)
    size = Size(8, 2, 4, 128, 256)
    everything = rehearse_decoding(model.eval(), size, 1.0)
    assert plan.decoding_bytes(small, torch.bfloat16, size, 1.0) == everything


# --- generation ----------------------------------------------------------------------------------


def test_the_decoder_takes_what_a_real_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.shared_prefix.attend_in_parts", attend_in_one)
    real, rehearsed = models(checkpointing=False)
    size = Size(rows=16, slots=3, lanes=8, prefix_tokens=128, own_tokens=256)
    found = rehearse_decoding(rehearsed, size, 1.0)
    with torch.inference_mode():
        decoder = Decoder(real, size, Sampling(), [0])
        decoder.prefill(0, [1] * 128, range(8), torch.zeros(8, dtype=torch.long))
        stores = [t for pair in decoder.cache.prefix + decoder.cache.own for t in pair]
        state = [value for value in vars(decoder).values() if isinstance(value, torch.Tensor)]
        cache = sum(t.nbytes for t in stores)
        assert found.cache == cache
        assert found.state == pytest.approx(cache + sum(t.nbytes for t in state), rel=0.01)
        # By hand: keys and values, 2 heads of 32 numbers in 5 layers, of 4 bytes.
        assert cache == 2 * 5 * 2 * 32 * 4 * (3 * 128 + 16 * 256)

        def work() -> None:
            decoder.prefill(0, [1] * 128, range(8), torch.zeros(8, dtype=torch.long))
            decoder.step(Window(16, 3, 8, 128, 256))
            decoder.compact(list(range(16)))

        assert found.work == pytest.approx(peak_bytes(work), rel=0.1)


@pytest.mark.parametrize("keep_weights", [True, False])
def test_decoders_are_planned_as_large_as_generation_makes_them(
    keep_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation takes more slots than training (a prompt each row): one decoder that serves both
    is larger than either."""
    asked: list[Size] = []

    class Enough(Exception):
        pass

    def remember(model: object, size: Size, *rest: object) -> None:
        asked.append(size.in_buckets())
        raise Enough

    monkeypatch.setattr(generation, "find_decoder", remember)
    config = small_config(**{"rollout.keep_weights": keep_weights, "rollout.max_rows": 6})
    config.data.heldout_records = 20
    real, _ = models(checkpointing=False)
    rollout = config.rollout
    # 8 prompts of 8 completions and 20 held-out ones, on two ranks
    for prompts, samples in ((4, 8), (10, 1)):
        with pytest.raises(Enough):
            generate_groups(
                real,
                [[1] * rollout.max_prompt_tokens] * prompts,
                group_size=samples,
                max_new_tokens=rollout.max_completion_tokens,
                sampling=Sampling(),
                stop_ids=[0],
                max_rows=rollout.max_rows,
            )
    expected = [asked[0].join(asked[1])] if keep_weights else asked
    assert plan.decoding_sizes(config, ranks=2) == expected
    assert asked[0] != asked[1]


# --- settings ------------------------------------------------------------------------------------


def test_settings_take_away_what_they_say(small: str) -> None:
    machine = Machine(2, 4, 80)
    config = small_config()
    full = make_plan(config, small, machine)
    hybrid = make_plan(fill(config, {"policy.sharding": "hybrid"}), small, machine)
    one_node = make_plan(config, small, Machine(1, 4, 80))
    assert moment(hybrid, "refill").parts["weights"] == moment(one_node, "refill").parts["weights"]
    assert moment(hybrid, "refill").parts["weights"] > moment(full, "refill").parts["weights"]

    offloaded = make_plan(fill(config, {"policy.offload_reference": True}), small, machine)
    share = moment(full, "generate").parts["reference"]
    assert all(
        a.total - b.total == share for a, b in zip(full.moments, offloaded.moments, strict=True)
    )
    assert offloaded.host == full.host | {"for the reference": 4 * share}

    alone = make_plan(fill(config, {"grpo.kl_coef": 0.0}), small, machine)
    assert not any(m.parts["reference"] or m.name == "reference" for m in alone.moments)

    let_go = make_plan(fill(config, {"rollout.keep_weights": False}), small, machine)
    for name in ("reference", "log-probs", "layers", "embeddings"):
        gone = moment(full, name).total - moment(let_go, name).total
        generator = ("generation copy", "key-value cache", "decoding")
        assert gone == sum(moment(full, name).parts[kind] for kind in generator) > 0
    assert moment(let_go, "generate").parts["generation copy"] == 4 * full.weights

    adapted = make_plan(fill(config, {"policy.lora_rank": 3}), small, machine)
    # q, k, v, o and gate, up, down of each layer, each with a [3, in] and a [out, 3]
    sides = [(256, 256), (256, 64), (256, 64), (256, 256), *[(256, 1003)] * 2, (1003, 256)]
    assert adapted.trained == 5 * 3 * sum(map(sum, sides))
    assert adapted.weights == full.weights == full.trained
    parts = moment(adapted, "layers").parts
    assert parts["reference"] == 0 and moment(adapted, "reference").total > 0
    # Rows, shared by 8: 3 are one for each of the first three, 1003 are 126 for the first.
    shares = [i + 3 * -(-out // 8) for i, out in sides]
    assert parts["optimiser"] == 5 * sum(shares) * 8
    frozen = moment(full, "layers").parts["weights"]
    assert parts["weights"] == frozen + parts["optimiser"] // 2

    judged = make_plan(config, small, machine, [small])
    pairs = zip(judged.moments, full.moments, strict=True)
    assert all(a.total - b.total == 2 * full.weights for a, b in pairs)


def test_loading_needs_what_is_checked_before(small: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(small)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    checked = first_layers(str(tmp_path), LAYERS_CHECKED, torch.device("cpu"))
    planned = make_plan(small_config(), small, Machine(1, 2, 80))
    assert planned.host["to load"] == sum(p.nbytes for p in checked.parameters())
    assert planned.host["to export"] == 4 * planned.weights
    crowded = make_plan(small_config(**{"policy.sharding": "hybrid"}), small, Machine(100, 1, 80))
    assert crowded.host["to load"] == planned.host["to load"]


def test_the_reference_holds_no_more_after_its_pass_than_before() -> None:
    """FSDP2 keeps what the root has gathered for a backward pass, which never comes here: of a
    7-billion model 2 GiB of embeddings and head would stay on each GPU."""
    real, _ = models(checkpointing=False)
    with start_ranks(pick_device("cpu")) as ranks:
        reference = frozen_copy(shard(real, ranks, torch.bfloat16))
        with torch.no_grad():
            score(reference, pack([([1], [[1] * 4])], "cpu"), 1.0)
        assert all(isinstance(parameter, DTensor) for parameter in reference.parameters())


def test_the_judges_that_are_on_the_gpu() -> None:
    config = train.RunConfig()
    assert train.judge_models(config) == []
    judge = replace(config.judge, kind="local", model="a")
    config.judge = replace(judge, bystander=replace(judge.bystander, model="b"))
    assert train.judge_models(config) == ["a", "b"]
    config.judge = replace(config.judge, device="cpu")
    assert train.judge_models(config) == []
    config.judge = replace(config.judge, device="auto")
    config.reward = "module:function"
    assert train.judge_models(config) == []


@pytest.mark.slow
def test_savings_are_those_of_the_changed_settings(small: str) -> None:
    config, machine = small_config(), Machine(1, 1, 80)

    def make(changed: Config) -> Plan:
        return make_plan(changed, small, machine)

    least = fill(config, {"policy.compute_dtype": "bfloat16", "policy.lora_rank": 4})
    assert savings(least, make(least), make) == []  # none is worth a twentieth of a GiB
    big = fill(config, {"train.tokens_per_row": 40_000, "train.gradient_checkpointing": False})
    big = fill(big, {"grpo.prompts_per_step": 100})
    found = savings(big, make(big), make)
    assert [*found[0].change] == ["policy.compute_dtype"]
    changed, before = big, make(big).peak.total
    for saving in found:
        assert saving.alone == make(fill(big, saving.change)).peak.total
        changed = fill(changed, saving.change)
        assert saving.together == make(changed).peak.total < before
        before = saving.together


def test_the_table_adds_up(small: str) -> None:
    planned = make_plan(small_config(200_000), small, Machine(1, 1, 80))
    text, fits = report(small_config(200_000), "a model", Machine(1, 1, 80), lambda _: planned)
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("GiB"))
    end = next(i for i, line in enumerate(lines) if line.startswith("total"))
    names = lines[start].split()[3:]
    assert names == [m.name for m in planned.moments]
    edges = [lines[start].index(name) + len(name) for name in names]
    for name, edge in zip(names, edges, strict=True):
        column = [float(line[edge - 8 : edge].strip() or 0) for line in lines[start + 1 : end + 1]]
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.05 * len(column))
        assert column[-1] == pytest.approx(moment(planned, name).total / GIB, abs=0.051)
    assert fits and f"fits: {planned.peak.total / GIB:.1f} GiB" in text


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environment", "machine"),
    [
        ("4x8x80", {}, Machine(4, 8, 80)),
        ("8x24.5", {"WORLD_SIZE": "2"}, Machine(1, 8, 24.5)),
        ("80", {}, Machine(1, 1, 80)),
        ("80", {"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}, Machine(4, 8, 80)),
    ],
)
def test_machines(text: str, environment: dict[str, str], machine: Machine) -> None:
    assert parse_machine(text, environment) == machine


@pytest.mark.parametrize(
    "text", ["", "8x", "x80", "0x80", "-1x80", "8x0", "8xnan", "8xinf", "1x2x3x4", "a", "1.5x80"]
)
def test_what_is_no_machine(text: str) -> None:
    with pytest.raises(ConfigError, match="must be nodes x GPUs x GiB") as error:
        parse_machine(text, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("gib", "code"), [("2x80", 0), ("0.01", 1)])
def test_the_command_prints_and_exits(
    gib: str, code: int, small: str, capsys: pytest.CaptureFixture
) -> None:
    """The folder holds no weights and no tokenizer; nothing else of the run is needed either."""
    with pytest.raises(SystemExit) as ended:
        train.read_command_line(["--policy.model", small, "--plan", gib])
    assert ended.value.code == code
    printed = capsys.readouterr().out
    assert ("does not fit" in printed) == (code == 1)


def test_a_model_that_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs its config.json"):
        train.read_command_line(["--policy.model", str(tmp_path / "none"), "--plan", "80"])
