"""The small pictures of examples/README.md, from those of docs/ and from the notebooks.

    python examples/make_gallery.py                  # all of them, into examples/pictures: about a minute
    python examples/make_gallery.py --only docs      # those that need no notebook: seconds

A notebook is run at its normal sizes for this; what is kept is the first picture of one of its cells. Needs nbclient,
ipykernel and ipywidgets (``pip install ".[dev]"``).
"""

import argparse
import base64
import io
import sys
from pathlib import Path

from PIL import Image

from ral_gym.runs.storage import write_atomic

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "pictures"
WIDTH = 320
"""Pixels of each picture's longer side at most."""
DOCS = {
    "ablation": "results_ablation",
    "compare_tokenizers": "results_tokenizers",
    "does_rl_help": "results_demo_frontier_seed0",
    "exposure_bias": "results_exposure_comparison",
    "frontier": "results_frontier",
    "make_docs_pictures": "idea_5",
    "oracle_experiment": "results_oracle_nll_curve",
    "ppo_single_file": "curve_ppo",
    "swap_algorithm": "results_swap_ral_gym_Toy_v0_learning_curves",
    "train_celeba": "real_mle_ral",
}
"""Script -> its picture in docs/."""
NOTEBOOKS = {
    "first_episode": "completions",
    "swap_the_algorithm": "plot",
    "your_own_reward": "images",
    "exposure_bias": "reach",
}
"""Notebook -> the cell whose picture is shown."""


def small(image: Image.Image) -> Image.Image:
    """A picture of at most `WIDTH` pixels in 256 colours."""
    picture = image.convert("RGB")
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return picture.quantize(256, dither=Image.Dither.NONE)


def keep(name: str, image: Image.Image) -> None:
    """Write a small picture."""
    picture, path = small(image), FOLDER / f"{name}.png"
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
    print(f"  {path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


def picture_of(notebook: str, cell: str) -> Image.Image:
    """Run a notebook; the first picture of a cell."""
    import nbformat
    from nbclient import NotebookClient

    ran = nbformat.read(ROOT / "examples" / "notebooks" / f"{notebook}.ipynb", as_version=4)
    NotebookClient(ran, kernel_name="python3").execute()
    (outputs,) = [one.outputs for one in ran.cells if one.id == cell]
    data = next(output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    return Image.open(io.BytesIO(base64.b64decode(data)))


def main(argv: list[str]) -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("docs", "notebooks"), help="leave the others as they are")
    only = parser.parse_args(argv).only
    FOLDER.mkdir(exist_ok=True)
    if only != "notebooks":
        for name, picture in DOCS.items():
            with Image.open(ROOT / "docs" / f"{picture}.png") as image:
                keep(name, image)
    if only != "docs":
        for name, cell in NOTEBOOKS.items():
            keep(f"notebook_{name}", picture_of(name, cell))


if __name__ == "__main__":
    main(sys.argv[1:])
