"""Stage 0, `folder:PATH`: any images under a folder; a folder of one folder per class also gives labels."""

from __future__ import annotations

from ral_gym.data.base import Source, existing_path, folder_labels, require_images
from ral_gym.data.listing import list_folder
from ral_gym.data.opening import LIMITS, Limits
from ral_gym.errors import DataError


class Folder(Source):
    """Any images under a folder, a random share of them held out.

    Args:
        path: the folder.
        limits: what is too large.
    """

    argument = "PATH"

    def __init__(self, path: str, limits: Limits = LIMITS) -> None:
        root = existing_path(path, "folder")
        if not root.is_dir():
            raise DataError(f"{root} is a file: folder:PATH takes a folder of images (celeba:PATH also takes a zip)")
        files, unreadable = list_folder(root, limits)
        require_images(files, unreadable, root)
        labels, classes = folder_labels(files) or (None, ())
        super().__init__(
            files, root=root, title=f"Images of {root}", labels=labels, classes=classes, skipped=unreadable
        )
