"""`make test-faults`: damaged run folders through whole commands, and odd image files (docs/reliability.md)."""

import io
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ral_gym.agents.train_ral import load_run
from ral_gym.commands.cli import main
from ral_gym.config import DataConfig
from ral_gym.data.images import load_images
from ral_gym.errors import RalGymError
from tests import forks
from tests.damage import damages

pytestmark = pytest.mark.faults

MEMORY = 10 * 2**30
"""Bytes of address space."""


def command_for(file: str, folder: Path) -> Callable[[], int]:
    """The command that needs a file most."""
    if file.startswith(("results", "config")):
        return lambda: main(["evaluate", str(folder), "--quiet"])
    if file in ("seconds.json", "metrics.jsonl"):
        return lambda: main(["report", str(folder), "--output", str(folder / "page.html")])
    if file.startswith(("checkpoints/ral", "codes", "prior.", "critic")):
        return lambda: load_run(folder) is None
    if file.startswith(("prior_", "policy.", "checkpoints/eval")):
        (folder / "results.json").unlink()
        return lambda: main(["evaluate", str(folder), "--quiet"])
    return lambda: main(["sample", str(folder), "--n", "4"])


def test_300_damaged_run_folders_end_in_a_line_and_nothing_is_executed(smoke_run, tmp_path) -> None:
    flag, outcomes = tmp_path / "executed", Counter()
    found = damages(5, flag, rounds=2)
    random.Random(0).shuffle(found)
    for number, damage in enumerate(found[:320]):
        folder = shutil.copytree(smoke_run, tmp_path / "run", symlinks=True)
        damage.apply(folder / damage.file)
        command = command_for(damage.file, folder)

        def work(command: Callable[[], int] = command) -> int:
            forks.often_saved()
            try:
                return int(command())
            except RalGymError as error:
                return 2 if str(error).isprintable() else 3

        status = forks.ended(forks.forked(work, tmp_path / "log", MEMORY), seconds=120)
        assert status in (0, 2), (number, str(damage), status, (tmp_path / "log").read_text()[-3000:])
        assert not flag.exists(), str(damage)
        outcomes[status] += 1
        shutil.rmtree(folder)
    assert sum(outcomes.values()) >= 300 and outcomes[2] >= 150


def odd_images(seed: int) -> list[tuple[str, bytes]]:
    """Files that are called images: other modes and formats, cut, changed, larger than they look, empty, text."""
    rng, found = random.Random(seed), []
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"):
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
            buffer = io.BytesIO()
            array = np.random.default_rng(seed).integers(0, 255, (40, 40), dtype=np.uint8)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Image.fromarray(array).convert("I" if mode == "I;16" else mode).save(buffer, kind)
            except (OSError, ValueError, KeyError):
                continue
            whole = buffer.getvalue()
            changed = bytearray(whole)
            for _ in range(10):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
            found += [(f"{mode}-{kind}.{suffix}".replace(";", ""), whole)]
            found += [(f"changed-{mode}-{kind}.{suffix}".replace(";", ""), bytes(changed))]
            found += [(f"cut-{mode}-{kind}.{suffix}".replace(";", ""), whole[: rng.randrange(len(whole))])]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n"
    more = {
        "bomb.png": bomb.getvalue(),
        "eps.png": script,
        "empty.png": b"",
        "text.jpg": b"hello",
        "zip.png": b"PK\3\4",
    }
    return [*found, *more.items()]


def test_60_odd_image_files_are_read_or_named(tmp_path) -> None:
    files = odd_images(0)
    assert len(files) >= 60
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in files:
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")

    def work() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = load_images(DataConfig(source=f"folder:{folder}", image_size=32, workers=1), progress=False)
        return 0 if len(images.train) >= 20 and len(images.skipped) >= 10 else 3

    assert forks.ended(forks.forked(work, tmp_path / "log", MEMORY), 120) == 0, (tmp_path / "log").read_text()[-3000:]
