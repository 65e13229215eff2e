"""Callbacks for RAL with an oracle of known likelihoods in place of the data (Section 5.2).

`OracleReward` trains on the true reward, an upper bound for any critic with as many images. `OracleCurve` measures the
averaged policy during training, for Figure 4, and the correlation of a reward with the true one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from ral_gym.agents.callbacks import RunCallback
from ral_gym.agents.episodes import EpisodeRolloutBuffer
from ral_gym.metrics import oracle_metrics
from ral_gym.priors.base import build_prior, config_of
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.runs.run import Run
from ral_gym.stages.pictures import sample_codes

STAGE = "oracle"
"""The stage of ``metrics.jsonl`` that holds the curve."""
METRICS = ("nll_oracle", "nll_test", "entropy", "kl_model_oracle")


def stations(n_updates: int, parts: int) -> list[int]:
    """Numbers of updates at equal intervals: 0, .., n_updates, at most `parts` + 1 of them."""
    return sorted({n_updates * part // parts for part in range(parts + 1)})


def log_ratio(oracle: PixelCNN, buffer: EpisodeRolloutBuffer) -> np.ndarray:
    """Log-ratio log o - log pi of each drawn code in a rollout of whole images: (n, T)."""
    device = next(oracle.parameters()).device
    with torch.no_grad():
        codes = torch.from_numpy(buffer.codes.astype(np.int64)).to(device)  # (n, T)
        log_probs = oracle(codes).log_softmax(-1).gather(2, codes[..., None]).squeeze(2)  # (n, T)
    return log_probs.cpu().numpy() - buffer.log_probs.reshape(codes.shape)


def curve_point(prior: PixelCNN, oracle: PixelCNN, oracle_codes: Tensor, seed: int) -> dict[str, float]:
    """A point of the curve, from as many samples of the model as of the oracle (N, T); see `METRICS`."""
    device = next(oracle.parameters()).device
    drawn = sample_codes(prior, len(oracle_codes), seed)
    measured = oracle_metrics(prior, oracle, drawn, oracle_codes, device=device)
    return {name: measured[name].value for name in METRICS}


class OracleReward(BaseCallback):
    """Replaces every reward by log o(code) - log pi(code), whose expected return is -KL(pi || o).

    In a callback list it comes after the callback whose rewards it replaces. Whole images only.

    Args:
        oracle: the network that plays the role of the data.
    """

    def __init__(self, oracle: PixelCNN) -> None:
        super().__init__()
        self.oracle = oracle

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        buffer.write_rewards(log_ratio(self.oracle, buffer).astype(np.float32))
        buffer.compute_returns_and_advantage()


class OracleCurve(BaseCallback):
    """Measures the averaged policy at equal intervals; in a callback list it comes last.

    Logs to the run, as stage `oracle`, `METRICS`, and `reward_correlation`: of an image's reward with its log o - log
    pi over the rollout.

    Args:
        run: the run to log to.
        bookkeeping: the stage's callback, which counts the updates and has the average.
        oracle: the network that plays the role of the data.
        oracle_codes: (N, T) int64, samples of it that were not used for training; the policy draws as many.
        parts: number of measurements after the start.
        seed: seeds the policy's samples; no global random state is changed.
    """

    def __init__(
        self, run: Run, bookkeeping: RunCallback, oracle: PixelCNN, oracle_codes: Tensor, parts: int, seed: int
    ) -> None:
        super().__init__()
        self.run, self.bookkeeping, self.oracle, self.oracle_codes = run, bookkeeping, oracle, oracle_codes
        self.stations, self.seed = stations(run.config.ral.n_updates, parts), seed
        self._measured = -1

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._measure()

    def _on_training_end(self) -> None:
        self._measure()

    def _on_rollout_end(self) -> None:
        updates = self.bookkeeping.updates
        if updates in self.stations:
            buffer: EpisodeRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
            rewards = np.zeros(buffer.mask.shape)  # (n, T)
            rewards[buffer.mask] = buffer.rewards
            totals, ratios = rewards.sum(1), log_ratio(self.oracle, buffer).sum(1)  # (n,), (n,)
            if totals.std() > 0 and ratios.std() > 0:
                self.run.log(STAGE, updates, {"reward_correlation": float(np.corrcoef(totals, ratios)[0, 1])})

    def _measure(self) -> None:
        updates, average = self.bookkeeping.updates, self.bookkeeping.average
        if updates not in self.stations or updates == self._measured:
            return
        assert average is not None
        self._measured, start = updates, "prior."
        policy: Any = self.model.policy
        with torch.random.fork_rng(devices=[]):
            network = build_prior(config_of(policy.prior))
        weights = average.weights.items()
        network.load_state_dict({name.removeprefix(start): w for name, w in weights if name.startswith(start)})
        network.eval().to(next(self.oracle.parameters()).device)
        self.run.log(STAGE, updates, curve_point(network, self.oracle, self.oracle_codes, self.seed))
