"""Rewards of responses: any callable, any sequence classifier of transformers, UltraRM, or a judge; several of them at once."""

from recontrol.data.rewards.chat import Judge
from recontrol.data.rewards.checks import Reward, checked_rewards, reward_name
from recontrol.data.rewards.loading import CombinedReward, as_reward
from recontrol.data.rewards.model import RewardModel

__all__ = ["CombinedReward", "Judge", "Reward", "RewardModel", "as_reward", "checked_rewards", "reward_name"]
