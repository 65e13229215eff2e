"""Progress of training in an environment: a progress bar, and learning curves over images."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from ral_gym.runs.progress import progress_bar

CURVE_POINTS = 32


class EpisodeProgress(BaseCallback):
    """Collects the environment's reward of every finished image, and shows the mean of the last ones.

    Args:
        images: total number of images to draw.
        label: label of the bar.
        quiet: show no bar.
        divergence: also collect each rollout's estimate of KL(policy || oracle), from log o - log pi of its codes.
    """

    def __init__(self, images: int, label: str, quiet: bool, divergence: bool = False) -> None:
        super().__init__()
        self.rewards: list[float] = []
        self.divergences: list[float] | None = [] if divergence else None
        self._images, self._label, self._quiet = images, label, quiet

    def _on_training_start(self) -> None:
        self._bar = progress_bar(total=self._images, desc=self._label, unit="img", disable=self._quiet)

    def _on_step(self) -> bool:
        finished = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        if finished:
            self.rewards += finished
            self._bar.set_postfix(reward=f"{np.mean(self.rewards[-100:]):.3f}", refresh=False)
            self._bar.update(len(finished))
        return True

    def _on_rollout_end(self) -> None:
        if self.divergences is not None:
            new = len(self.rewards) - len(self.divergences)
            self.divergences += [-float(self.model.rollout_buffer.rewards.mean())] * new  # type: ignore[attr-defined]

    def _on_training_end(self) -> None:
        self._bar.close()

    def curve(self) -> dict[str, list[float]]:
        """Means over consecutive parts of the images, by the number of images drawn at the end of each part."""
        points = min(CURVE_POINTS, len(self.rewards))
        shares = {"reward": self.rewards} | ({"kl": self.divergences} if self.divergences else {})
        means = {
            name: [float(np.mean(share)) for share in np.array_split(np.array(values), points)]
            for name, values in shares.items()
        }
        drawn = np.cumsum([len(share) for share in np.array_split(np.array(self.rewards), points)])
        return {"images": drawn.tolist()} | means
