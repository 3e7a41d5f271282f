import time

import pytest

from perm_reward import JudgeConfig, Seeker
from perm_reward.estimate import CHARACTERS_PER_TOKEN, REPLY_TOKENS, estimate, in_short
from perm_reward.judges import RoleConfig
from perm_reward.panel import Cost
from perm_reward.prompts import judge_messages
from perm_reward.rubrics import ROLES
from perm_reward.spending import Spending
from perm_reward.verdict_store import now

SEEKERS = [
    Seeker("a nurse", "lost her cat", "She was old."),
    Seeker("a boy of ten", "moved away", "Nobody here knows me."),
]


def test_the_paper_s_epoch_is_96_000_calls():
    """3,000 prompts, 8 completions each, 4 judges, 1 sample."""
    assert estimate(JudgeConfig(kind="openai"), SEEKERS, 3000 * 8, 0).calls == 96_000


def test_the_estimate_by_hand():
    config = JudgeConfig(kind="openai", price_input=0.15, price_output=0.6)
    cost = estimate(config, SEEKERS, completions=10, completion_tokens=200)
    characters = sum(
        len(message["content"])
        for role in ROLES
        for seeker in SEEKERS
        for message in judge_messages(role, seeker, "")
    )
    # Four roles, ten completions; the mean over two seekers; half of the longest completion.
    prompts = 10 * (characters / 2 / CHARACTERS_PER_TOKEN + 4 * 100)
    assert cost.prompt_tokens == pytest.approx(prompts, abs=4)
    assert cost.completion_tokens == 40 * REPLY_TOKENS
    assert cost.money == pytest.approx((prompts * 0.15 + 40 * REPLY_TOKENS * 0.6) / 1e6)


def test_only_paid_roles_are_counted_and_each_by_its_own_samples_and_price():
    config = JudgeConfig(
        kind="lexical",
        bystander=RoleConfig(kind="openai", samples=3, price_input=1.0),
        reception=RoleConfig(kind="openai", samples=1),
    )
    cost = estimate(config, SEEKERS, completions=5, completion_tokens=0)
    assert cost.calls == 5 * 3 + 5
    only = JudgeConfig(bystander=config.bystander)
    assert cost.money == estimate(only, SEEKERS, 5, 0).money > 0


def test_an_estimate_in_words():
    config = JudgeConfig(kind="openai")
    assert "in money" not in str(estimate(config, SEEKERS, 10, 100))
    words = str(estimate(JudgeConfig(kind="openai", price_input=100.0), SEEKERS, 24_000, 1000))
    assert words.startswith("at most 96,000 calls, about ")
    assert words.endswith(" in money")


@pytest.mark.parametrize(
    "number, short", [(999, "999"), (1000, "1k"), (61_400_000, "61.4M"), (2_500_000_000, "2.5B")]
)
def test_numbers_in_short(number, short):
    assert in_short(number) == short


class Bill:
    """A reward whose judges have cost so much."""

    def __init__(self, money: float = 0.0) -> None:
        self.money = money
        self.charges_after = None

    def charge_after(self, moment):
        self.charges_after = moment

    def costs(self):
        return {
            "reception": Cost(calls=2, money=self.money / 2),
            "bystander": Cost(money=self.money / 2),
        }


def spending_of(bill, budget, per_completion=1.0, gather=lambda mine: [mine]):
    return Spending(bill, gather, budget, per_completion)


def test_the_budget_holds_by_the_dearest_completion_so_far():
    bill = Bill()
    spending = spending_of(bill, budget=10.0, per_completion=0.2)
    assert spending.allows(50) and not spending.allows(51), "before anything: the estimate"
    spending.record(completions=8)
    assert not spending.allows(51), "broken forms, which cost nothing, are no sign"
    bill.money = 2.0
    spending.record(completions=8)
    assert spending.allows(32) and not spending.allows(33), "0.25 each; 8 are left"
    bill.money = 6.0
    spending.record(completions=8)
    assert spending.allows(8) and not spending.allows(9), "0.5 each; 4 are left"
    spending.record(completions=8)
    assert not spending.allows(9), "a cheap step does not lower what the next may cost"
    assert str(spending).startswith("6.00 of judge.budget = 10 spent, and a completion may cost ")


def test_costs_are_those_of_all_processes():
    spending = spending_of(Bill(3.0), 10.0, per_completion=0.1, gather=lambda mine: [mine, mine])
    costs = spending.record(completions=6)
    assert costs["judge.reception.calls"] == 4 and costs["judge.bystander.money"] == 3.0
    assert spending.spent == 6.0
    assert spending.allows(4) and not spending.allows(5)


def test_the_account_tells_from_when_on_verdicts_are_not_in_it():
    """A run may stop, and save its checkpoint, in the middle of a step that it has paid for."""
    spending = spending_of(Bill(), 10.0)
    before = now()
    spending.record(completions=8)
    recorded, state = now(), spending.state_dict()
    time.sleep(0.005)
    assert spending.state_dict() == state, "the moment of the account, not of the checkpoint"
    later = Bill()
    spending_of(later, 10.0).load_state_dict(state)
    assert before <= later.charges_after <= recorded


def test_without_a_budget_everything_is_allowed():
    spending = spending_of(Bill(1e9), budget=0.0)
    spending.record(completions=1)
    assert spending.allows(10**9)


def test_a_run_that_goes_on_knows_what_was_spent():
    spending = spending_of(Bill(6.0), 10.0, per_completion=0.1)
    spending.record(completions=8)
    later = Bill()
    resumed = spending_of(later, 10.0, per_completion=0.1)
    resumed.load_state_dict(spending.state_dict())
    assert str(resumed) == str(spending)
    assert resumed.state_dict() == spending.state_dict()
    for one in (spending, resumed):
        assert one.allows(5) and not one.allows(6)
    later.money = 1.0  # paid by the process that went on
    assert resumed.record(completions=8)["judge.bystander.money"] == 3.5
    assert resumed.spent == 7.0
