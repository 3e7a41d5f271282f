"""Who gives the verdicts: what a judge is, and how one is made from its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from perm_reward.judges.config import JudgeConfig, RoleConfig
from perm_reward.prompts import Seeker
from perm_reward.rubrics import ROLES, Rubric
from perm_reward.verdict import Verdict

__all__ = ["Judge", "JudgeConfig", "RoleConfig", "Traffic", "make_judge"]


@dataclass
class Traffic:
    """Where a judge's calls are at this moment."""

    waiting: int = 0
    """calls that wait for their turn"""
    in_flight: int = 0
    """attempts that were sent and not yet answered"""
    failing: int = 0
    """calls whose last attempt failed and that will be tried again"""
    done: int = 0
    """calls that have ended so far, with a score or without"""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.waiting + other.waiting,
            self.in_flight + other.in_flight,
            self.failing + other.failing,
            self.done + other.done,
        )


class Judge(Protocol):
    """Gives verdicts. All calls come from one asyncio loop, many of them at once.

    Three more attributes are used where a judge has them: `asked(role, seeker, judged_text)`, a
    dictionary fit for JSON of everything that determines a verdict, under which it is kept;
    `traffic`, where its calls are; and `rubrics`, what it is told, where that is not the package's.
    """

    label: str
    """what stands beside each verdict, so that nobody takes one judge's scores for another's"""

    def check(self) -> None:
        """Called once, before any work starts; of many processes, by one.

        Raises:
            ValueError: the judge cannot work; one line that names the setting and the remedy.
        """
        ...

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """The verdict of one of `perm_reward.rubrics.ROLES` on the text that its rubric shows."""
        ...

    async def close(self) -> None:
        """Let go of connections. No call follows."""
        ...


def make_judge(
    config: JudgeConfig,
    *,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    store: Any = None,
    device: Any = None,
) -> Judge:
    """The judges that the settings ask for, as one that answers for all four roles.

    No endpoint is contacted yet: that is what `check` does. Local models are loaded.

    Args:
        seed: the run's; the marks around what is judged follow from it.
        share: (which, of how many processes), each of which gets its part of the calls in flight.
        store: keeps every verdict and finds it again (perm_reward.verdict_store); None: nothing is.
        device: the policy's, a torch.device, where local models go unless judge.device says
            otherwise; None: the current GPU, if there is one.

    Raises:
        ValueError: a setting does not fit, or the environment of this process lacks what a judge
            needs (a key). One line.
    """
    from perm_reward.panel import Panel, Prices

    rubrics = config.read_rubrics()
    of_role = {role: config.of(role) for role in ROLES}
    judges: dict[JudgeConfig, Judge] = {}  # equal settings, one judge
    endpoints: dict[tuple[str, str], Any] = {}  # and one limit for all calls to an endpoint
    for own in of_role.values():
        same = _what_makes_a_judge(own)
        if same not in judges:
            judges[same] = _make_one(same, rubrics, seed, share, endpoints, device)
    return Panel(
        judges={role: judges[_what_makes_a_judge(own)] for role, own in of_role.items()},
        samples={role: own.samples for role, own in of_role.items()},
        prices={
            role: Prices(own.price_input, own.price_cached, own.price_output)
            for role, own in of_role.items()
        },
        store=store,
        rubrics=rubrics,
    )


def _what_makes_a_judge(config: JudgeConfig) -> JudgeConfig:
    """Its settings, but for how often it is asked and what that costs."""
    if config.kind == "local":
        # Loaded once: nothing else counts.
        return JudgeConfig(kind="local", model=config.model, device=config.device)
    plain = JudgeConfig()
    return replace(
        config,
        samples=plain.samples,
        price_input=plain.price_input,
        price_cached=plain.price_cached,
        price_output=plain.price_output,
        budget=plain.budget,
    )


def _make_one(
    config: JudgeConfig,
    rubrics: Mapping[str, Rubric],
    seed: int,
    share: tuple[int, int],
    endpoints: dict[tuple[str, str], Any],
    device: Any,
) -> Judge:
    """One judge. Its kind's module is imported only now: clients and models take seconds."""
    if config.kind == "lexical":
        from perm_reward.judges.lexical import LexicalJudge

        return LexicalJudge()
    if config.kind == "local":
        from perm_reward.judges.local import LocalJudge

        return LocalJudge(config, rubrics=rubrics, seed=seed, device=device)
    from perm_reward.judges.endpoints import make_endpoint
    from perm_reward.judges.openai import OpenAIJudge

    which, of = share
    mine = config.concurrency // of + (which < config.concurrency % of)
    if mine == 0:
        raise ValueError(
            f"judge.concurrency = {config.concurrency}: must be at least the number of processes, "
            f"{of}, each of which makes calls"
        )
    for where in config.endpoints:
        if where not in endpoints:
            endpoints[where] = make_endpoint(config, *where, mine, seed)
    own = [endpoints[where] for where in config.endpoints]
    return OpenAIJudge(config, own, rubrics=rubrics, seed=seed)
