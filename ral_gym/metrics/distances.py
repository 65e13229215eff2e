"""How far generated images are from a reference: Frechet distance (FD) and kernel distance (KID).

The paper reports FID against reconstructions of the training images (Section 5); here the caller chooses the reference.
Any extractor will do, features are extracted once and used in float64, and every result carries its extractor and
sample counts. KID is torchmetrics', with its subsets drawn from a separate seed. FD is
`frechet_distance`: torchmetrics takes the eigenvalues of a product that is not symmetric, which does not always
converge where covariances are singular, and loses half the digits there, so that FD may fall below 0.

FD is biased upwards for small sets (the more, the more features), so rows of a table need equal `n`, and should be read
next to `floor`; KID is unbiased (Binkowski et al. 2018). Both depend on the features' scale: the kernel of KID is
cubic, so that on `lite0` (features of about 3) 64x64 photos of faces against their blurred copies give a KID of
thousands.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ral_gym.errors import ConfigError, DivergedError
from ral_gym.metrics.features import Extractor, Images, extract

KID_SUBSETS = 100
KID_MAX_SUBSET_SIZE = 1000
MINIMUM_IMAGES = 6


class Distance(TypedDict):
    """FD and KID with the facts needed to interpret them."""

    fd: float
    kid: float
    kid_std: float
    n: int
    n_reference: int
    extractor: str
    kid_subset_size: int


class _GivenFeatures(nn.Module):
    """Takes the place of torchmetrics' network, because the features have been extracted already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FeatureDistance:
    """FD and KID of sets of features from one reference set, whose statistics are computed once.

    Args:
        reference: features (N, F), N >= 6.
        extractor: its name, which goes into every result.
        seed: seeds KID's subsets and the halves of `floor`. The global generators are left alone.

    Raises:
        ConfigError: too few images, or torchmetrics cannot be imported.
        DivergedError: a feature is NaN or infinite.
    """

    def __init__(self, reference: Tensor, *, extractor: str, seed: int = 0) -> None:
        self.extractor = extractor
        self.seed = seed
        self.reference = _checked(reference, extractor)  # (N, F)
        self._moments = _Moments.of(self.reference)
        self._kid = _kernel_distance(self.reference.shape[1])
        self._kid.update(self.reference, real=True)

    def measure(self, features: Tensor) -> Distance:
        """Distance of features (N, F), N >= 6, from the reference.

        KID is the mean over 100 pairs of random subsets, `kid_std` its standard deviation over them. Their size is a
        third of the smaller set, at most 1,000: subsets as large as the set would all be the same.

        Raises:
            ConfigError: too few images.
            DivergedError: a feature is NaN or infinite.
        """
        features = _checked(features, self.extractor)  # (N, F)
        subset_size = kid_subset_size(len(features), len(self.reference))
        self._kid.reset()
        self._kid.update(features, real=False)
        self._kid.subset_size = subset_size
        # torchmetrics draws the subsets from the CPU's global generator; torch.manual_seed would reseed CUDA's too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            kid, kid_std = self._kid.compute()
        return Distance(
            fd=_frechet(_Moments.of(features), self._moments),
            kid=float(kid),
            kid_std=float(kid_std),
            n=len(features),
            n_reference=len(self.reference),
            extractor=self.extractor,
            kid_subset_size=subset_size,
        )

    def fd(self, features: Tensor) -> float:
        """FD alone, as `measure` gives it, without the time that KID takes.

        Raises:
            ConfigError, DivergedError: as `measure`.
        """
        return _frechet(_Moments.of(_checked(features, self.extractor)), self._moments)

    def floor(self) -> Distance:
        """Distance between two random halves of the reference: what a perfect generator of N / 2 images would score."""
        generator = torch.Generator().manual_seed(self.seed)
        first, second = self.reference[torch.randperm(len(self.reference), generator=generator)].chunk(2)
        return FeatureDistance(first, extractor=self.extractor, seed=self.seed).measure(second)


class ImageDistance:
    """FD and KID of sets of images from one reference set, which is put through the extractor once.

    Args:
        extractor: what computes the features, see `make_extractor`.
        reference: uint8 images (N, C, S, S), N >= 6, or an iterable of batches of them.
        seed: seeds KID's subsets and the halves of `floor`.
        batch_size: images per step of the extractor.

    Raises:
        ConfigError: too few images, or torchmetrics cannot be imported.
    """

    def __init__(self, extractor: Extractor, reference: Images, *, seed: int = 0, batch_size: int = 64) -> None:
        self.extractor = extractor
        self.batch_size = batch_size
        self.features = FeatureDistance(extract(extractor, reference, batch_size), extractor=extractor.name, seed=seed)

    def measure(self, images: Images) -> Distance:
        """Distance of uint8 images (N, C, S, S), or batches of them; see `FeatureDistance.measure`."""
        return self.features.measure(extract(self.extractor, images, self.batch_size))

    def floor(self) -> Distance:
        """Distance between two random halves of the reference; `n` is the size of a half."""
        return self.features.floor()


def kid_subset_size(n: int, n_reference: int) -> int:
    """Size of KID's random subsets, for sets of these sizes."""
    return min(KID_MAX_SUBSET_SIZE, min(n, n_reference) // 3)


def floor(extractor: Extractor, reference: Images, *, seed: int = 0) -> Distance:
    """Distance between two random halves of a set of uint8 images; see `ImageDistance.floor`."""
    return ImageDistance(extractor, reference, seed=seed).floor()


def _checked(features: Tensor, extractor: str) -> Tensor:
    """Features as float64 on the CPU; raises if no distance can be computed from them."""
    if len(features) < MINIMUM_IMAGES:
        raise ConfigError(
            f"{len(features)} images are too few for FD and KID: at least {MINIMUM_IMAGES} are needed "
            "(n_samples, or the size of the reference)"
        )
    if not features.isfinite().all():
        raise DivergedError(f"the features of extractor {extractor} are NaN or infinite: its weights are damaged")
    return features.detach().double().cpu()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance between two sets of features, seen as Gaussians (Heusel et al. 2017, Eq. 6).

    |m - m_r|^2 + tr(S + S_r) - 2 tr((S^1/2 S_r S^1/2)^1/2). The last trace is the sum of the singular values of L
    L_r^T, where L^T L = S and L_r^T L_r = S_r: no root of an eigenvalue near 0 is taken, so covariances may be
    singular. The result is a difference of traces: within their rounding error it is 0; it is never negative.

    Args:
        features: (N, F) float64, N >= 2.
        reference: (M, F) float64, M >= 2.
    """
    return _frechet(_Moments.of(features), _Moments.of(reference))


class _Moments(NamedTuple):
    """Mean and covariance of features, the latter as a factor L with L^T L = S."""

    mean: Tensor
    """(F,)."""
    factor: Tensor
    """(min(N, F), F)."""
    n: int

    @classmethod
    def of(cls, features: Tensor) -> _Moments:
        """Of features (N, F) float64."""
        n, width = features.shape
        mean = features.mean(0)
        centred = (features - mean) / (n - 1) ** 0.5  # (N, F)
        return cls(mean, torch.linalg.qr(centred, mode="r").R if n > width else centred, n)


def _frechet(one: _Moments, other: _Moments) -> float:
    traces = float(one.factor.square().sum() + other.factor.square().sum())
    cross = float(torch.linalg.svdvals(one.factor @ other.factor.T).sum())
    distance = float((one.mean - other.mean).square().sum()) + traces - 2 * cross
    rounding = torch.finfo(torch.float64).eps * max(one.n, other.n, len(one.mean)) * traces
    return distance if distance > rounding else 0.0


def _kernel_distance(num_features: int) -> Any:
    """Torchmetrics' KID, with a reference that survives a reset.

    torchmetrics is imported here because it takes seconds, and imports a broken torchvision where there is one.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"torchmetrics cannot be imported ({reason}): install a torchvision built for torch {torch.__version__}, "
            "or uninstall torch-fidelity and torchvision, which only the extractor inception needs"
        ) from error
    with warnings.catch_warnings():
        # Keeping the features is what we want, see `FeatureDistance.measure`.
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        return KernelInceptionDistance(
            feature=_GivenFeatures(num_features), subsets=KID_SUBSETS, reset_real_features=False
        )
