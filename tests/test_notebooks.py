"""The notebooks of examples/notebooks: tidy files, one address for all links, and each runs without a warning."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import tidy_notebooks
from nbclient import NotebookClient

FILES = sorted(tidy_notebooks.FOLDER.glob("*.ipynb"))
SMALL = {
    "exposure_bias": "IMAGES, POSITION = 8, 50",
    "first_episode": "COMPLETIONS, JUDGED = 2, 4",
    "swap_the_algorithm": "IMAGES, ENVS, FRESH = 32, 16, 16",
    "your_own_reward": "UPDATES, ENVS = 2, 4",
}
"""What takes the place of each notebook's sizes here."""
BEFORE = """
import warnings
warnings.simplefilter("error")
import matplotlib.pyplot as plt
figures_made = []
keep_figure = figures_made.append
plt.rcParams["figure.hooks"] = ["__main__:keep_figure"]
"""
AFTER = """
import json
warnings.simplefilter("default")
def bare(axis):
    shown = [label.get_text() for label in axis.get_ticklabels() if label.get_visible()]
    return any(any(sign.isdigit() for sign in text) for text in shown) and not axis.get_label_text()
def words(figure):
    return figure.get_suptitle() or figure.get_supxlabel()
problems = [f"figure {n}: no caption" for n, figure in enumerate(figures_made, start=1) if not words(figure)]
problems += [
    f"figure {n}: numbers along an axis, and no label"
    for n, figure in enumerate(figures_made, start=1)
    for axes in figure.axes
    if axes.get_visible() and (bare(axes.xaxis) or bare(axes.yaxis))
]
print(json.dumps({"figures": len(figures_made), "problems": problems}))
"""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_notebook_has_small_sizes() -> None:
    assert {path.stem for path in FILES} == SMALL.keys()
    for path in FILES:
        (sizes,) = [cell for cell in read(path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
        given = set(re.findall(r"^([A-Z]+) = ", "".join(sizes["source"]), re.M))
        assert set(re.findall(r"[A-Z]+", SMALL[path.stem])) <= given


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_tidy(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(nbformat.from_dict(notebook))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    clean = tidy_notebooks.tidy(notebook, path.name, tidy_notebooks.repository())
    assert path.read_text(encoding="utf-8") == tidy_notebooks.written(clean), "run examples/tidy_notebooks.py"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids[0] == "colab" and next(cell["id"] for cell in notebook["cells"] if "outputs" in cell) == "install"
    assert path.stat().st_size < 200_000


def test_outputs_bad_ids_and_metadata_go() -> None:
    code = {"cell_type": "code", "source": ["1\n", "2"], "execution_count": 3, "outputs": [{"a": 1}]}
    cells = [
        code | {"id": "a b", "metadata": {"collapsed": True, "tags": ["t"]}},
        code | {"id": "x"},
        code | {"id": "x"},
    ]
    found = tidy_notebooks.tidy({"cells": cells, "metadata": {"editor": "mine"}}, "x.ipynb", "")
    nbformat.validate(nbformat.from_dict(found))
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in found["cells"])
    assert len({cell["id"] for cell in found["cells"]}) == 3 and found["cells"][1]["id"] == "x"
    assert found["cells"][0]["metadata"] == {"tags": ["t"]} and "editor" not in found["metadata"]
    assert tidy_notebooks.tidy(found, "x.ipynb", "") == found


def test_one_address_makes_the_link_and_the_installation() -> None:
    address = "https://github.com/somebody/ral_gym"
    link = tidy_notebooks.colab(address, "first_episode.ipynb")
    assert "github/somebody/ral_gym/blob/main/examples/notebooks/first_episode.ipynb" in link and "](https://" in link
    assert f'REPOSITORY = "{address}"\n' in tidy_notebooks.install(address)
    assert "](" not in tidy_notebooks.colab("", "first_episode.ipynb")


def test_the_installation_is_asked_for_only_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: called.append(command))
    exec(tidy_notebooks.install("https://github.com/somebody/ral_gym"), {})
    assert called == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(tidy_notebooks.install("https://github.com/somebody/ral_gym"), {})
    assert called == [
        [sys.executable, *["-m", "pip", "install", "--quiet"], "ral-gym @ git+https://github.com/somebody/ral_gym"]
    ]
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        exec(tidy_notebooks.install(""), {})


@pytest.mark.commands
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_notebook_runs_without_a_warning(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    small = notebook.cells[place].source + "\n" + SMALL[path.stem]
    notebook.cells[place] = nbformat.v4.new_code_cell(small)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    notebook.cells.append(nbformat.v4.new_code_cell(AFTER))
    own = {name: str(tmp_path) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    outside = {
        name: value for name, value in os.environ.items() if name != "MPLBACKEND"
    }  # pytest's is not a notebook's
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=outside | own | {"OMP_NUM_THREADS": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert said == "", "progress bars are widgets, and there is nothing else to say"
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    found = json.loads(notebook.cells[-1].outputs[0].text)
    assert found["problems"] == [] and found["figures"] == len(pictures) > 1
    bars = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert len(bars) == (4 if path.stem == "swap_the_algorithm" else 0)
    assert not [file for file in tmp_path.iterdir() if file.suffix not in (".json", "") and file.is_file()]
