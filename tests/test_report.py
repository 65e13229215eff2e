"""The report: one page with every section and figure, whatever has run; read by a parser, and by a browser if any."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands.cli import main
from ral_gym.commands.generate import open_run
from ral_gym.presets import SMOKE
from ral_gym.report.figures import HEAT_SHARE, heat, heat_map
from ral_gym.report.report import Report
from ral_gym.runs.run import Run
from ral_gym.runs.storage import load_json, save_json
from tests.tiny import make_tiny_run

SECTIONS = {
    "samples": "Samples",
    "completions": "Completions",
    "results": "Results",
    "frontier": "Frontier",
    "curves": "Learning curves",
    "score-maps": "Score maps",
    "exposure-bias": "Exposure bias",
    "configuration": "Configuration",
    "repeat": "Repeat it",
}
SAMPLES = {"fig-real", "fig-reconstruction", "fig-mle", "fig-ral"}
FIGURES = {
    *SAMPLES,
    *(f"fig-completion-{number}" for number in range(1, 5)),
    *("fig-results", "fig-frontier", "fig-exposure_curves", "fig-exposure_given_rows"),
    *("fig-scores-real", "fig-scores-mle", "fig-scores-ral"),
    *(f"fig-curve-{number}" for number in ("0-vqvae", "1-vqvae", "6-prior", "8-ral", "9-ral", "10-ral")),
}


@dataclass
class Found:
    """What stands in a figure."""

    pictures: list[str] = field(default_factory=list)
    alts: list[str] = field(default_factory=list)
    tables: int = 0
    caption: str = ""


class Page(HTMLParser):
    """Sections, figures, ids and references of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: dict[str, str] = {}
        self.figures: dict[str, Found] = {}
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.commands: list[str] = []
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[name] for name in ("src", "href", "srcset", "action", "data") if name in values]
        if tag not in ("meta", "link", "img", "wbr"):
            self._open.append((tag, values.get("id", "")))
        if tag == "figure":
            self.figures[values["id"]] = Found()
        if tag == "pre":
            self.commands.append("")
        figure = self._within("figure")
        if figure and tag in ("img", "svg"):
            self.figures[figure].pictures.append(values.get("src", "svg"))
            self.figures[figure].alts.append(values["alt"] if tag == "img" else values["aria-label"])
        elif figure and tag == "table":
            self.figures[figure].tables += 1

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "style" in tags:
            return
        self.text += data
        if "h2" in tags:
            self.headings[self._within("section")] = data
        if "pre" in tags:
            self.commands[-1] += data
        if "figcaption" in tags:
            self.figures[self._within("figure")].caption += data

    def _within(self, tag: str) -> str:
        return next((name for opened, name in reversed(self._open) if opened == tag), "")


def report(path: Path, *options: str) -> str:
    """Write the page of a run; its text."""
    assert main(["report", str(path), "--device", "cpu", *options]) == 0
    return (path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a picture of an exposure-bias experiment, and its report."""
    path = tmp_path_factory.mktemp("report") / "smoke"
    shutil.copytree(smoke_run, path)
    Image.new("RGB", (1500, 900), "white").save(path / "samples" / "exposure_curves.png")
    report(path)
    return path


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return (finished / "report.html").read_text(encoding="utf-8")


def check_page(html: str) -> Page:
    """What holds for every page, however far the run has come; the page."""
    page = Page(html)
    assert page.headings.items() >= SECTIONS.items()
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags and {"main", "h1", "nav", "title"} <= page.tags
    for reference in page.references:
        assert reference.startswith("data:") or reference.removeprefix("#") in page.ids, reference[:80]
    without = re.sub(r"data:image/png;base64,[\w+/=]*", "", html)
    assert not re.search(r"https?:|@import|url\((?!#)|src=\"(?!\")", without)
    for name, found in page.figures.items():
        assert (found.pictures or found.tables) and len(found.caption) > 10, name
        assert all(len(alt) > 10 for alt in found.alts), name
        for picture in found.pictures:
            if picture != "svg":
                kind, _, data = picture.partition(",")
                assert kind == "data:image/png;base64"
                with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                    image.load()
                    assert min(image.size) >= 32
    return page


def test_every_section_and_figure_of_a_finished_run_is_there(finished, html) -> None:
    page = check_page(html)
    assert set(page.figures) == FIGURES
    assert "has not run" not in page.text and "No " not in "".join(found.caption for found in page.figures.values())
    assert {name for name, found in page.figures.items() if found.pictures == ["svg"]} == {
        name for name in FIGURES if "curve-" in name or name == "fig-frontier"
    }
    assert [len(page.figures[f"fig-completion-{n}"].pictures) for n in range(1, 5)] == [3] * 4
    assert (finished / "report.html").stat().st_size < 1_500_000
    results = load_json(finished / "results.json")
    assert f"{results['rows']['ral']['entropy']:.3f}" in page.text and "mle_best_temperature" in page.text
    assert "24 samples per generator" in page.figures["fig-results"].caption


def test_the_same_run_gives_the_same_page(finished, html, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "page.html"
    torch.manual_seed(1)
    assert main(["report", str(finished), "--device", "cpu", "--output", str(output)]) == 0
    assert f"  {output}" in capsys.readouterr().out.splitlines()
    assert output.read_text(encoding="utf-8") == html
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_the_samples_are_the_generators_and_the_scores_the_critics(finished) -> None:
    material = Report(open_run(str(finished)), torch.device("cpu"), progress=False)
    assert set(material.generators) == {"MLE", "RAL"}
    assert not torch.equal(material.drawn["MLE"], material.drawn["RAL"])
    assert not torch.equal(material.held_out, material.reconstruction)
    images, scorer = material.reconstruction, material.scorer
    codes = torch.from_numpy(material.reconstructed_codes).long()
    with torch.no_grad():
        raw = scorer.critic(images.float() / 127.5 - 1)
    normalizer = scorer.normalizer
    assert (normalizer.shift, normalizer.scale) != (0.0, 1.0)
    assert torch.allclose(material._scores(codes, images), (raw - normalizer.shift) / normalizer.scale, atol=1e-6)


def test_a_score_tints_its_own_patch() -> None:
    images = torch.full((1, 1, 8, 8), 51, dtype=torch.uint8)
    tinted = heat(images, torch.tensor([[[0.0, 1.0], [0.5, 2.0]]]), 0.0, 1.0)
    for (row, column), score in {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): 1.0}.items():
        patch = tinted[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(3, -1)
        expected = 255 * HEAT_SHARE * np.array(heat_map()(score)[:3]) + (1 - HEAT_SHARE) * 51
        assert np.abs(patch - expected[:, None]).max() <= 0.51


# Runs that have not come so far -------------------------------------------------------------------------------------


def test_a_run_of_stage_1_says_what_is_missing(tmp_path, finished) -> None:
    path = tmp_path / "first"
    path.mkdir()
    for name in ("config.json", "vqvae.safetensors", "seconds.json"):
        shutil.copy(finished / name, path)
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if '"vqvae"' in line))
    page = check_page(report(path))
    assert set(page.figures) == {"fig-real", "fig-reconstruction", "fig-curve-0-vqvae", "fig-curve-1-vqvae"}
    for words in ("No samples of MLE: stage 2", "No samples of RAL: stage 3", "No completions", "No table", "No score"):
        assert words in page.text
    assert any(command.endswith("--stages prior") for command in page.commands)
    assert any(command.endswith("--stages prior ral") for command in page.commands)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_run_of_stages_1_and_2_says_what_is_missing(tmp_path, levels) -> None:
    path = make_tiny_run(tmp_path / "tiny", levels=levels)
    (path / "critic.safetensors").unlink()
    page = check_page(report(path))
    assert set(page.figures) == SAMPLES - {"fig-ral"}
    assert "No samples of RAL: stage 3 (RAL) has not run yet." in page.text
    assert "No curves of stage 1 (VQ-VAE): metrics.jsonl has no entries of it." in page.text
    assert f"bottom ({len(dataclasses.fields(SMOKE.bottom))} settings" in page.text or levels == 1


HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>$\\frac{'


def test_text_from_a_run_folder_is_no_html(finished, tmp_path) -> None:
    """Names of files, runs, rows and settings, and whatever else a stranger may have written into the folder."""
    path = Path(shutil.copytree(finished, tmp_path / HOSTILE.replace("/", "_")))
    picture = path / "samples" / "exposure_curves.png"
    picture.rename(picture.with_name(f"exposure{HOSTILE.replace('/', '_')}.png"))
    config = json.loads((path / "config.json").read_text())
    config["data"]["cache_dir"] = config["evaluation"]["extractor"] = config["preset"] = HOSTILE
    config["vqvae"]["options"] = {HOSTILE: HOSTILE}
    (path / "config.json").write_text(json.dumps(config))
    results = load_json(path / "results.json")
    results |= {"extractor": HOSTILE, "metrics": {HOSTILE: HOSTILE}}
    results["rows"] = {HOSTILE: {**results["rows"]["mle"], HOSTILE: 1.0}}
    results["sweeps"] = {HOSTILE: results["sweeps"]["mle"]}
    save_json(path / "results.json", results)
    page = check_page(report(path))
    assert {"img", "svg"} <= page.tags and not {"script", "object", "iframe", "form", "embed"} & page.tags
    for element in re.findall(r"<[^>]*>", report(path)):
        assert not re.search(r"\son\w+\s*=", re.sub(r'"[^"]*"', "", element)), element
    assert page.text.count("onerror=alert(1)") > 6  # it is there, as text


def test_the_page_may_load_and_run_nothing(html) -> None:
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    rules = dict(rule.strip().split(" ", 1) for rule in unescape(policy).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "script-src" not in rules and rules["img-src"] == "data:"
    assert html.index("Content-Security-Policy") < html.index("<style>") < html.index("<title>") + 200


@pytest.mark.parametrize("content", [b"%!PS-Adobe", b"", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_damaged_picture_is_one_line(content, tmp_path, capsys) -> None:
    path = make_tiny_run(tmp_path / "tiny")
    (path / "samples").mkdir()
    (path / "samples" / "exposure_x.png").write_bytes(content)
    assert main(["report", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exposure_x.png cannot be shown in the report" in line


def test_an_empty_run_and_missing_images_are_said(tmp_path) -> None:
    config = dataclasses.replace(SMOKE, data=dataclasses.replace(SMOKE.data, source=f"folder:{tmp_path}/gone"))
    page = check_page(report(Run(tmp_path / "empty", config).path))
    assert not page.figures and f"{tmp_path}/gone" in page.text and "No reconstructions: stage 1" in page.text
    path = make_tiny_run(tmp_path / "tiny")
    (path / "config.json").write_text(config.to_json())
    page = check_page(report(path))
    assert set(page.figures) == {"fig-reconstruction", "fig-mle", "fig-scores-real", "fig-scores-mle"}


# Figures on record --------------------------------------------------------------------------------------------------


def test_intervals_are_shown_where_they_are_on_record(finished, tmp_path, monkeypatch) -> None:
    path = tmp_path / "run"
    path.mkdir()
    shutil.copy(finished / "config.json", path)
    results = load_json(finished / "results.json")
    save_json(path / "results.json", results)
    page = Page(report(path))
    low, high = results["rows"]["ral"]["intervals"]["entropy"]
    assert f"{low:.3f} to {high:.3f}" in page.text and "memory: how often a sample is nearer" in page.text
    for row in results["rows"].values():
        del row["intervals"]
    save_json(path / "results.json", results)
    assert "without intervals" in Page(report(path)).text
    results["rows"]["mle"] |= {"fd": 13.5, "intervals": {"fd": [12.25, 14.75]}}
    results["rows"]["ral"] |= {"entropy": 2.5, "intervals": {"entropy": [2.25, 2.75]}}
    save_json(path / "results.json", results)
    page = Page(report(path))
    assert "12.2 to 14.8" in page.text and "2.250 to 2.750" in page.text and "without intervals" not in page.text


@pytest.mark.parametrize("damage", ["[]", '{"rows": {"mle": {"fd": "x"}}}', '{"rows": {}}', "{"])
def test_a_damaged_table_is_one_line(tmp_path, capsys, damage) -> None:
    path = Run(tmp_path / "run", SMOKE).path
    (path / "results.json").write_text(damage)
    assert main(["report", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "results.json" in lines[0] and "remove it" in lines[0]
    assert not (path / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


# A browser ----------------------------------------------------------------------------------------------------------

WRAPPER = """<!DOCTYPE html><meta charset="utf-8">
<iframe width="360" height="800" srcdoc="{page}"></iframe>
<iframe width="360" height="800" srcdoc="{page}" style="color-scheme: dark"></iframe>
<iframe width="1200" height="800" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
onload = () => {{
  const look = frame => {{
    const page = frame.contentDocument, root = page.documentElement, style = getComputedStyle(page.body);
    const figure = element => {{
      const box = element.getBoundingClientRect(), images = [...element.querySelectorAll("img")];
      return [element.id, box.width > 100 && box.height > 40 && images.every(i => i.complete && i.naturalWidth > 0)];
    }};
    return {{
      width: root.scrollWidth, room: root.clientWidth, colours: [style.color, style.backgroundColor],
      figures: Object.fromEntries([...page.querySelectorAll("figure")].map(figure)),
    }};
  }};
  found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
}};
</script>
"""


def browse(chromium: str, page: Path, profile: Path) -> str:
    """Open a page; its DOM. Console messages fail."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000"]
    done = subprocess.run(
        [chromium, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


def brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.mark.browser
def test_a_browser_shows_every_figure(chromium, finished, tmp_path) -> None:
    page = Page(browse(chromium, finished / "report.html", tmp_path / "profile"))
    assert set(page.figures) == FIGURES and page.headings.items() >= SECTIONS.items()


@pytest.mark.browser
def test_the_page_fits_a_phone_and_a_dark_room(chromium, html, tmp_path) -> None:
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER.format(page=escape(html)), encoding="utf-8")
    dom = browse(chromium, wrapper, tmp_path / "profile")
    match = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert match is not None
    phone, dark, desk = json.loads(unescape(match[1]))
    for frame, width in ((phone, 360), (dark, 360), (desk, 1200)):
        assert frame["width"] <= min(frame["room"], width)
        assert frame["figures"] == dict.fromkeys(FIGURES, True)
    for frame, is_dark in ((phone, False), (dark, True), (desk, False)):
        text, background = map(brightness, frame["colours"])
        assert (text > background) == is_dark and abs(text - background) > 500
