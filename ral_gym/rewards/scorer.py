"""Codes -> scores -> rewards by a critic, the same way in training and in environments with a frozen critic.

The interface of a critic (everything but `forward` is optional):

    class Mine(nn.Module):
        sees = "pixels"                      # or "codes", "features": what forward takes
        def forward(self, seen): ...         # -> (B,), a map (B, h, w), or a score per code (B, codes_of(r))
        def loss(self, real, fake, generator): ...          # -> loss, scalars for the log; else config.critic.loss
        loss_is_mean = True                  # else False, see below
        def image_scores(self, scores): ...                 # -> (B,); else the mean
        def scores_to_rewards(self, scores, rows, reward): ...  # -> (B, codes_of(r)); else `step_rewards`
        def row_multiple(self, code_rows): ...              # short images have a multiple of so many rows; else 1
        def make_optimizer(self, config): ...               # else Adam by the settings of `critic`

`pixels`: images (B, C, h, S) in [-1, 1]; `codes`: (B, codes_of(r)) int64, nothing is decoded for it; `features`:
(B, F) float32 of the tokenizer's encoder or of the extractor that `ral.reward_features` names. Images of fewer rows are
shorter. A `forward` or `loss` with an argument `labels` gets the images' classes (B,) int64 by that name, and nothing
where they are not known: let it be None by default. A batch for `loss` has real and fake images of the same classes in
the same order. `loss_is_mean` says that `loss` is a mean over the images of a batch, and that it draws no numbers but
those of `nn.Dropout` and `F.dropout`: several processes then share its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ral_gym.errors import ConfigError
from ral_gym.grid import CodeGrid
from ral_gym.rewards.score_map import RewardKind, ScoreNormalizer, step_rewards
from ral_gym.rewards.view import Sees, View, sees_of, takes_labels
from ral_gym.tokenizers.base import Tokenizer, device_of, encoder_features

if TYPE_CHECKING:  # the quantiser's library takes seconds to import
    from ral_gym.metrics import Extractor


class CriticScorer:
    """Codes -> what the critic sees -> scores -> rewards.

    Args:
        vqvae: decodes.
        critic: scores.
        reward: `single` or `intermediate`.
        normalizer: normalises the scores; None: raw scores.
        batch_size: images decoded and scored at once.
        extractor: for a critic that sees features; None: the tokenizer's encoder, averaged over space.

    Raises:
        ConfigError: unknown `sees`, or features that are not available.
    """

    def __init__(
        self,
        vqvae: Tokenizer,
        critic: nn.Module,
        reward: RewardKind = "single",
        normalizer: ScoreNormalizer | None = None,
        batch_size: int = 256,
        extractor: Extractor | None = None,
    ) -> None:
        self.vqvae, self.critic, self.reward = vqvae, critic, reward
        self.normalizer = normalizer or ScoreNormalizer("none")
        self.batch_size = batch_size
        self.sees: Sees = sees_of(critic, f"critic {type(critic).__name__}")
        self.extractor = require_encoder_features(vqvae) if extractor is None and self.sees == "features" else extractor

    @property
    def grid(self) -> CodeGrid:
        """The shape of the codes."""
        return self.vqvae.grid

    @property
    def device(self) -> torch.device:
        """Where the critic is."""
        weights = next(self.critic.parameters(), None)
        return device_of(self.vqvae) if weights is None else weights.device

    @property
    def dense(self) -> bool:
        """Whether every code has its own reward, rather than the last code the image's."""
        return self.reward == "intermediate" or hasattr(self.critic, "scores_to_rewards")

    def decode(self, codes: Tensor) -> Tensor:
        """Codes of r rows (B, codes_of(r)) -> images (B, C, h, S) in [-1, 1], on the device."""
        return self.vqvae.decode(codes.to(self.device).long())

    def view(self, codes: Tensor, labels: Tensor | None = None) -> View:
        """A view of images, from their codes of r rows (B, codes_of(r)) and their classes (B,), if any."""
        return View(codes, self.decode, labels, batch_size=self.batch_size)

    def seen(self, view: View) -> Tensor:
        """What the critic sees of images, on the device."""
        if self.sees == "codes":
            return view.codes.to(self.device)  # (B, codes_of(r))
        if self.sees == "pixels":
            return view.pixels  # (B, C, h, S)
        assert self.extractor is not None
        return view.features(self.extractor).to(self.device)  # (B, F)

    @torch.no_grad()
    def scores(self, view: View) -> Tensor:
        """Raw scores of a view's images: (B, h, w), (B, codes_of(r)) or (B,), as the critic gives them."""
        return self.scores_of(self.seen(view), view.labels)

    @torch.no_grad()
    def scores_of(self, seen: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raw scores of what the critic sees (B, ...), of images of these classes (B,), if any."""
        self.critic.eval()
        if labels is None or not takes_labels(self.critic):
            return torch.cat([self.critic(batch) for batch in seen.split(self.batch_size)])
        parts = zip(seen.split(self.batch_size), labels.to(seen.device).split(self.batch_size), strict=True)
        return torch.cat([self.critic(batch, labels=classes) for batch, classes in parts])

    def check_rows(self, codes: Tensor, rows: int, labels: Tensor | None = None) -> None:
        """Refuse a critic that cannot see short images, before an episode is drawn.

        Args:
            codes: (1, T) integer, of any image.
            rows: fewest rows that an image may have.
            labels: (1,) the image's class, if any.

        Raises:
            ConfigError: its `forward` fails on the first `rows` rows.
        """
        seen = self.seen(self.view(self.grid.crop(codes, rows)))
        try:
            self.scores_of(seen, labels)
        except RuntimeError as error:
            name, reason = type(self.critic).__name__, (str(error).strip() or "no reason given").splitlines()[0]
            raise ConfigError(
                f"critic {name} fails on what it sees of {rows} of {self.grid.height} rows ({reason}): give it a "
                f"row_multiple that returns code_rows, or choose --ral.reset-mode full"
            ) from error

    def image_scores(self, scores: Tensor) -> Tensor:
        """Scores (B, ...) -> one per image (B,)."""
        own = getattr(self.critic, "image_scores", None)
        return own(scores) if own is not None else scores.reshape(len(scores), -1).mean(1)

    def rewards(self, scores: Tensor, rows: int) -> Tensor:
        """Normalised scores of images of `rows` rows -> the reward of every code (B, codes_of(rows)).

        Raises:
            ConfigError: the scores have a shape that gives no rewards.
        """
        own, length = getattr(self.critic, "scores_to_rewards", None), self.grid.codes_of(rows)
        if own is not None:
            earned = own(scores, rows, self.reward)
            if earned.shape != (len(scores), length):
                raise ConfigError(
                    f"the critic's scores_to_rewards gave shape {tuple(earned.shape)}: give ({len(scores)}, {length}), "
                    "one reward per code"
                )
            return earned
        if scores.dim() == 2:
            if self.reward == "intermediate":
                return self._per_code(scores, rows)
            return F.pad(self._per_code(scores, rows).mean(1, keepdim=True), (length - 1, 0))  # (B, codes_of(rows))
        return step_rewards(_as_map(scores), rows, self.grid.width, self.reward, self.grid.levels)

    def score_map(self, scores: Tensor, rows: int) -> Tensor:
        """Scores of images of `rows` rows as a map (B, h, w): scores per code by their place in the (top) grid."""
        if scores.dim() != 2:
            return _as_map(scores)
        levels = self.grid.split(self._per_code(scores, rows))
        top, *others = [level.reshape(len(scores), rows * 2**i, -1) for i, level in enumerate(levels)]
        if not others:
            return top
        below = F.avg_pool2d(others[0].unsqueeze(1), 2).squeeze(1)  # (B, r, W) means of the 4 bottom codes
        return (top + 4 * below) / 5

    def _per_code(self, scores: Tensor, rows: int) -> Tensor:
        if scores.shape[1] != self.grid.codes_of(rows):
            raise ConfigError(
                f"the critic gave scores of shape {tuple(scores.shape)}: give one per image (B,), a map (B, h, w), or "
                f"one per code (B, {self.grid.codes_of(rows)}) for {rows} rows"
            )
        return scores

    def score(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raw scores of codes of r rows (B, codes_of(r)) and their classes (B,), as the critic gives them."""
        return self.scores(self.view(codes, labels))

    def __call__(self, codes: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes of r rows (B, codes_of(r)) int64 -> normalised score map (B, h, w), step rewards of that shape."""
        scores, rows = self.normalizer(self.score(codes, labels)), self.grid.rows_of(codes.shape[1])
        return self.score_map(scores, rows), self.rewards(scores, rows)


def _as_map(scores: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1); maps (B, h, w) as they are.

    Raises:
        ConfigError: another shape.
    """
    if scores.dim() == 1:
        return scores[:, None, None]
    if scores.dim() != 3:
        raise ConfigError(
            f"the critic gave scores of shape {tuple(scores.shape)}: give one per image (B,), a map (B, h, w), or one "
            "per code (B, codes)"
        )
    return scores


def require_encoder_features(vqvae: Any) -> Extractor:
    """The tokenizer's own encoder, averaged over space.

    Raises:
        ConfigError: it has no `encode_features`.
    """
    found = encoder_features(vqvae)
    if found is None:
        raise ConfigError(
            f"{type(vqvae).__name__} has no encode_features to take features from: choose --ral.reward-features pyramid"
        )
    return found


def find_features(name: str, vqvae: Any, device: torch.device | str = "cpu") -> Extractor | None:
    """The extractor that `ral.reward_features` names; None: `encoder`, and the tokenizer has none or is not given.

    Raises:
        ConfigError: an unknown name, or what the extractor needs is not installed.
    """
    if name == "encoder":
        return None if vqvae is None else encoder_features(vqvae)
    from ral_gym.metrics import make_extractor

    return make_extractor(name, device=device)
