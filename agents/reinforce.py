"""REINFORCE on whole images (Eq. 2-4), as a Stable-Baselines3 algorithm.

One update: every environment draws one episode, the rewards-to-go Q (Eq. 3) minus a baseline weigh the log-probabilities
of the drawn codes, one optimizer step follows. The paper mentions no baseline; without one, every code of a batch is
pushed the same way. The loss is the mean over drawn codes where Eq. 2 sums over an episode: with Adam only its ratio to
other loss terms differs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional as F

from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.agents.policy import PixelCNNPolicy
from ral_gym.agents.vec_env import CodeVecEnv, real_codes
from ral_gym.errors import ConfigError
from ral_gym.pixelcnn import PixelCNN

Baseline = Literal["none", "mean", "leave_one_out", "value"]
BASELINES = ("none", "mean", "leave_one_out", "value")
SelfReinforce = TypeVar("SelfReinforce", bound="Reinforce")


def batch_baseline(returns: np.ndarray, mask: np.ndarray, group: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """The mean return at the same position over episodes of the same group.

    Args:
        returns: (n, T) rewards-to-go.
        mask: (n, T) bool, the drawn positions.
        group: (n,) integer labels: episodes of one mode and length.
        leave_one_out: leave the episode itself out (RLOO): then the baseline does not depend on its own codes and the
            estimate stays unbiased. An episode alone in its group gets its own return: it teaches nothing.

    Returns:
        (n, T) float32.
    """
    n_groups = int(group.max(initial=-1)) + 1
    sums = np.zeros((n_groups, returns.shape[1]))
    np.add.at(sums, group, np.where(mask, returns, 0.0))
    counts = np.bincount(group, minlength=n_groups)[group][:, None]  # (n, 1)
    total = sums[group]
    if not leave_one_out:
        return (total / counts).astype(np.float32)
    alone = counts == 1
    return np.where(alone, returns, (total - returns) / np.maximum(counts - 1, 1)).astype(np.float32)


class Reinforce(OnPolicyAlgorithm):
    """Policy gradient with one round of episodes per update.

    Args:
        policy: `PixelCNNPolicy` (the class or its name).
        env: a `ral_gym` environment, best from `make_sb3_env`.
        learning_rate: Adam's.
        n_steps: capacity of the buffer per environment; None: T. A round is one finished episode per environment.
        gamma: discount; 1 lets the first code see a terminal reward as well as the last.
        baseline: `none` (as the paper), `mean` or `leave_one_out` over the batch's episodes of the same start and
            stop, or `value` (the value head, trained alongside).
        normalize_advantage: divide the advantages by their standard deviation over the batch.
        mle_coef: weight of a maximum-likelihood loss on real codes, a batch as large as the round, in every update.
        kl_coef: weight of KL(policy || the policy's starting weights), exact over K, mean over drawn codes.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss (baseline `value` only).
        max_grad_norm: gradient clipping.
        batch_size: transitions per forward and backward pass; gradients are summed over passes. None: all at once.
        fast_path: draw whole images at once where all environments stand alike; False: step by step. Both give the
            same codes, rewards and update from the same seed.
        rollout_buffer_class: `EpisodeRolloutBuffer`.
        rollout_buffer_kwargs: its arguments.
        stats_window_size: episodes in the rollout averages.
        tensorboard_log: folder.
        policy_kwargs: `PixelCNNPolicy`'s arguments, such as ``{"prior": "runs/demo"}``.
        verbose: SB3's.
        seed: seeds everything.
        device: SB3's.
        _init_setup_model: SB3's.

    Raises:
        ConfigError: an unknown baseline, or a maximum-likelihood share without real codes.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"PixelCNNPolicy": PixelCNNPolicy}
    rollout_buffer: EpisodeRolloutBuffer
    policy: PixelCNNPolicy

    def __init__(
        self,
        policy: str | type[PixelCNNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int | None = None,
        gamma: float = 1.0,
        baseline: Baseline = "leave_one_out",
        normalize_advantage: bool = True,
        mle_coef: float = 0.0,
        kl_coef: float = 0.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 1.0,
        batch_size: int | None = None,
        fast_path: bool = True,
        rollout_buffer_class: type[EpisodeRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if baseline not in BASELINES:
            raise ConfigError(f"baseline {baseline!r} is unknown: choose one of {', '.join(BASELINES)}")
        self.baseline, self.normalize_advantage = baseline, normalize_advantage
        self.mle_coef, self.kl_coef = mle_coef, kl_coef
        self.batch_size, self.fast_path = batch_size, fast_path
        self._reference: PixelCNN | None = None
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps or 0,
            gamma=gamma,
            gae_lambda=1.0,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=rollout_buffer_class or EpisodeRolloutBuffer,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Discrete,),
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.n_steps = self.n_steps or int(self.observation_space.shape[0])  # type: ignore[index]
        super()._setup_model()
        self._real_codes: np.ndarray | None = None
        if self.mle_coef and self.env is not None:
            self._real_codes = real_codes(self.env)
            if self._real_codes is None:
                raise ConfigError("mle_coef needs real codes, but the environment has none: use a run's environment")
        if self.kl_coef:
            self._reference = PixelCNN(**self.policy.prior.config).to(self.device).eval().requires_grad_(False)
            self._reference.load_state_dict(self.policy.prior.state_dict())

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_reference", "_real_codes"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, *(["_reference"] if self._reference is not None else [])], tensors

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """One round: until every environment has finished the episode it is in."""
        assert self._last_obs is not None, "No previous observation was provided"
        left = (self._last_obs == rollout_buffer.not_drawn).sum(1)  # type: ignore[union-attr]
        alike = bool((self._last_obs == rollout_buffer.not_drawn).std(0).max() == 0)  # type: ignore[union-attr]
        if self.fast_path and alike and isinstance(env, CodeVecEnv):
            return self._collect_round(env, callback, rollout_buffer)
        return super().collect_rollouts(env, callback, rollout_buffer, int(left.max()))

    def _collect_round(self, env: CodeVecEnv, callback: BaseCallback, rollout_buffer: EpisodeRolloutBuffer) -> bool:
        """The whole-image fast path: the sampler draws all codes, then the environment does its bookkeeping.

        ``callback.on_step`` is called once for the round.
        """
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        obs: np.ndarray = self._last_obs  # type: ignore[assignment]
        codes, values, log_probs = self.policy.draw_round(
            torch.as_tensor(obs, device=self.device), with_values=self.baseline == "value"
        )
        new_obs, rewards, dones, infos = env.step_round(codes.to(env.core.device))
        self.num_timesteps += int((obs == rollout_buffer.not_drawn).sum())
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        self._update_info_buffer(infos, dones)
        rollout_buffer.add_round(
            obs, codes.cpu().numpy(), rewards, values.cpu().numpy(), log_probs.cpu().numpy()
        )
        self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
        rollout_buffer.compute_returns_and_advantage()
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _advantages(self) -> np.ndarray:
        """(N,) advantages of the buffer's transitions."""
        buffer = self.rollout_buffer
        mask = buffer.mask
        returns = np.zeros(mask.shape, np.float32)
        returns[mask] = buffer.returns
        if self.baseline == "value":
            advantages = buffer.advantages
        elif self.baseline == "none":
            advantages = returns[mask]
        else:
            _, group = np.unique(np.stack([buffer.start, buffer.stop]), axis=1, return_inverse=True)
            baseline = batch_baseline(returns, mask, group.reshape(-1), self.baseline == "leave_one_out")
            advantages = (returns - baseline)[mask]
        if self.normalize_advantage:
            advantages = advantages / (advantages.std() + 1e-8)
        return advantages

    def train(self) -> None:
        """One update from the finished episodes of the round."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        buffer = self.rollout_buffer
        advantages, returns, old_log_probs = self._advantages(), buffer.returns, buffer.log_probs
        lengths = buffer.stop - buffer.start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.policy.optimizer.zero_grad()
        sums: dict[str, float] = {}
        for rows in self._chunks(lengths):
            flat = slice(offsets[rows[0]], offsets[rows[-1] + 1])
            loss, figures = self._loss(rows, advantages[flat], returns[flat], old_log_probs[flat], len(advantages))
            loss.backward()
            for name, figure in figures.items():
                sums[name] = sums.get(name, 0.0) + figure
        if self.mle_coef:
            sums["mle_loss"] = self._mle_backward(len(lengths))
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        self._n_updates += 1
        sums |= {"grad_norm": norm.item(), "advantage_std": float(advantages.std())}
        sums["n_updates"] = self._n_updates
        for name, figure in sums.items():
            self.logger.record(f"train/{name}", figure)

    def _chunks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Consecutive episodes of at most `batch_size` transitions (at least one episode each)."""
        if self.batch_size is None:
            return [np.arange(len(lengths))]
        label = (np.cumsum(lengths) - lengths) // max(self.batch_size, 1)
        return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(label)) + 1)

    def _loss(
        self, rows: np.ndarray, advantages: np.ndarray, returns: np.ndarray, old_log_probs: np.ndarray, total: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The share of some episodes in the loss, and in the logged means over all `total` transitions."""
        episodes = self.rollout_buffer.episodes(rows)
        features, position, stop = self.policy._features(episodes)
        logits = self.policy.prior.logits(features)  # (N, K)
        log_probs = logits.log_softmax(1)
        actions = episodes.codes[episodes.row, episodes.pos]
        log_prob = log_probs.gather(1, actions[:, None]).squeeze(1)  # (N,)
        entropy = -(log_probs.exp() * log_probs).sum(1)  # (N,)
        weights = torch.as_tensor(advantages, device=self.device)
        policy_loss = -(weights * log_prob).sum() / total
        loss = policy_loss - self.ent_coef * entropy.sum() / total
        figures = {"policy_gradient_loss": policy_loss.item(), "entropy_loss": -entropy.sum().item() / total}
        with torch.no_grad():
            log_ratio = log_prob - torch.as_tensor(old_log_probs, device=self.device)
            figures["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).sum().item() / total
        if self.baseline == "value":
            values = self.policy._values(features, position, stop).flatten()
            value_loss = F.mse_loss(values, torch.as_tensor(returns, device=self.device), reduction="sum") / total
            loss = loss + self.vf_coef * value_loss
            figures["value_loss"] = value_loss.item()
        if self._reference is not None:
            with torch.no_grad():
                length = -(-episodes.length // self._reference.width) * self._reference.width
                reference = self._reference(episodes.codes[:, :length])[episodes.row, episodes.pos].log_softmax(1)
            divergence = (log_probs.exp() * (log_probs - reference)).sum() / total
            loss = loss + self.kl_coef * divergence
            figures["kl_to_prior"] = divergence.item()
        figures["loss"] = loss.item()
        return loss, figures

    def _mle_backward(self, n_images: int) -> float:
        """Gradient of the maximum-likelihood share, on a batch of real codes."""
        assert self._real_codes is not None
        rows = np.random.randint(len(self._real_codes), size=n_images)
        codes = torch.as_tensor(self._real_codes[rows].astype(np.int64), device=self.device)  # (B, T)
        loss = F.cross_entropy(self.policy.prior(codes).flatten(0, 1), codes.flatten())
        (self.mle_coef * loss).backward()
        return loss.item()

    def learn(
        self: SelfReinforce,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "Reinforce",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfReinforce:
        """Train for at least `total_timesteps` drawn codes; SB3's arguments."""
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )
