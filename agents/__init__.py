"""The Stable-Baselines3 side: policy, episode buffer, algorithms, callbacks."""

from ral_gym.agents.co_trained_critic import CoTrainedCritic
from ral_gym.agents.critic_callback import CriticCallback
from ral_gym.agents.defaults import algorithm_defaults
from ral_gym.agents.episodes import EpisodeRolloutBuffer, Episodes
from ral_gym.agents.policy import PixelCNNPolicy, PriorWeights
from ral_gym.agents.reinforce import Reinforce
from ral_gym.agents.vec_env import CodeVecEnv, make_sb3_env

__all__ = [
    "CoTrainedCritic",
    "CodeVecEnv",
    "CriticCallback",
    "EpisodeRolloutBuffer",
    "Episodes",
    "PixelCNNPolicy",
    "PriorWeights",
    "Reinforce",
    "algorithm_defaults",
    "make_sb3_env",
]
