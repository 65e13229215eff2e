"""A visitor's photo: read within limits, and its file deleted whatever comes of it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ral_gym.errors import DataError
from ral_gym.play.models import Models
from ral_gym.stages.completion import read_image

MOST_MB = 12
"""The largest file that may be uploaded, in MB."""
MOST_MEGAPIXELS = 50
"""The largest photo, in millions of pixels."""


def read_upload(path: str | None, models: Models) -> Tensor:
    """The photo (C, S, S) uint8, cropped and resized like the run's images; the file and its folder are removed.

    Raises:
        DataError: it is too large, or no image.
    """
    if path is None:
        raise DataError("no photo arrived: upload it again")
    file = Path(path)
    limits = replace(models.data, max_file_mb=MOST_MB, max_megapixels=MOST_MEGAPIXELS)
    try:
        return read_image(file, models.tokenizer, limits)[0]
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            file.parent.rmdir()
