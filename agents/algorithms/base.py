"""The base of policy gradients on whole images: a round of episodes per update, the fast path, two regularisers.

`Reinforce` and `GRPO` differ in their advantages and in the loss of a code; everything else is here. Both are
Stable-Baselines3 algorithms: callbacks, loggers, save and load work as they do for `PPO`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, TypedDict

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ral_gym.agents.algorithms import passes
from ral_gym.agents.algorithms.passes import Figures, Precision, autocast, in_32_bits, in_64_bits, look
from ral_gym.agents.episodes import EpisodeRolloutBuffer, Episodes
from ral_gym.agents.policy import PriorPolicy, PriorWeights
from ral_gym.agents.real_codes import real_codes_loss
from ral_gym.agents.spaces import sequence_shape
from ral_gym.agents.vec_env import CodeVecEnv, check_code_env, real_codes
from ral_gym.errors import ConfigError
from ral_gym.priors.base import Prior
from ral_gym.priors.transfer import numbers, sent


class EpisodeArguments(TypedDict, total=False):
    """The keyword arguments that `Reinforce` and `GRPO` pass to `EpisodeAlgorithm`, which documents them."""

    gamma: float
    mle_coef: float
    mle_dropout: bool
    kl_coef: float
    ent_coef: float
    max_grad_norm: float
    batch_size: int | None
    mixed_precision: Precision
    fast_path: bool
    rollout_buffer_class: type[EpisodeRolloutBuffer] | None
    rollout_buffer_kwargs: dict[str, Any] | None
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: torch.device | str
    _init_setup_model: bool


class EpisodeAlgorithm(OnPolicyAlgorithm):
    """The base of `Reinforce` and `GRPO`: one round of whole episodes per update, `n_epochs` optimizer steps on it.

    An algorithm of your own defines `advantages`, and `policy_loss` if it differs from REINFORCE's.

    Args:
        policy: `PriorPolicy` (the class or its name).
        env: a `ral_gym` environment, best from `make_sb3_env`.
        learning_rate: Adam's.
        n_steps: capacity of the buffer per environment; None: T. A round is one finished episode per environment.
        gamma: discount; 1 lets the first code see a terminal reward as well as the last.
        mle_coef: weight of a maximum-likelihood loss on real codes, a batch as large as the round, in every update.
        mle_dropout: with the prior's dropout in that loss.
        kl_coef: weight of KL(policy || the policy's starting weights), mean over drawn codes: exact over K, or an
            estimate where the algorithm says so.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss, if the algorithm has one.
        max_grad_norm: gradient clipping.
        batch_size: transitions per forward and backward pass; gradients are summed over passes. None: all at once.
        mixed_precision: `bf16`: the passes of updates run under autocast. Weights, optimizer, log-softmax and drawing
            stay in 32 bits. The ratio compares passes of one kind: the drawn codes' log-probabilities are computed
            again, so that it starts at 1.
        fast_path: draw whole images at once if all environments are at the same position; False: step by step. Both
            give the same codes, rewards and update from the same seed.
        rollout_buffer_class: `EpisodeRolloutBuffer`.
        rollout_buffer_kwargs: its arguments.
        stats_window_size: episodes in the rollout averages.
        tensorboard_log: folder.
        policy_kwargs: `PriorPolicy`'s arguments, such as ``{"prior": "runs/demo"}``.
        verbose: as in SB3.
        seed: seeds everything.
        device: as in SB3.
        _init_setup_model: as in SB3.

    Raises:
        ConfigError: `mle_coef` without real codes, or an environment that does not show whole episodes.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"PriorPolicy": PriorPolicy, "PixelCNNPolicy": PriorPolicy}
    rollout_buffer: EpisodeRolloutBuffer
    policy: PriorPolicy
    n_epochs = 1
    needs_values = False

    def __init__(
        self,
        policy: str | type[PriorPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int | None = None,
        *,
        gamma: float = 1.0,
        mle_coef: float = 0.0,
        mle_dropout: bool = False,
        kl_coef: float = 0.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.0,
        max_grad_norm: float = 1.0,
        batch_size: int | None = None,
        mixed_precision: Precision = "no",
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
        if isinstance(env, VectorEnv):
            raise ConfigError(f"{type(env).__name__} is not a Stable-Baselines3 VecEnv: use make_sb3_env(id, n_envs)")
        passes.check_policy(policy, self.policy_aliases, type(self).__name__)
        self.mle_coef, self.mle_dropout, self.kl_coef = mle_coef, mle_dropout, kl_coef
        self.batch_size, self.fast_path = batch_size, fast_path
        self.mixed_precision = passes.checked_precision(mixed_precision)
        self._reference: Prior | None = None
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
            supported_action_spaces=(spaces.Discrete,),
            _init_setup_model=False,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if self.env is not None:
            check_code_env(self.env)
        shape = sequence_shape(self.observation_space, self.action_space)
        self.n_steps = self.n_steps or (0 if shape is None else shape.n_codes)
        super()._setup_model()
        self._real_codes: np.ndarray | None = None
        if self.mle_coef and self.env is not None:
            self._real_codes = real_codes(self.env)
            if self._real_codes is None:
                raise ConfigError("mle_coef needs real codes, but the environment has none: use a run's environment")
        if self.kl_coef:
            self._reference = PriorWeights.of(self.policy.prior).build().to(self.device).eval().requires_grad_(False)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_reference", "_real_codes"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, *(["_reference"] if self._reference is not None else [])], tensors

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """One round: until every environment has finished the episode it is in.

        If the callback stops it, the next `learn` begins with a reset of the environments.

        Raises:
            ConfigError: observations without anything to draw, such as those of a wrapper that delays them.
        """
        assert self._last_obs is not None, "No previous observation was provided"
        to_draw = self._last_obs == rollout_buffer.not_drawn  # (E, L)
        left = to_draw.sum(1)
        if not left.all():
            raise ConfigError(
                f"environment {left.argmin()} shows nothing to draw (no token {rollout_buffer.not_drawn}): remove "
                "wrappers that change observations, and make VecNormalize with norm_obs=False"
            )
        if self.fast_path and isinstance(env, CodeVecEnv) and bool((to_draw == to_draw[0]).all()):
            went_on = self._collect_round(env, callback, rollout_buffer)
        else:
            went_on = super().collect_rollouts(env, callback, rollout_buffer, int(left.max()))
        if not went_on:
            self._last_obs = None
            rollout_buffer.forget_stop()
        return went_on

    def _collect_round(self, env: CodeVecEnv, callback: BaseCallback, rollout_buffer: EpisodeRolloutBuffer) -> bool:
        """The whole-image fast path: the sampler draws all codes, then the environment does its bookkeeping.

        ``callback.on_step`` is called once for the round.
        """
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        obs: np.ndarray = self._last_obs  # type: ignore[assignment]
        drawn = self.policy.draw_round(torch.from_numpy(obs), with_values=self.needs_values)
        # One transfer for everything: codes are whole numbers below 2**15, which float32 holds exactly.
        codes, values, log_probs = torch.stack([part.float() for part in drawn]).cpu().numpy()  # (E, L) each
        codes = codes.astype(np.int64)
        new_obs, rewards, dones, infos = env.step_round(codes)
        self.num_timesteps += int((obs == rollout_buffer.not_drawn).sum())
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        self._update_info_buffer(infos, dones)
        if env.world.oracle is not None:  # every code got its reward when it was drawn
            rewards = np.stack([info["step_rewards"] for info in infos])  # (E, T)
        rollout_buffer.add_round(obs, codes, rewards, values, log_probs)
        self._last_obs, self._last_episode_starts = new_obs, dones
        rollout_buffer.compute_returns_and_advantage()
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def advantages(self) -> np.ndarray:
        """The advantages of the buffer's N transitions, (N,) float32: the hook for an algorithm of your own.

        `rollout_buffer` holds the round: `returns`, `advantages` and `log_probs` (N,) of its transitions in this order,
        and `codes` and `mask` (n, L), `start` and `stop` (n,) of its n episodes; L is T, or T + 1 with a label.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define advantages()")

    def policy_loss(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, row: Tensor
    ) -> tuple[Tensor, Figures]:
        """The loss of every transition, another hook; here -A log pi, whose gradient is REINFORCE's (Eq. 2).

        Args:
            log_prob: (N,) of the drawn codes, under the policy now.
            old_log_prob: (N,) when they were drawn.
            advantages: (N,) as `advantages` gave them.
            row: (N,) int64, the episode that each belongs to.

        Returns:
            losses (N,), and numbers for the log, summed over the transitions: floats, or scalars on the device.
        """
        return -(advantages * log_prob), {}

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint of stage 3 must hold besides policy, optimizer and buffer: numbers, tensors, dicts."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `extra_state`."""

    def _prior_kl(self, log_probs: Tensor, log_prob: Tensor, reference: Tensor, actions: Tensor) -> Tensor:
        """KL(policy || start) at every transition, from log-probabilities (N, K); `log_prob` (N,) of the `actions`."""
        return (log_probs.exp() * (log_probs - reference)).sum(1)

    def _value_loss(self, features: Tensor, position: Tensor, stop: Tensor, returns: Tensor) -> Tensor | None:
        """Squared errors of the value head (N,), or None without one."""
        return None

    def _expected_loss(self, rows: np.ndarray, episodes: Episodes, log_probs: Tensor) -> Tensor | None:
        """What is added to the losses (N,) of transitions with log-probabilities (N, K), or None."""
        return None

    def _stop_early(self, figures: Figures) -> bool:
        """Whether to skip the remaining epochs; reading a figure of an epoch waits for the device."""
        return False

    def train(self) -> None:
        """An update from the finished episodes of the round: one optimizer step per epoch."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        advantages, old_log_probs = self.advantages(), self._old_log_probs()
        epochs: list[Figures] = []
        for _ in range(self.n_epochs):
            epochs.append(self._epoch(advantages, old_log_probs))
            self._n_updates += 1
            if self._stop_early(epochs[-1]):
                break
        found = numbers([figures[name] for name in epochs[0] for figures in epochs])
        for number, name in enumerate(epochs[0]):
            own = found[number * len(epochs) : (number + 1) * len(epochs)]
            self.logger.record(f"train/{name}", sum(own) / len(own))
        self.logger.record("train/advantage_std", float(advantages.std()))
        self.logger.record("train/n_updates", self._n_updates)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for at least `total_timesteps` drawn codes; SB3's arguments. TensorBoard shows the class's name."""
        name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _old_log_probs(self) -> np.ndarray:
        """Log-probabilities (N,) of the round's codes before its update, as the update's own passes compute them."""
        buffer = self.rollout_buffer
        if self.mixed_precision == "no":
            return buffer.log_probs
        processes, lengths = self.policy.processes, buffer.lengths
        with torch.no_grad():
            parts = [buffer.episodes(rows) for rows in self._chunks(lengths)]
            found = [look(self.policy, episodes, self.mixed_precision).log_prob for episodes in parts]
        sizes = [int(lengths[processes.share_of(len(lengths), rank)].sum()) for rank in range(processes.size)]
        return processes.gather(torch.cat(found), sizes).cpu().numpy()

    def _epoch(self, advantages: np.ndarray, old_log_probs: np.ndarray) -> Figures:
        """One optimizer step on all episodes; gradients are summed over chunks of them, and over processes."""
        buffer = self.rollout_buffer
        returns, lengths = buffer.returns, buffer.lengths
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        processes = self.policy.processes
        share = processes.share(len(lengths))
        counts = 1.0 if share.stop > share.start else 0.0  # see `Processes.rows`
        self.policy.optimizer.zero_grad()
        sums: Figures = {}
        for rows in self._chunks(lengths):
            flat = slice(offsets[rows[0]], offsets[rows[-1] + 1])
            loss, figures = self._loss(rows, advantages[flat], returns[flat], old_log_probs[flat], len(advantages))
            (counts * loss).backward()
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + counts * value
        if self.mle_coef:
            sums["mle_loss"] = self._mle_backward(len(lengths))
        processes.sum_gradients(self.policy.parameters())
        if processes.size > 1:
            sums = dict(processes.sum_numbers(dict(zip(sums, numbers(list(sums.values())), strict=True))))
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        return sums | {"grad_norm": norm}

    def _chunks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """This process's episodes, in parts of at most `batch_size` transitions (at least one episode each)."""
        own = np.arange(len(lengths))[self.policy.processes.rows(len(lengths))]
        if self.batch_size is None:
            return [own]
        label = (np.cumsum(lengths[own]) - lengths[own]) // max(self.batch_size, 1)
        return np.split(own, np.flatnonzero(np.diff(label)) + 1)

    def _loss(
        self, rows: np.ndarray, advantages: np.ndarray, returns: np.ndarray, old_log_probs: np.ndarray, total: int
    ) -> tuple[Tensor, Figures]:
        """The share of some episodes in the loss, and in the logged means over all `total` transitions."""
        episodes = self.rollout_buffer.episodes(rows)
        features, position, stop, log_probs, log_prob, actions = look(self.policy, episodes, self.mixed_precision)
        entropy = -(log_probs.exp() * log_probs).sum(1)  # (N,)
        old_log_prob = sent(old_log_probs, self.device)
        losses, logged = self.policy_loss(log_prob, old_log_prob, sent(advantages, self.device), episodes.row)
        expected = self._expected_loss(rows, episodes, log_probs)
        policy_loss = (losses if expected is None else losses + expected).sum() / total
        loss = policy_loss - self.ent_coef * entropy.sum() / total
        figures: Figures = {name: in_64_bits(value) / total for name, value in logged.items()}
        figures |= {"policy_gradient_loss": in_64_bits(policy_loss), "entropy_loss": -in_64_bits(entropy.sum()) / total}
        with torch.no_grad():
            log_ratio = log_prob - old_log_prob
            figures["approx_kl"] = in_64_bits((log_ratio.exp() - 1 - log_ratio).sum()) / total
        value_losses = self._value_loss(features, position, stop, sent(returns, self.device))
        if value_losses is not None:
            value_loss = value_losses.sum() / total
            loss = loss + self.vf_coef * value_loss
            figures["value_loss"] = in_64_bits(value_loss)
        if self._reference is not None:
            with torch.no_grad(), autocast(self.policy, self.mixed_precision):
                reference = self.policy.episode_logits(episodes, network=self._reference)
            reference = in_32_bits(reference).log_softmax(1)  # (N, K)
            divergence = self._prior_kl(log_probs, log_prob, reference, actions).sum() / total
            loss = loss + self.kl_coef * divergence
            figures["kl_to_prior"] = in_64_bits(divergence)
        figures["loss"] = in_64_bits(loss)
        return loss, figures

    def _mle_backward(self, n_images: int) -> Tensor | float:
        """Gradient of the maximum-likelihood term, on a batch of real codes."""
        assert self._real_codes is not None
        with autocast(self.policy, self.mixed_precision):
            loss = real_codes_loss(self.policy, self._real_codes, n_images, self.mle_dropout)
        (self.mle_coef * loss).backward()
        return in_64_bits(loss)
