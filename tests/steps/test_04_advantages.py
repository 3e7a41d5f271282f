"""Step 4: rewards of a group → advantages (grpo/advantages.py).

Four completions answered the same prompt and earned the rewards 1, 0, .5, 0. By hand:

    mean       (1 + 0 + .5 + 0) / 4                            = .375
    deviations  .625, −.375, .125, −.375                         (they sum to 0)
    squares     .390625, .140625, .015625, .140625, together     .6875
    std        √(.6875 / 3), dividing by n − 1                 = .478713553878169
    advantage   deviation / (std + .0001), the first             1.305309749354
"""

import pytest
import torch

from grpo.advantages import group_advantages

NAN = float("nan")


def advantages_of(*rewards, scale="group", dtype=torch.float64):
    return group_advantages(torch.tensor([rewards], dtype=dtype), scale=scale)[0]


def test_worked_example():
    expected = [1.305309749354, -0.783185849612, 0.261061949871, -0.783185849612]
    assert advantages_of(1, 0, 0.5, 0).tolist() == pytest.approx(expected, abs=1e-12)


def test_none_leaves_the_deviation_from_the_mean():
    assert advantages_of(1, 0, 0.5, 0, scale="none").tolist() == [0.625, -0.375, 0.125, -0.375]


def test_batch_divides_each_group_by_the_deviation_of_all_rewards():
    """A group that nearly agrees should not shout as loudly as one that does not.

    Group 1 has rewards 0 and 4, group 2 has 1 and 3, the mean of both is 2. Divided by its own
    std, each becomes ±.7071. All four rewards: mean 2, squares 4 + 4 + 1 + 1 = 10, std
    √(10 / 3) = 1.8257; divided by this, the wider group keeps twice the other's advantage.
    """
    rewards = torch.tensor([[0.0, 4.0], [1.0, 3.0]], dtype=torch.float64)
    by_group = group_advantages(rewards, scale="group", eps=0)
    by_batch = group_advantages(rewards, scale="batch", eps=0)
    root = 0.5**0.5
    assert by_group.flatten().tolist() == pytest.approx([-root, root, -root, root])
    std = (10 / 3) ** 0.5
    assert by_batch.flatten().tolist() == pytest.approx([-2 / std, 2 / std, -1 / std, 1 / std])


def test_batch_deviation_is_that_of_the_rewards_as_given():
    """Not of the rewards minus their group's mean: TRL's definition, and it differs.

    Groups (0, 1) and (4, 5): as given, the mean is 2.5 and the std √(17 / 3) = 2.38. With the
    groups' means taken off first, it would be √(1 / 3) = .577. So how much prompts differ in
    difficulty is a part of the batch's spread.
    """
    rewards = torch.tensor([[0.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    advantages = group_advantages(rewards, scale="batch", eps=0)
    expected = 0.5 / (17 / 3) ** 0.5
    assert advantages.flatten().tolist() == pytest.approx([-expected, expected] * 2)


def test_unscored_completion_is_left_out_of_the_baseline():
    """A judge failed on the second completion: its reward is NaN.

    Elsewhere such a reward became 0 (the completion pays for the judge's failure), or the batch's
    mean (a score that nobody gave), or it stayed, and the loss of the whole batch was NaN. Here
    the others are a group of three: 1, .5, 0, mean .5, std √((.25 + 0 + .25) / 2) = .5; the
    second's advantage is 0.
    """
    expected = [0.5 / 0.5001, 0.0, 0.0, -0.5 / 0.5001]
    assert advantages_of(1, NAN, 0.5, 0).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_fewer_than_two_scores_teach_nothing(scale):
    assert advantages_of(NAN, 0.7, NAN, scale=scale).tolist() == [0, 0, 0]
    assert advantages_of(NAN, NAN, NAN, scale=scale).tolist() == [0, 0, 0]
    assert advantages_of(0.7, scale=scale).tolist() == [0]


def test_unscored_group_does_not_touch_the_others_in_the_batch():
    rewards = torch.tensor([[1.0, 0.0], [NAN, NAN], [0.2, NAN]], dtype=torch.float64)
    advantages = group_advantages(rewards, scale="batch", eps=0)
    # The scored rewards are 1, 0 and .2: mean .4, squares .36 + .16 + .04 = .56, std √.28.
    expected = 0.5 / 0.28**0.5
    assert advantages[0].tolist() == pytest.approx([expected, -expected])
    assert advantages[1:].tolist() == [[0, 0], [0, 0]]


def test_spread_is_what_counts_not_the_mean():
    """Seen elsewhere: groups "without spread" were found by a mean of 0 in place of a spread of 0.

    Rewards −1 and 1 have mean 0 and everything to teach; .5 and .5 have a mean and nothing to
    teach. (Nothing about the reward, that is: in step 8 their tokens still feel the KL term.)
    """
    root = 0.5**0.5
    assert advantages_of(-1, 1).tolist() == pytest.approx([-root, root], rel=1e-4)
    assert advantages_of(0.5, 0.5).tolist() == [0, 0]


def test_equal_rewards_give_exactly_zero_in_float32():
    """In float32 the mean of seven rewards of .7 is not .7, and that rounding became an advantage.

    It is off by 6e-8, and 6e-8 / (0 + .0001) = 6e-4: of one sign for the whole group, so that all
    seven completions are pushed the same way, for nothing. It happens to half the rewards below.
    """
    rewards = torch.linspace(0.1, 0.9, 81)[:, None].repeat(1, 7)  # [81, 7], each row one reward
    naive = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert naive.count_nonzero() > 0, "the story's mistake is gone"
    for scale in ("group", "batch", "none"):
        assert group_advantages(rewards, scale=scale).count_nonzero() == 0


def test_equal_rewards_give_exactly_zero_in_float64():
    """float64 only makes the rounding smaller: .1 + .1 + .1 is .30000000000000004.

    What makes it zero is the question whether the rewards differ at all, asked of the rewards.
    """
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert (rewards - rewards.sum() / 3).count_nonzero() > 0, "the story's mistake is gone"
    for scale in ("group", "batch", "none"):
        assert group_advantages(rewards, scale=scale).count_nonzero() == 0


def test_the_type_of_the_rewards_is_kept():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert advantages_of(1, 0, 0.5, 0, dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        (torch.tensor([1.0, 0.0]), {}, r"rewards \[2\]: must be \[groups, completions"),
        (torch.zeros(2, 0), {}, r"rewards \[2, 0\]"),
        (torch.tensor([[1, 0]]), {}, r"torch.int64: must be floating point"),
        (torch.tensor([[1.0, float("inf")]]), {}, "infinite"),
        (torch.tensor([[1.0, 0.0]]), {"scale": "std"}, "scale = 'std': must be one of group"),
        (torch.tensor([[1.0, 0.0]]), {"eps": -1.0}, "eps = -1.0: must be at least 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(rewards, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        group_advantages(rewards, **settings)
    assert "\n" not in str(error.value)
