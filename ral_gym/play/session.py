"""One visitor's episode: the codes so far and everything that can be done to them. Knows no Gradio.

The random number of a position depends only on the seed, so an image is a function of model, seed, settings and of the
codes that were put in by hand: undoing and drawing again gives the same codes, and two models, or the same model with
and without a wrong code, draw from the same random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ral_gym.data.images import to_float
from ral_gym.errors import ConfigError
from ral_gym.play.models import Models
from ral_gym.priors.drawing import likeliest
from ral_gym.priors.guidance import PLAIN, Sampling
from ral_gym.stages.completion import seeded_uniforms
from ral_gym.tokenizers.base import device_of

LARGEST_SEED = 4_000_000
"""As `ral-gym train` takes them."""
MOST_UNDO = 200
"""How many steps back `undo` goes."""


@dataclass(frozen=True)
class State:
    """An episode at one moment; arrays in it are never written to.

    Attributes:
        codes: (T,) int64, K where nothing is drawn yet.
        rows: how many rows were given, of a photo.
        label: the class, in a world that has some.
        image: (C, S, S) uint8 of the photo whose rows were given, else None.
        real: which of the world's real images that is, if it is one.
        wrong: the positions of codes that were put in, in order.
        before: (T,) the codes as they were before the last wrong code, else None.
    """

    codes: np.ndarray
    rows: int = 0
    label: int | None = None
    image: Tensor | None = None
    real: int | None = None
    wrong: tuple[int, ...] = ()
    before: np.ndarray | None = None


@dataclass(frozen=True)
class Choice:
    """A code that may come next."""

    code: int
    probability: float
    """Under the distribution that the code is drawn from: after temperature, guidance, top-k and top-p."""


@dataclass(frozen=True)
class Score:
    """What the critic says of a finished image."""

    score_map: np.ndarray
    """(h, w) float32, higher is more real."""
    value: float
    """The return of the episode: the mean of the map."""


class Session:
    """An episode in a world, drawn by one of its generators.

    Args:
        models: the world and its generators.
        seed: decides the random numbers.
        generator: "MLE" or "RAL"; None: RAL if there is one.

    Attributes:
        state: the episode now.
        generator: who draws the next code.
        temperature: divides the logits.
        sampling: guidance, top-k and top-p.
        uniforms: (T,) float32, the random number of every position.
    """

    def __init__(self, models: Models, *, seed: int = 0, generator: str | None = None) -> None:
        self.models, self.grid = models, models.grid
        self.generator = generator or list(models.generators)[-1]
        self.temperature, self.sampling = 1.0, PLAIN
        self.set(generator=self.generator)
        self._past: list[State] = []
        self.reseed(seed)
        self.state = State(self._blank(), label=0 if self.grid.classes else None)

    # Settings -----------------------------------------------------------------------------------------------------

    def reseed(self, seed: int) -> None:
        """Take other random numbers from the next code on.

        Raises:
            ConfigError: not a whole number of 0 or more that seeds can be.
        """
        if not 0 <= seed <= LARGEST_SEED or seed != int(seed):
            raise ConfigError(f"seed is {seed}: give a whole number from 0 to {LARGEST_SEED}")
        self.seed = int(seed)
        self.uniforms = seeded_uniforms(self.seed, 1, self.grid.n_codes)[0].numpy()

    def set(
        self, *, generator: str | None = None, temperature: float | None = None, guidance: float | None = None
    ) -> None:
        """Change how the next codes are drawn; None: leave it.

        Raises:
            ConfigError: no such generator, or a value out of range.
        """
        if generator is not None and generator not in self.models.generators:
            raise ConfigError(f"model {generator!r} is unknown: choose one of {', '.join(self.models.generators)}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ConfigError(f"temperature is {temperature}: give a number above 0")
        sampling = self.sampling if guidance is None else Sampling(guidance)
        if sampling.guided and not self.models.can_guide:
            raise ConfigError(f"guidance is {guidance}: these models cannot be guided, leave it at 1")
        self.generator = generator or self.generator
        self.temperature, self.sampling = temperature or self.temperature, sampling

    # The episode --------------------------------------------------------------------------------------------------

    def start(self, label: int | None = None) -> None:
        """Begin an empty image, with classes of the class `label`; None: of the class as before."""
        self._become(State(self._blank(), label=self._label(label)))

    def start_from_real(self, index: int, rows: int, label: int | None = None) -> None:
        """Begin with the first rows of one of the world's real images.

        Args:
            index: which image.
            rows: rows of codes that are given, 1..H - 1.
            label: the class to draw, if there are classes; None: the image's own.

        Raises:
            ConfigError: there are no real images, no such one, or a number of rows out of range.
        """
        real = self.models.world.real_codes
        if real is None or not 0 <= index < len(real):
            raise ConfigError(f"real image {index}: there are {0 if real is None else len(real)}, counted from 0")
        sequence = real[index].astype(np.int64)
        whole = self.grid.without_labels(sequence)
        own = self.grid.labels_of(sequence)
        label = int(own) if label is None and own is not None else label
        image = self.models.world.decode(torch.from_numpy(whole)[None].to(self.models.world.device))[0].cpu()
        self._start_from(whole, rows, image, label, index)

    @torch.no_grad()
    def start_from_photo(self, image: Tensor, rows: int, label: int | None = None) -> None:
        """Begin with the first rows of a photo (C, S, S) uint8; only these are encoded, as an image that ends there.

        Raises:
            ConfigError: a number of rows out of range.
        """
        self._check_rows(rows)
        tokenizer = self.models.tokenizer
        shown = rows * tokenizer.image_size // tokenizer.grid.height  # pixel rows
        levels = tokenizer.encode(to_float(image[None, :, :shown]).to(device_of(tokenizer)))
        codes = self._blank()
        codes[self._rows_mask(rows)] = torch.cat(levels, 1)[0].cpu().numpy()
        self._start_from(codes, rows, image, label)

    def _start_from(
        self, codes: np.ndarray, rows: int, image: Tensor, label: int | None, real: int | None = None
    ) -> None:
        self._check_rows(rows)
        codes = np.where(self._rows_mask(rows), codes, self.grid.not_drawn)
        self._become(State(codes, rows, self._label(label), image, real))

    def change_rows(self, rows: int) -> None:
        """Begin again with more or fewer rows of the same photo; nothing happens in an episode without one.

        Raises:
            ConfigError: a number of rows out of range.
        """
        if self.state.real is not None:
            self.start_from_real(self.state.real, rows, self.state.label)
        elif self.state.image is not None:
            self.start_from_photo(self.state.image, rows, self.state.label)

    def next_real(self) -> int:
        """A real image for this seed, another one for the next seed; 0 without any."""
        real = self.models.world.real_codes
        n = 1 if real is None else len(real)
        return int(np.random.default_rng(n).permutation(n)[self.seed % n])

    def draw(self, n: int | None = 1, *, joined: bool = False) -> None:
        """Let the generator draw the next n codes; None: all that are left.

        Args:
            n: how many.
            joined: `undo` takes this back together with what was done before it.
        """
        if self.finished:
            return
        codes = self.continued(self.state.codes[None], self.uniforms[None], n)[0]
        self._become(replace(self.state, codes=codes), joined=joined)

    def choose(self, code: int) -> None:
        """Draw the next code by hand.

        Raises:
            ConfigError: it is no code, or the image is finished.
        """
        if self.finished:
            raise ConfigError("the image is finished: click a cell in it, or begin a new one")
        self._become(replace(self.state, codes=self._with(self.position, code)))

    def put_wrong(self, position: int, code: int | None = None) -> None:
        """Replace a code that is there by a wrong one; what was drawn after it has to be drawn again.

        Args:
            position: 0..T-1.
            code: which code; None: one that the generator finds unlikely there.

        Raises:
            ConfigError: nothing is drawn at this position, or it is no code.
        """
        before = self.state.codes
        if not 0 <= position < self.grid.n_codes or before[position] == self.grid.not_drawn:
            raise ConfigError(f"cell {position} is not drawn yet: click one that is")
        code = self._unlikely(position) if code is None else code
        codes = self._with(position, code)
        later = ~self.given & (np.arange(len(codes)) > position)
        codes[later] = self.grid.not_drawn
        wrong = (*(one for one in self.state.wrong if one < position or not later[one]), position)
        wrong = tuple(dict.fromkeys(wrong))
        self._become(replace(self.state, codes=codes, wrong=wrong, before=before))

    def undo(self) -> None:
        """Take the last step back; without one nothing happens."""
        if self._past:
            self.state = self._past.pop()

    # What can be seen ---------------------------------------------------------------------------------------------

    @property
    def codes(self) -> np.ndarray:
        """(T,) int64, K where nothing is drawn yet."""
        return self.state.codes

    @property
    def position(self) -> int:
        """The position of the next code; T when the image is finished."""
        return self.grid.n_codes if self.finished else int(np.argmax(self.codes == self.grid.not_drawn))

    @property
    def drawn(self) -> int:
        """How many codes are there."""
        return int((self.codes != self.grid.not_drawn).sum())

    @property
    def finished(self) -> bool:
        """Whether all codes are there."""
        return self.drawn == self.grid.n_codes

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to take back."""
        return bool(self._past)

    def distribution(self) -> Tensor:
        """The probabilities (K,) from which the next code is drawn.

        Raises:
            ConfigError: the image is finished.
        """
        if self.finished:
            raise ConfigError("the image is finished: no code comes next")
        return self._probabilities(self.codes)

    def choices(self, n: int) -> list[Choice]:
        """The n likeliest next codes, likeliest first."""
        best = self.distribution().sort(descending=True, stable=True)
        return [Choice(int(code), float(p)) for p, code in zip(best.values[:n], best.indices[:n], strict=True)]

    def score(self) -> Score | None:
        """The critic's score of the finished image; None before its end, or without a critic."""
        return self.score_of(self.codes) if self.finished else None

    @torch.no_grad()
    def score_of(self, codes: np.ndarray) -> Score | None:
        """The critic's score of any whole image (T,); None without a critic."""
        scorer = self.models.world.scorer
        if scorer is None:
            return None
        sequence = self.models.sequences(codes[None], self.state.label)
        labels = self.grid.labels_of(sequence)
        whole = self.grid.without_labels(sequence)
        score_map, _ = scorer(whole) if labels is None else scorer(whole, labels)
        return Score(score_map[0].float().cpu().numpy(), float(score_map[0].float().mean()))

    @property
    def given(self) -> np.ndarray:
        """(T,) bool: the codes that were given, of a photo."""
        return self._rows_mask(self.state.rows)

    def beginning(self) -> np.ndarray:
        """The episode's first codes (T,): what was given, and K everywhere else."""
        return np.where(self.given, self.codes, self.grid.not_drawn)

    # Parts --------------------------------------------------------------------------------------------------------

    def continued(
        self, codes: np.ndarray, uniforms: np.ndarray, n: int | None = None, name: str | None = None
    ) -> np.ndarray:
        """Images (B, T) whose next n codes, or all, the generator `name`, or the session's own, has drawn."""
        how = (self.sampling, self.temperature)
        return self.models.continue_codes(name or self.generator, *how, codes, uniforms, self.state.label, n)

    def expectations(self, codes: np.ndarray) -> Tensor:
        """The probabilities (n, T, K) of every code of whole images (n, T), given those before it."""
        how = (self.sampling, self.temperature)
        return self.models.expectations(self.generator, *how, codes, self.state.label)

    def _probabilities(self, codes: np.ndarray) -> Tensor:
        """(K,) of the first code of (T,) that is not drawn."""
        logits = self.models.logits(self.generator, self.sampling, codes, self.state.label) / self.temperature
        return torch.softmax(likeliest(logits[None], self.sampling.top_k, self.sampling.top_p), 1)[0]

    def _unlikely(self, position: int) -> int:
        """One of the less likely half of the codes at a position, never the one that is there."""
        codes = self.codes.copy()
        codes[position:] = self.grid.not_drawn
        order = self._probabilities(codes).argsort(stable=True)
        half = order[: max(1, len(order) // 2)]
        half = half[half != self.codes[position]] if len(half) > 1 else order[order != self.codes[position]]
        rng = np.random.default_rng([self.seed, position, int(self.codes[position])])
        return int(half[rng.integers(len(half))])

    def _with(self, position: int, code: int) -> np.ndarray:
        """A copy of the codes with one of them set."""
        if not 0 <= code < self.grid.codebook_size:
            raise ConfigError(f"code {code} is not one of 0..{self.grid.codebook_size - 1}")
        codes = self.codes.copy()
        codes[position] = code
        return codes

    def _blank(self) -> np.ndarray:
        return np.full(self.grid.n_codes, self.grid.not_drawn, np.int64)

    def _rows_mask(self, rows: int) -> np.ndarray:
        """(T,) bool: the codes of the first rows."""
        return self.grid.mask(0, rows)[: self.grid.n_codes]

    def _check_rows(self, rows: int) -> None:
        if not 1 <= rows < self.grid.height:
            raise ConfigError(f"{rows} rows given: choose 1 to {self.grid.height - 1} of {self.grid.height}")

    def _label(self, label: int | None) -> int | None:
        if not self.grid.classes:
            return None
        label = self.state.label if label is None else label
        if label is None or not 0 <= label < self.grid.classes:
            raise ConfigError(f"class {label}: choose 0 to {self.grid.classes - 1}")
        return label

    def _become(self, state: State, *, joined: bool = False) -> None:
        if not joined:
            self._past = [*self._past[-MOST_UNDO + 1 :], self.state]
        self.state = state
