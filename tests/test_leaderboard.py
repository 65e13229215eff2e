"""The leaderboard: the page is made of its files, a file is checked, and finished runs become one."""

import copy
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evidence.leaderboard import Entry, load_entries, load_entry, page, save_entry
from rich.console import Console

from ral_gym.errors import ConfigError, RunError
from tests.tiny import make_tiny_run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("make_leaderboard")


def seed(number: int, fd: float, control: float, **more: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("best_fd", "control_best_fd", "best_temperature", "recall", "nll_test", "seconds"))
    return {"seed": number, "fd": fd, "control_fd": control, **nothing, **more}


def entry(*seeds: dict[str, Any], **changed: Any) -> Entry:
    texts = {"recipe": "demo", "algorithm": "grpo", "data": "faces", "control": "mle_continued", "extractor": "lite0"}
    texts |= {"command": "ral-gym demo", "hardware": "a CPU", "version": "0.2.0", "who": "somebody", "note": ""}
    return Entry(**{**texts, "n_samples": 2000, "seeds": list(seeds), "means": {}, **changed})


def values() -> dict[str, Any]:
    return json.loads((DOCS / "leaderboard" / "demo-converged.json").read_text(encoding="utf-8"))


def test_the_page_and_the_files_agree() -> None:
    written = (DOCS / "leaderboard.md").read_text(encoding="utf-8")
    assert written == page(load_entries(DOCS / "leaderboard")), "run python examples/make_leaderboard.py"


def test_every_seed_has_a_line_and_only_what_is_beyond_its_interval_is_bold() -> None:
    clear = entry(seed(0, 10.0, 13.0), seed(1, 20.0, 23.1), seed(2, 30.0, 32.9, fd_spread=1.25), recipe="clear")
    same_sign = entry(seed(0, 9.0, 10.0), seed(1, 1.0, 9.0), recipe="same", means={"recall": 0.5})
    one = entry(seed(4, 5.0, 99.0), recipe="one")
    text = page({"a": same_sign, "b": one, "c": clear})
    lines = text.splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| ") and "recipe" not in line] == [
        *(["| one", "4"], ["| same", "0"], ["| same", "1"], ["| same", "mean"]),  # by the difference from the control
        *(["| clear", "0"], ["| clear", "1"], ["| clear", "2"]),
    ]
    assert "30.0 (spread 1.2)" in text and "| same | mean | - | - | - | - | - | 0.500 | - | - | a CPU |" in lines
    assert text.count("**") == 2 and "(mean **-3.0 [-3.2, -2.8]**, beyond the interval)" in text
    assert "-1.0 / -8.0 (mean -4.5 [-49.0, +40.0], on every seed, but the interval includes 0)" in text
    assert "at T = 1 -94.0 (one seed)." in text


def test_what_cannot_be_compared_has_its_own_table() -> None:
    here, there = entry(seed(0, 1.0, 2.0)), entry(seed(0, 1.0, 2.0), n_samples=1000)
    other = entry(seed(0, 1.0, 2.0), extractor="inception")
    assert page({"a": here, "b": there, "c": other}).count("\n## ") == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"who": None}, "who must be text of 1 to 300 characters (who measured it)"),
        ({"who": "  "}, "who must be text"),
        ({"recipe": "a | b"}, "recipe contains '|', which a table cannot show"),
        ({"note": "<script>"}, "note contains '<'"),
        ({"note": "x" * 301}, "note must be text of 1 to 300"),
        ({"command": "a\nb"}, r"command contains '\n'"),
        ({"n_samples": 11}, "n_samples is 11: give an integer of 12 or more"),
        ({"n_samples": True}, "n_samples is True"),
        ({"seeds": []}, "seeds must be a list of 1 to 100"),
        ({"seeds": [seed(0, 1.0, 2.0), seed(0, 1.0, 2.0)]}, "a seed appears twice"),
        ({"seeds": [seed(0, "low", 2.0)]}, "seeds[0].fd is 'low': give a number of 0 or more"),  # type: ignore[arg-type]
        ({"seeds": [seed(0, float("nan"), 2.0)]}, "seeds[0].fd is nan"),
        ({"seeds": [seed(0, -1.0, 2.0)]}, "seeds[0].fd is -1.0"),
        ({"seeds": [seed(0, 1.0, None)]}, "seeds[0].control_fd is None"),  # type: ignore[arg-type]
        ({"seeds": [seed(0, 1.0, 2.0, recall=73.5)]}, "seeds[0].recall is 73.5: give 0 to 1"),
        ({"seeds": [seed(0, 1.0, 2.0, best_fd=1.5)]}, "seeds[0].best_fd is 1.5, above fd"),
        ({"seeds": [seed(0, 1.0, 2.0, size=3)]}, "seeds[0].size is unknown"),
        ({"seeds": [{"seed": 0, "fd": 1.0}]}, "seeds[0].best_fd is missing: give null if it was not measured"),
        ({"seeds": [seed(-1, 1.0, 2.0)]}, "seeds[0].seed is -1"),
        ({"means": {"fd": 1.0}}, "means.fd is unknown: give some of recall, nll_test, seconds"),
        ({"seeds": [seed(0, 1.0, 2.0, recall=0.5)]}, "means.recall is given, but seeds have their own"),
        ({"date": "today"}, "date is unknown"),
    ],
)
def test_a_malformed_file_is_refused_with_a_sentence(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values() | changed))
    with pytest.raises(RunError) as caught:
        load_entry(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("see CONTRIBUTING.md, Adding your results")


def test_what_is_no_file_of_the_leaderboard_is_refused(tmp_path: Path) -> None:
    for text, words in (("[]", "holds no names and values"), ("{", "cannot be read"), ("{}", "is missing")):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(RunError, match=words):
            load_entry(tmp_path / "mine.json")
    with pytest.raises(RunError, match="small letters, digits"):
        load_entry(tmp_path / "My results.json")
    with pytest.raises(RunError, match="has no leaderboard files"):
        load_entries(tmp_path / "empty")
    with pytest.raises(RunError, match=r"bad\.json would be refused: who contains"):
        save_entry(tmp_path / "bad.json", entry(seed(0, 1.0, 2.0), who="`me`"))
    assert not (tmp_path / "bad.json").exists()


# The script ---------------------------------------------------------------------------------------------------------


def measured(path: Path, number: int, fd: float, **rows: Any) -> Path:
    """A run folder with a table."""
    make_tiny_run(path, seed=number)
    config = json.loads((path / "config.json").read_text())
    config["data"]["source"] = f"folder:{path.parent}/secret/images"
    (path / "config.json").write_text(json.dumps(config))
    names = {"mle": 9.0, "mle_continued": 8.0, "mle_equal_time": 7.0, "mle_equal_time_best_temperature": 6.0, "ral": fd}
    table = {name: {"fd": value, "recall": 0.5, "nll_test": 3.0} for name, value in names.items()}
    table["ral_best_temperature"] = {"fd": fd - 1, "temperature": 0.9}
    table["ral"]["fd_spread"] = 0.3
    facts = {"extractor": "encoder", "reference": "decoded training codes", "n_samples": 24, "seed": number}
    results = {"rows": table | rows, "sweeps": {}, "checkpoints": [], "seconds": {"ral": 12.0, "prior": 5.0}, **facts}
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_finished_runs_become_a_file_and_the_page(script, tmp_path: Path) -> None:
    runs = [measured(tmp_path / f"run-{number}", number, 5.0 + number) for number in (1, 0)]
    docs = tmp_path / "docs"
    shutil.copytree(DOCS / "leaderboard", docs / "leaderboard")
    flags = ["--docs", str(docs), "--name", "mine", "--hardware", "RTX 4090", "--who", "me"]
    with pytest.raises(ConfigError, match="give --data NAME"):
        script.main([*map(str, runs), *flags], Console(quiet=True))
    script.main([*map(str, runs), *flags, "--data", "secret images"], Console(quiet=True))
    found = load_entry(docs / "leaderboard" / "mine.json")
    assert found.control == "mle_equal_time" and found.data == "secret images, 32x32" and found.n_samples == 24
    assert [one["seed"] for one in found.seeds] == [0, 1]
    figures = {"fd": 5.0, "control_fd": 7.0, "best_fd": 4.0, "control_best_fd": 6.0, "best_temperature": 0.9}
    assert found.seeds[0] == {"seed": 0, **figures, "recall": 0.5, "nll_test": 3.0, "seconds": 12.0, "fd_spread": 0.3}
    assert str(tmp_path) not in (docs / "leaderboard" / "mine.json").read_text()
    assert "--data.source folder:images" in found.command or "--data folder:images" in found.command
    text = (docs / "leaderboard.md").read_text()
    assert text == page(load_entries(docs / "leaderboard")) and "secret images" in text and "RTX 4090" in text


def test_the_command_of_a_file_gives_its_settings(script) -> None:
    from ral_gym.commands.arguments import parse_train
    from ral_gym.presets import get_preset

    plain = get_preset("demo")
    assert script.recipe_of(plain) == ("demo", "ral-gym train --preset demo")
    words = ["--preset", "demo", "--ral.n-updates", "7", "--data.image-size", "32", "--vqvae.layers", "2"]
    config = parse_train([*words, "--seed", "5"]).config
    recipe, command = script.recipe_of(config)
    assert recipe == "demo, changed"
    again = parse_train(command.split()[2:]).config
    assert (again.ral, again.data, again.vqvae, again.seed) == (config.ral, config.data, config.vqvae, 0)


def test_runs_that_do_not_belong_together_or_lack_a_control_are_refused(script, tmp_path: Path) -> None:
    runs = [str(measured(tmp_path / f"run-{number}", number, 5.0)) for number in (0, 1)]
    flags = ["--docs", str(tmp_path), "--name", "mine", "--hardware", "x", "--who", "me", "--data", "d"]
    with pytest.raises(ConfigError, match="--who is missing"):
        script.main([*runs, "--name", "mine", "--hardware", "x"], Console(quiet=True))
    config = json.loads((tmp_path / "run-1" / "config.json").read_text())
    other = copy.deepcopy(config) | {"ral": config["ral"] | {"learning_rate": 0.5}}
    (tmp_path / "run-1" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="differ in more than their seed"):
        script.main([*runs, *flags], Console(quiet=True))
    results = json.loads((tmp_path / "run-0" / "results.json").read_text())
    for name in ("mle_continued", "mle_equal_time"):
        results["rows"].pop(name)
    (tmp_path / "run-0" / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match="has no row ral, or none of mle_equal_time, mle_continued"):
        script.main([runs[0], *flags], Console(quiet=True))
    assert not (tmp_path / "leaderboard").exists()
