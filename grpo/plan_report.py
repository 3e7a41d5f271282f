"""A plan as a table, and what would make it smaller: each change planned again, not guessed."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from grpo.config import Config
from grpo.config_loader import fill, spell
from grpo.plan import GIB, MARGIN, Machine, Plan

AnyConfig = TypeVar("AnyConfig", bound=Config)
Change = dict[str, Any]  # settings by dotted key
LEAST_SAVING = GIB // 20  # what is less would show as 0.0


class Saving(NamedTuple):
    """A change of settings; the peak with it alone, and with all changes before it, in bytes."""

    change: Change
    alone: int
    together: int


def report(
    config: AnyConfig, name: str, machine: Machine, make: Callable[[AnyConfig], Plan]
) -> tuple[str, bool]:
    """What `--plan` prints, and whether it fits. make: a plan for settings on this machine."""
    plan = make(config)
    fits = plan.fits(machine)
    limit = (1 - MARGIN) * machine.gib
    lines = [
        f"{name}: {plan.weights:,} weights, {plan.trained:,} trained",
        f"{machine.nodes} × {machine.gpus} GPUs of {machine.gib:g} GiB",
        sharing(config, machine.ranks),
        "",
        *table(plan),
        "",
        f"{'fits' if fits else 'does not fit'}: {plan.peak.total / GIB:.1f} GiB at the most "
        f"({plan.peak.name}), of {machine.gib:g} less {MARGIN:.0%} for CUDA, NCCL and gaps: "
        f"{limit:.1f}",
    ]
    found = savings(config, plan, make)
    if found:
        lines += ["", *savings_table(found, limit)]
    return "\n".join(lines) + "\n", fits


def sharing(config: Config, ranks: int) -> str:
    """How the prompts of a step are shared out."""
    prompts, group_size = config.grpo.prompts_per_step, config.grpo.group_size
    none = f", on {ranks - prompts} none: raise grpo.prompts_per_step" if prompts < ranks else ""
    return (
        f"{prompts} prompts a step, {group_size} completions each: at most {-(-prompts // ranks)} "
        f"on a GPU{none}"
    )


def table(plan: Plan) -> list[str]:
    """A line for each kind, a column for each moment, in GiB."""
    kinds = list(dict.fromkeys(kind for moment in plan.moments for kind in moment.parts))
    kinds = [kind for kind in kinds if any(moment.parts.get(kind) for moment in plan.moments)]
    width = max(len(kind) for kind in [*kinds, "GiB, fullest GPU"])

    def line(title: str, values: list[str]) -> str:
        return f"{title:{width}}" + "".join(f"{value:>12}" for value in values)

    def cell(size: int) -> str:
        return f"{size / GIB:.1f}" if size else ""

    return [
        line("GiB, fullest GPU", [moment.name for moment in plan.moments]),
        *(line(kind, [cell(m.parts.get(kind, 0)) for m in plan.moments]) for kind in kinds),
        line("total", [cell(moment.total) for moment in plan.moments]),
        "",
        "CPU memory of a node, GiB: "
        + ", ".join(f"{size / GIB:.1f} {what}" for what, size in plan.host.items()),
    ]


def savings_table(found: list[Saving], limit: float) -> list[str]:
    """One line for each change."""
    spelled = [" ".join(f"--{k} {spell(v)}" for k, v in s.change.items()) for s in found]
    width = max(map(len, [*spelled, "to need less, in this order"]))
    lines = [f"{'to need less, in this order':{width}}{'alone':>8}{'all so far':>12}"]
    for text, saving in zip(spelled, found, strict=True):
        enough = "  fits" if saving.together <= limit * GIB else ""
        lines.append(
            f"{text:{width}}{saving.alone / GIB:8.1f}{saving.together / GIB:12.1f}{enough}"
        )
    return lines


def savings(config: AnyConfig, plan: Plan, make: Callable[[AnyConfig], Plan]) -> list[Saving]:
    """Changes, each of which lowers the peak that those before it have left."""
    found: list[Saving] = []
    changed, peak = config, plan.peak.total
    for change in changes(config):
        candidate = fill(changed, change)
        together = make(candidate).peak.total
        if together <= peak - LEAST_SAVING:
            alone = make(fill(config, change)).peak.total
            found.append(Saving(change, alone, together))
            changed, peak = candidate, together
    return found


def changes(config: Config) -> list[Change]:
    """What could be set otherwise: what costs time alone, then what trains otherwise."""
    policy, rollout, train = config.policy, config.rollout, config.train
    has_reference = config.grpo.kl_coef > 0 and not policy.lora_rank
    at_once = min(rollout.max_rows, config.grpo.prompts_per_step * config.grpo.group_size)
    options: list[tuple[bool, Change]] = [
        (policy.compute_dtype == "float32", {"policy.compute_dtype": "bfloat16"}),
        (not train.gradient_checkpointing, {"train.gradient_checkpointing": True}),
        (policy.sharding == "hybrid", {"policy.sharding": "full"}),
        (has_reference and not policy.offload_reference, {"policy.offload_reference": True}),
        (at_once > 8, {"rollout.max_rows": at_once // 2}),
        (rollout.keep_weights, {"rollout.keep_weights": False}),
        (train.tokens_per_row > 1024, {"train.tokens_per_row": train.tokens_per_row // 2}),
        (has_reference, {"grpo.kl_coef": 0.0}),
        (not policy.lora_rank, {"policy.lora_rank": 16}),
    ]
    return [change for possible, change in options if possible]
