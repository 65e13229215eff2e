"""Figures: the right pixels in the right order, labels inside the picture, atomic writes; and the results table."""

from __future__ import annotations

import errno
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from ral_gym import pictures as figures
from ral_gym.errors import RunError
from ral_gym.metrics.table import metric_text
from ral_gym.pictures import (
    COLOURS,
    colour,
    results_markdown,
    results_table,
    save_comparison,
    save_curves,
    save_frontier,
    save_grid,
    save_neighbours,
)

# Fills that no text, label or background has.
FILLS = [(200, 10 + 9 * i, 255 - 7 * i) for i in range(24)]


def plain(*fills: int, side: int = 16) -> torch.Tensor:
    """Images of one colour each, by their number in FILLS."""
    return torch.tensor([FILLS[i] for i in fills], dtype=torch.uint8)[:, :, None, None].repeat(1, 1, side, side)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def box(picture: np.ndarray, fill: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the one rectangle of a colour; fails if it is not one whole rectangle."""
    ys, xs = np.nonzero((picture == FILLS[fill]).all(-1))
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    assert len(ys) == height * width
    return int(ys.min()), int(xs.min()), int(height), int(width)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that would have been written."""
    taken: list[Figure] = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: taken.append(figure))
    return taken


# --- grids


def test_grid_shows_all_images_in_raster_order_enlarged_without_smoothing(tmp_path):
    save_grid(tmp_path / "grid.png", plain(*range(7)), columns=3, title="Grid")
    boxes = [box(read(tmp_path / "grid.png"), i) for i in range(7)]
    assert {(height, width) for _, _, height, width in boxes} == {(128, 128)}
    assert sorted(range(7), key=lambda i: boxes[i][:2]) == list(range(7))
    assert boxes[0][0] == boxes[2][0] < boxes[3][0]
    assert boxes[0][1] == boxes[3][1] == boxes[6][1]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_of_an_image_arrives(tmp_path, channels):
    image = torch.randint(0, 256, (1, channels, 64, 64), dtype=torch.uint8)
    save_grid(tmp_path / "one.png", image, columns=1, title="One")
    picture = read(tmp_path / "one.png")
    expected = image[0].expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (128, 128))
    ys, xs = np.nonzero(windows[:, :, 0, 0] == expected[0, 0, 0])
    assert any((picture[y : y + 128, x : x + 128] == expected).all() for y, x in zip(ys, xs, strict=True))


def test_large_images_are_not_enlarged_and_wide_pictures_stay_bounded(tmp_path):
    save_grid(tmp_path / "a.png", plain(0, side=200), columns=1, title="A")
    assert box(read(tmp_path / "a.png"), 0)[2:] == (200, 200)
    save_grid(tmp_path / "b.png", plain(*range(24), side=64), columns=24, title="B")
    assert read(tmp_path / "b.png").shape[1] < 2700


def test_comparison_puts_equally_many_images_in_each_labelled_block(tmp_path):
    save_comparison(tmp_path / "c.png", {"MLE": plain(*range(5)), "RAL": plain(*range(8, 15))}, title="C", rows=2)
    picture = read(tmp_path / "c.png")
    left = [box(picture, i) for i in range(4)]
    right = [box(picture, i) for i in range(8, 12)]
    for hidden in (4, 12, 13, 14):
        assert not (picture == FILLS[hidden]).all(-1).any()
    assert max(x + width for _, x, _, width in left) < min(x for _, x, _, _ in right)
    assert [y for y, *_ in left] == [y for y, *_ in right]
    for label, block in (("MLE", left), ("RAL", right)):
        rgb = np.round(255 * np.array(to_rgb(colour(label)))).astype(np.uint8)
        _, xs = np.nonzero((picture[: block[0][0]] == rgb).all(-1))
        assert abs(int(xs.min()) - block[0][1]) <= 1
        assert abs(int(xs.max()) + 1 - (block[1][1] + block[1][3])) <= 1


def test_neighbours_stand_below_their_samples(tmp_path):
    save_neighbours(tmp_path / "n.png", plain(0, 1, 2), plain(8, 9, 10), title="N", columns=2)
    picture = read(tmp_path / "n.png")
    for sample, neighbour in ((0, 8), (1, 9), (2, 10)):
        above, below = box(picture, sample), box(picture, neighbour)
        assert above[1] == below[1]
        assert 0 < below[0] - (above[0] + above[2]) < 8
    assert box(picture, 2)[0] > box(picture, 8)[0]


def test_neighbours_have_row_labels(drawn):
    save_neighbours("n.png", plain(0, 1, 2), plain(8, 9, 10), title="N", columns=2)
    assert [text.get_text() for text in drawn[0].texts].count("sample") == 2
    assert [text.get_text() for text in drawn[0].texts].count("nearest") == 2


@pytest.mark.parametrize("columns", [1, 3, 12])
def test_text_stays_inside_the_picture(drawn, columns):
    words = "Samples Of The Prior With WIDE Letters "
    save_grid("g.png", plain(*range(columns)), columns=columns, title=words * 4, caption=words * 6)
    save_neighbours("n.png", plain(*range(columns)), plain(*range(columns)), title=words * 4, caption=words * 6)
    for figure in drawn:
        renderer = FigureCanvasAgg(figure).get_renderer()
        for text in figure.texts:
            extent = text.get_window_extent(renderer)
            if text.get_text():
                assert extent.x0 >= 0
                assert extent.y0 >= 0
                assert extent.x1 <= figure.bbox.width
                assert extent.y1 <= figure.bbox.height


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8).byte(), plain(0)[:0]])
def test_what_is_not_a_set_of_images_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="uint8"):
        save_grid(tmp_path / "g.png", bad, columns=2, title="G")


# --- plots


def test_curves_have_labels_and_leave_nan_out(drawn):
    nan = float("nan")
    save_curves("c.png", {"MLE": ([0, 1, 2], [3.0, nan, 1.0]), "RAL": ([0], [2.0])}, xlabel="x", ylabel="y", title="t")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("x", "y", "t")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MLE", "RAL"]
    assert axes.lines[0].get_xydata().tolist() == [[0, 3], [2, 1]]
    assert [line.get_color() for line in axes.lines] == [COLOURS["mle"], COLOURS["ral"]]


def test_frontier_joins_the_sweep_by_entropy_and_names_temperatures_and_checkpoints(drawn):
    points = {"RAL": [(2.9, 24.0), (2.8, 23.0)], "MLE continued": [(2.95, 28.0), (float("nan"), 1.0)]}
    save_frontier("f.png", [(1.0, 3.1, 31.0), (0.8, 2.5, 23.0), (0.9, 2.8, 22.0)], points, title="t")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[2.5, 23], [2.8, 22], [3.1, 31]]
    notes = {text.get_text(): text.xy for text in axes.texts}
    assert notes["T=0.8"] == (2.5, 23.0)
    assert notes["T=1"] == (3.1, 31.0)
    assert (notes["1"], notes["2"]) == ((2.9, 24.0), (2.8, 23.0))
    assert axes.lines[2].get_xydata().tolist() == [[2.95, 28]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["MLE by temperature", "RAL (checkpoints in order)", "MLE continued"]


def test_a_frontier_names_each_temperature_once_and_shows_small_distances_beside_large_ones(drawn):
    sweeps = {"ral": [(1.0, 3.0, 20.0), (0.5, 1.0, 300.0)], "mle_ema": [(1.0, 3.2, 30.0)]}
    save_frontier("f.png", [(1.0, 3.1, 31.0), (0.5, 1.1, 310.0)], {}, title="t", sweeps=sweeps)
    (axes,) = drawn[0].axes
    assert {text.get_text(): text.xy for text in axes.texts} == {"T=1": (3.0, 20.0), "T=0.5": (1.0, 300.0)}
    assert axes.get_yscale() == "log"
    save_frontier("g.png", [(1.0, 3.1, 31.0), (0.8, 2.5, 23.0)], {}, title="t")
    assert drawn[1].axes[0].get_yscale() == "linear"


def test_a_generator_has_one_colour_however_it_is_written():
    assert colour("mle_continued") == colour("MLE continued") == colour("MLE-continued")
    assert len({colour(name) for name in ("real", "reconstruction", "mle", "mle_ema", "mle_continued", "ral")}) == 6
    assert colour("train", ["train", "held out"]) != colour("held out", ["train", "held out"])


# --- files


def test_plots_and_grids_are_written_whole_and_equal_figures_are_equal_files(tmp_path):
    curve = {"a": (range(50), range(50))}
    for name in ("one", "two"):
        save_curves(tmp_path / name / "curves.png", curve, xlabel="x", ylabel="y", title="t")
        save_frontier(tmp_path / name / "frontier.png", [(1, 3, 4), (0.9, 2, 3)], {"RAL": [(2, 2)]}, title="t")
        save_comparison(tmp_path / name / "comparison.png", {"Real": plain(0), "RAL": plain(1)}, title="t")
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["comparison.png", "curves.png", "frontier.png"]
    for name in names:
        assert read(tmp_path / "one" / name).std() > 0
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_full_disk_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(path, plain(0), columns=1, title="old")
    before = path.read_bytes()

    def fill_the_disk(figure, target, **_) -> None:
        target.write_bytes(b"half a pict")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(RunError, match="No space left on device"):
        save_grid(path, plain(1), columns=1, title="new")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_window_library_is_loaded():
    code = "import ral_gym.pictures, sys; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- the table

SPREAD = {"diversity": 0.951, "samples_per_kept": 1.0}
RESULTS = {
    "rows": {
        "floor": {"fd": 3.1, "kid": -15.98, "n": 144},
        "ral": {"fd": 123.611, "kid": 5944.4, "nll_test": None, "entropy": 2.85, "n": 3000},
        "mle": {"fd": 31.3, "kid": 0.0123, "nll_test": 3.73, "nll_new_people": 4.12, "n": 3000, "temperature": 1.0}
        | SPREAD,
        "another": {},
    },
    "extractor": "lite0",
    "n_samples": 3000,
    "seed": 7,
    "seconds": {"vqvae": 75.2, "prior": 100},
}


def test_markdown_has_every_figure_in_order_and_a_dash_for_each_missing_one():
    lines = results_markdown(RESULTS).splitlines()
    assert lines[0] == "| row | FD | KID | NLL test | NLL new | entropy | diversity | cost | n | T |"
    assert lines[2:6] == [
        "| `mle` | 31.3 | 0.0123 | 3.730 | 4.120 | - | 0.951 | 1.0 | 3,000 | 1.00 |",
        "| `ral` | 123.6 | 5,944 | - | - | 2.850 | - | - | 3,000 | - |",
        "| `floor` | 3.10 | -16.0 | - | - | - | - | - | 144 | - |",
        "| `another` | - | - | - | - | - | - | - | - | - |",
    ]
    assert lines[-1] == (
        "FD and KID on lite0 features; 3,000 samples per generator (floor 144); NLL (held-out images, new people) and "
        "entropy in nats per code; diversity: share of codes in which two samples differ; cost: samples drawn per "
        "sample kept; seed 7; 175 s in all."
    )


MEASURED = {
    "fd": 17.41,
    "precision": 0.226,
    "recall": 0.786,
    "memorisation": 0.0626,
    "nll_test": 3.4368,
    "entropy": 3.2694,
    "temperature": 0.85,
    "n": 3000,
    "intervals": {"fd": [16.21, 18.61], "recall": [0.75, 0.8], "memorisation": [0.0386, 0.0866]},
}


def test_intervals_stand_beside_the_figures_from_their_farther_end():
    markdown = results_markdown({**RESULTS, "rows": {"ral": MEASURED}})
    lines = markdown.splitlines()
    assert lines[0] == "| row | FD | precision | recall | memory | NLL test | entropy | n | T |"
    assert lines[2] == "| `ral` | 17.4 ±1.2 | 0.226 | 0.786 ±0.036 | 0.06 ±0.02 | 3.437 | 3.269 | 3,000 | 0.85 |"
    assert "memory: how often a sample is nearer to a training image than a held-out image is" in lines[-1]
    assert "intervals 95 %, over samples or held-out images, not over seeds" in lines[-1]


@pytest.mark.parametrize(
    ("value", "ends", "expected"),
    [
        (0.000312, [0.000291, 0.000333], ("0.000312", "0.000291", "0.000333", "0.000021")),
        (1.234e-9, [1.1e-9, 1.5e-9], ("1.23e-09", "1.10e-09", "1.50e-09", "2.66e-10")),
        (5.432, [5.1, 5.7], ("5.43", "5.10", "5.70", "0.33")),
        (1332.56, [1299.66, 1365.46], ("1332.6", "1299.7", "1365.5", "32.9")),
        (17.4, [17.37, 17.42], ("17.40", "17.37", "17.42", "0.03")),
        (0.0, [0.0, 0.0004], ("0.0000", "0.0000", "0.0004", "0.0004")),
        (0.0, None, ("0.0", "", "", "")),
        (None, None, ("-", "", "", "")),
    ],
)
def test_every_scale_of_features_has_significant_digits(value, ends, expected):
    row = {"fd": value, "intervals": {"fd": ends} if ends else {}}
    assert metric_text(row, "fd") == expected
    results = {**RESULTS, "rows": {"mle": {**row, "n": 3000}}}
    if value is not None:
        text = f"{expected[0]} ±{expected[3]}" if ends else expected[0]
        assert f"| `mle` | {text} |" in results_markdown(results) and text in shown(results["rows"])


def test_columns_of_your_own_follow_with_their_meaning():
    row = {"fd": 3.0, "brightness": 0.012345, "intervals": {"brightness": [0.0121, 0.0126]}}
    results = {**RESULTS, "rows": {"mle": row}, "metrics": {"brightness": "mean of all pixels", "unused": ""}}
    lines = results_markdown(results).splitlines()
    assert lines[0] == "| row | FD | brightness |" and lines[2] == "| `mle` | 3.00 | 0.0123 ±0.0003 |"
    assert "brightness: mean of all pixels" in lines[-1] and "unused" not in lines[-1]
    assert any(line.split() == ["mle", "3.00", "0.0123"] for line in shown(**results).splitlines())


def test_the_caption_says_how_many_held_out_images_there_were():
    results = {**RESULTS, "held_out": {"test": 2000, "new_people": 40}}
    assert "NLL of 2,000 and 40 images" in results_markdown(results)
    assert "NLL of" not in results_markdown(RESULTS)


def shown(rows, **more) -> str:
    """The table on a terminal of 80 columns."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table({**RESULTS, **more, "rows": rows}))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    return text


def test_the_table_of_an_older_run_fits_80_columns_with_all_its_figures():
    rows = {
        "mle_continued_best_temperature": {
            **RESULTS["rows"]["ral"],
            "fd": 1289.26,
            "nll_test": 3.6,
            "nll_new_people": 4.2,
            "diversity": 0.95,
            "samples_per_kept": 12.0,
            "temperature": 0.7,
        },
        **RESULTS["rows"],
    }
    text = shown(rows)
    for row in results_markdown({**RESULTS, "rows": rows}).splitlines()[2:7]:
        cells = row.replace("`", "").strip("| ").split(" | ")
        del cells[8]  # n stands in the caption
        assert any(line.split() == cells for line in text.splitlines())
    assert "lite0 features; 3,000 samples per generator (floor 144)" in " ".join(text.split())


def test_the_table_shows_what_matters_most_and_the_rest_where_there_is_room():
    more = {"kid": 7.92, "nll_new_people": 4.129, "diversity": 0.984, "density": 0.07, "coverage": 0.17}
    row = {**MEASURED, **more, "samples_per_kept": 1.0}
    row |= {"fd": 1332.56, "intervals": {"fd": [1299.66, 1365.46]}}
    text = shown({"mle_continued_best_temperature": row})
    (line,) = [words for words in map(str.split, text.splitlines()) if words[:1] == ["mle_continued_best_temperature"]]
    assert line[1:] == ["1332.6", "±32.9", "0.786", "0.06", "3.437", "4.129", "3.269", "0.85"]
    assert "memory: how often" in text and "cost" not in text
    (line,) = [words for words in map(str.split, shown({"ral": row}).splitlines()) if words[:1] == ["ral"]]
    assert len(line) == 14 and line[3] == "7.92"


def test_long_names_of_classes_keep_their_beginning(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(figures, "_write_panels", lambda path, panels, *words: seen.extend(panels))
    names = ["cat", "golden_retriever", "a_very_long_class_name"]
    figures.save_class_grid(tmp_path / "x.png", {"mle": plain(0, 1, 2)}, names, title="t")
    assert [label for _, label in seen[0].rows] == ["cat", "golden_retriever", "a_very_long_cl.."]
