"""PERM's reward (arXiv 2601.10532): four judges read an answer, one number comes out.

It knows nothing of any trainer. `PermReward` has the signature that TRL gives to reward functions:

    reward = PermReward(make_judge(JudgeConfig(kind="openai")))
    rewards = reward(prompts, completions, persona=…, scenario=…, query=…, completion_ids=…)
"""

from perm_reward.aggregate import RewardConfig
from perm_reward.judges import JudgeConfig, make_judge
from perm_reward.prompts import Seeker, policy_messages
from perm_reward.reward import PermReward

__all__ = [
    "JudgeConfig",
    "PermReward",
    "RewardConfig",
    "Seeker",
    "make_judge",
    "policy_messages",
]
