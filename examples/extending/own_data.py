"""A data source of your own: the images and labels of a NumPy archive.

ral-gym train --preset smoke --data own_data:Archive:images.npz
"""

from pathlib import Path

import numpy as np


class Archive:
    """``images.npz`` with `images`, (N, C, h, w) or (N, h, w) uint8, and perhaps `labels`, (N,) integers."""

    def __init__(self, path: str) -> None:
        with np.load(path, allow_pickle=False) as found:
            self.images = found["images"]
            self.labels = found.get("labels")
        self.items = range(len(self.images))
        self.title = f"Images of {Path(path).name}"

    def read(self, item: int) -> np.ndarray:
        """One image; bytes of an encoded file or a Pillow image would do as well."""
        return self.images[item]


if __name__ == "__main__":
    np.savez("images.npz", images=np.random.default_rng(0).integers(0, 256, (80, 32, 32), np.uint8))
    print("images.npz: 80 images of noise; now train with --data own_data:Archive:images.npz")
