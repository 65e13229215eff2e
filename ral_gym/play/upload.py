"""A visitor's photo: read within limits, and its file deleted whatever comes of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ral_gym.errors import DataError
from ral_gym.play.models import Models
from ral_gym.stages.completion import read_image

MOST_MB = 12
"""The largest file that may be uploaded, in MiB."""
MOST_MEGAPIXELS = 50
"""The largest photo, in millions of pixels."""
FOLDER = "GRADIO_TEMP_DIR"
"""The environment variable that says where Gradio puts uploads."""


def read_upload(sent: Mapping[str, Any], models: Models) -> Tensor:
    """The photo (C, S, S) uint8, cropped and resized like the run's images; the file and its folder are removed.

    Args:
        sent: what the page says, which is not to be trusted: the file's `size` and, if it was uploaded, its `path`.
        models: their tokenizer determines size and channels.

    Raises:
        DataError: it is too large, no image, or no upload.
    """
    size, path = sent.get("size"), sent.get("path")
    if isinstance(size, int | float) and size > MOST_MB * 2**20:
        raise DataError(f"the photo has {size / 2**20:.1f} MiB: give one of at most {MOST_MB}")
    folder = Path(os.environ.get(FOLDER, os.devnull)).resolve()
    file = Path(path).resolve() if isinstance(path, str) and "\0" not in path else folder
    if folder not in file.parents or not file.is_file():
        raise DataError("no photo arrived: upload it again")
    limits = replace(models.data, max_file_mb=MOST_MB, max_megapixels=MOST_MEGAPIXELS)
    try:
        return read_image(file, models.tokenizer, limits)[0]
    except DataError as error:
        raise DataError(str(error).replace(str(file), file.name)) from error
    finally:
        file.unlink(missing_ok=True)
        if file.parent != folder:
            with contextlib.suppress(OSError):  # another upload of the same content
                file.parent.rmdir()
