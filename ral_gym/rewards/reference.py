"""Statistics of real images' features: what the Frechet rewards compare to where the images are not at hand.

    ral-gym reference runs/demo --features pyramid --output stats.npz
    ral-gym train .. --ral.reward-features pyramid --ral.reward-reference stats.npz

or, from images or features of your own, ``save_reference("stats.npz", reference_of(images, extractor))`` and
``save_reference("stats.npz", Moments.of(features, extractor))``. A file is a NumPy archive:

* `mu`: (F,) float64, the mean;
* `sigma`: (F, F) float64, the covariance, divided by n - 1 as `numpy.cov` does; or (F,), its diagonal, which
  `loo_fd_diagonal` alone can use;
* `n`: the number of images;
* `extractor`: the name of the features;
* `weights`: for features of a tokenizer, the digest of its weights, since another one's features are others.

`mu` and `sigma` are those of the statistics files of common FID implementations, which lack the other entries.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ral_gym.errors import ConfigError, DivergedError, RunError
from ral_gym.rewards.moments import MINIMUM_BATCH, MOST_FEATURES, Moments, weights_of
from ral_gym.runs.foreign import check_regular
from ral_gym.runs.storage import write_atomic

if TYPE_CHECKING:
    from ral_gym.metrics import Extractor
    from ral_gym.metrics.features import Images

_MOST_BYTES = 8 * MOST_FEATURES * (MOST_FEATURES + 1) + 2**20
_LONGEST_NAME = 200


@torch.no_grad()
def reference_of(images: Images, extractor: Extractor) -> Moments:
    """The moments of a set of images of any size, read once; memory is that of a batch and of the covariance.

    Args:
        images: uint8 (N, 1 or 3, S, S), or batches of it.
        extractor: the features.

    Raises:
        ConfigError: fewer than 3 images, or more than `MOST_FEATURES` features.
        DivergedError: a feature is NaN or infinite.
    """
    from ral_gym.metrics.features import image_batches

    n, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for batch in image_batches(images, 64):
        features = extractor(batch.to(extractor.device)).cpu().double()  # (B, F)
        if features.shape[1] > MOST_FEATURES:
            raise ConfigError(f"{features.shape[1]} features: a reference has at most {MOST_FEATURES}")
        if not features.isfinite().all():
            raise DivergedError("a feature is NaN or infinite: the extractor's weights, or the images, are damaged")
        own, total = features.mean(0), n + len(features)
        centred, shift = features - own, own - mean  # (B, F), (F,)
        # Chan et al. (1979): two parts' scatter matrices, and that of their means.
        between = shift[:, None] * shift * (n * len(features) / total)
        scatter, mean = scatter + centred.T @ centred + between, mean + shift * (len(features) / total)
        n = total
    if n < MINIMUM_BATCH:
        raise ConfigError(f"a reference of {n} images: give {MINIMUM_BATCH} or more")
    return Moments(mean, scatter / n, n, extractor.name, weights_of(extractor))


def save_reference(path: Path | str, moments: Moments) -> None:
    """Write moments as a NumPy archive, atomically.

    Raises:
        RunError: the folder cannot be written to.
    """
    sigma = moments.covariance.numpy() * (moments.n / (moments.n - 1))
    values: dict[str, Any] = {"mu": moments.mean.numpy(), "sigma": sigma, "n": np.int64(moments.n)}
    values |= {"extractor": np.array(moments.extractor), "weights": np.array(moments.weights)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a file: for a path numpy adds a suffix
            np.savez(file, **values)

    write_atomic(Path(path), write)


def load_reference(path: Path | str) -> Moments:
    """Read what `save_reference` wrote; nothing is unpickled, and no more memory is taken than `MOST_FEATURES` needs.

    Raises:
        ConfigError: missing, damaged, too large, without one of the entries, or with numbers that are no moments.
    """
    path = Path(path)
    values = _arrays(path)
    for name in ("mu", "sigma", "n", "extractor"):
        if name not in values:
            raise ConfigError(
                f"ral.reward_reference {path} has no {name}: it needs mu, sigma, n and extractor, as "
                "ral_gym.rewards.reference.save_reference writes them"
            )
    mean, sigma, n = values["mu"], values["sigma"], values["n"]
    extractor, weights = values["extractor"], values.get("weights", np.array(""))
    wrong = f"ral.reward_reference {path}"
    if extractor.dtype.kind != "U" or extractor.ndim or weights.dtype.kind != "U" or weights.ndim:
        raise ConfigError(f"{wrong}: extractor and weights are not text")
    if n.dtype.kind not in "iu" or n.ndim or not 3 <= int(n) < 2**53:
        raise ConfigError(f"{wrong}: n is no number of 3 or more images")
    shapes = ((len(mean), len(mean)), (len(mean),)) if mean.ndim == 1 else ()
    if mean.dtype.kind != "f" or sigma.dtype.kind != "f" or sigma.shape not in shapes or not len(mean):
        raise ConfigError(f"{wrong}: mu is {mean.shape} and sigma {sigma.shape}: give (F,), and (F, F) or (F,), floats")
    if not np.isfinite(mean).all() or not np.isfinite(sigma).all():
        raise ConfigError(f"{wrong}: mu or sigma has NaN or infinite numbers")
    mean, sigma = mean.astype(np.float64), sigma.astype(np.float64)
    variances = sigma if sigma.ndim == 1 else sigma.diagonal()
    tolerance = 1e-6 * float(np.abs(variances).max())
    if (variances < -tolerance).any() or (sigma.ndim == 2 and np.abs(sigma - sigma.T).max() > tolerance):
        raise ConfigError(f"{wrong}: sigma is no covariance: it is not symmetric, or has a variance below 0")
    covariance = torch.from_numpy(sigma * ((int(n) - 1) / int(n)))
    return Moments(torch.from_numpy(mean), covariance, int(n), str(extractor), str(weights))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive, each no larger than the archive says."""
    try:
        check_regular(path, _MOST_BYTES, "give another file")
        with zipfile.ZipFile(path) as archive:
            return {
                entry.filename.removesuffix(".npy"): _array(archive, entry)
                for entry in archive.infolist()
                if entry.filename.removesuffix(".npy") in ("mu", "sigma", "n", "extractor", "weights")
            }
    except FileNotFoundError as error:
        raise ConfigError(f"ral.reward_reference {path} does not exist: give a file of save_reference") from error
    except (OSError, RunError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"ral.reward_reference {path} cannot be read as a NumPy archive ({reason})") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array; its header is compared with the entry's size before any memory is taken."""
    if entry.file_size > _MOST_BYTES:
        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{entry.filename} has a header of version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        count = 1
        for size in shape:
            count *= size
        if dtype.hasobject or count * dtype.itemsize > entry.file_size or (dtype.kind == "U" and count != 1):
            raise ValueError(f"{entry.filename} has another size than its header says, or holds objects")
        if dtype.kind == "U" and dtype.itemsize > 4 * _LONGEST_NAME:
            raise ValueError(f"{entry.filename} has more than {_LONGEST_NAME} characters")
    with archive.open(entry) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return array
