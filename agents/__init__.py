"""The Stable-Baselines3 side: policy, episode buffer, algorithms, callbacks."""

from ral_gym.agents.algorithm import Algorithm, find_algorithm
from ral_gym.agents.algorithms.base import EpisodeAlgorithm
from ral_gym.agents.algorithms.grpo import GRPO
from ral_gym.agents.algorithms.reinforce import Reinforce
from ral_gym.agents.check_processes import CheckProcesses
from ral_gym.agents.defaults import ALGORITHMS, algorithm_defaults, policy_for
from ral_gym.agents.episodes import EpisodeRolloutBuffer, Episodes
from ral_gym.agents.features import CodeFeatures
from ral_gym.agents.maskable import MaskableEpisodeRolloutBuffer, MaskablePixelCNNPolicy, MaskablePriorPolicy
from ral_gym.agents.policy import PixelCNNPolicy, PriorPolicy, PriorWeights
from ral_gym.agents.regularizers import AdaptiveEntropy, EntropyReward, EntropyTarget, MLEShare, PriorKLReward
from ral_gym.agents.rewards.co_trained_critic import CoTrainedCritic
from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.agents.rewards.critic_callback import CriticCallback
from ral_gym.agents.rewards.deliveries import CriticRewardWrapper, StepCriticCallback
from ral_gym.agents.rewards.monte_carlo import MonteCarloReturns
from ral_gym.agents.train_ral import Stage, load_run
from ral_gym.agents.vec_env import CodeVecEnv, make_sb3_env
from ral_gym.runs.sharing import Processes

__all__ = [
    "ALGORITHMS",
    "GRPO",
    "AdaptiveEntropy",
    "Algorithm",
    "CheckProcesses",
    "CoTrainedCritic",
    "CodeFeatures",
    "CodeVecEnv",
    "CompositeReward",
    "CriticCallback",
    "CriticRewardWrapper",
    "EntropyReward",
    "EntropyTarget",
    "EpisodeAlgorithm",
    "EpisodeRolloutBuffer",
    "Episodes",
    "MLEShare",
    "MaskableEpisodeRolloutBuffer",
    "MaskablePixelCNNPolicy",
    "MaskablePriorPolicy",
    "MonteCarloReturns",
    "PixelCNNPolicy",
    "PriorKLReward",
    "PriorPolicy",
    "PriorWeights",
    "Processes",
    "Reinforce",
    "Stage",
    "StepCriticCallback",
    "algorithm_defaults",
    "find_algorithm",
    "load_run",
    "make_sb3_env",
    "policy_for",
]
