"""The trained models that come with the package: `ral_gym/Faces-v0` and `ral_gym/Oracle-v0` work without a network.

``faces/`` is a run folder with stages 1 and 2, a critic and, for `ral-gym play`, a RAL policy that began as its prior;
``oracle/`` holds an oracle PixelCNN over the same code grid, a lighter PixelCNN fitted to its samples, and those
samples. Weights are float16 safetensors, used in float32.
``make assets`` (examples/make_assets.py) makes all of them again from the 400 AT&T face photos.
"""

from __future__ import annotations

from pathlib import Path

from ral_gym.errors import RunError

FOLDER = Path(__file__).parent


def asset_path(name: str) -> Path:
    """Where a file or folder such as ``faces`` or ``oracle/prior.safetensors`` lies.

    Raises:
        RunError: it does not come with this installation.
    """
    path = FOLDER / name
    if not path.exists():
        raise RunError(f"{name} is not among the files that come with ral_gym ({FOLDER}); install the package again")
    return path
