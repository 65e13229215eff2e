"""`ral-gym verify`: it finds what does not belong to the saved weights, and leaves the run folder as it was."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ral_gym.commands.arguments import VerifyArguments, parse
from ral_gym.commands.cli import main
from ral_gym.commands.verify import Comparison, compare, flat_rows
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import load_json, load_tensors, save_json, save_tensors
from tests.tiny import make_tiny_run

QUICK = ["--device", "cpu", "--quiet"]


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return shutil.copytree(smoke_run, tmp_path / "smoke")


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Everything in a folder: dates and bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def saved_rows(run: Path) -> dict[str, Any]:
    return flat_rows(load_json(run / "results.json"), Run(run, read_config(run)))


# The command --------------------------------------------------------------------------------------------------------


def test_a_finished_run_agrees_and_nothing_in_it_is_touched(smoke_run, capsys) -> None:
    before = contents(smoke_run)
    assert main(["verify", str(smoke_run), *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.splitlines()[-1] == "All agree."
    assert contents(smoke_run) == before
    compared, rows = re.findall(r"([\d,]+) metrics of (\d+) rows measured again", captured.out)[0]
    assert int(rows) == len(saved_rows(smoke_run)) > 12 and int(compared.replace(",", "")) > 10 * int(rows)
    assert "largest difference: 0 of a metric" in captured.out


def test_a_changed_weight_file_is_found(run, capsys) -> None:
    file = run / "policy_ema.safetensors"
    tensors, metadata = load_tensors(file)
    save_tensors(file, {name: tensor * 1.01 for name, tensor in tensors.items()}, metadata)
    before = contents(run)
    assert main(["verify", str(run), "--rows", "mle", "ral", *QUICK]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    # The rows of the other generator agree, and so does everything that the policy has no part in.
    assert line.startswith("error: ") and "differ from results.json, in ral;" in line and "--tolerance" in line
    lines = [words for words in map(str.split, captured.out.splitlines()) if words[:1] == ["ral"]]
    found = {words[1]: words[2:] for words in lines}
    saved = saved_rows(run)["ral"]
    assert found["nll_test"][0] == f"{saved['nll_test']:.6g}" and float(found["nll_test"][2]) != 0
    assert "entropy" in found and "n" not in found and not re.search(r"^mle ", captured.out, re.MULTILINE)
    assert contents(run) == before


def test_an_edited_result_is_found_at_any_tolerance_that_is_smaller(run, capsys) -> None:
    results = load_json(run / "results.json")
    row = results["rows"]["mle"]
    low, high = row["intervals"]["fd"]
    row["fd"] += 0.3 * (high - low) / 2
    save_json(run / "results.json", results)
    command = ["verify", str(run), "--rows", "mle", *QUICK]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "1 metrics differ from results.json, in mle" in captured.err and "0.30" in captured.out
    assert main([*command, "--tolerance", "0.4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "All agree."


def test_what_cannot_be_verified_is_one_line(run, tmp_path, capsys) -> None:
    def refused(path: Path, *options: str) -> str:
        assert main(["verify", str(path), *QUICK, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    assert "is not a run folder" in refused(tmp_path)
    assert "has no results.json to verify: ral-gym evaluate" in refused(make_tiny_run(tmp_path / "tiny"))
    assert "has no row nobody: choose among mle" in refused(run, "--rows", "nobody")
    assert "--tolerance is -1.0" in refused(run, "--tolerance", "-1")
    file, results = run / "policy.safetensors", (run / "results.json").read_bytes()
    file.write_bytes(file.read_bytes()[:-100])
    assert "policy.safetensors is damaged" in refused(run)
    file.unlink()
    assert "policy.safetensors is missing" in refused(run)
    for damage in (b"{", b"[]", b'{"rows": {"mle": {"fd": "x"}}, "sweeps": {}, "checkpoints": []}', b'{"rows": {}}'):
        (run / "results.json").write_bytes(damage)
        assert "results.json" in refused(run)
    (run / "results.json").write_bytes(results)


def test_the_arguments_are_parsed() -> None:
    assert parse(["verify", "runs/x"]) == VerifyArguments("runs/x")
    assert parse(["verify", "runs/x", "--rows", "mle", "ral", "--tolerance", "0.5", "--quiet"]) == VerifyArguments(
        "runs/x", rows=("mle", "ral"), tolerance=0.5, quiet=True
    )


# The comparison -----------------------------------------------------------------------------------------------------

ROWS = {
    "mle": {"fd": 20.0, "kid": -0.5, "n": 2000, "nll_new_people": None, "intervals": {"fd": [19.0, 21.0]}},
    "ral": {"fd": 10.0, "n": 2000, "intervals": {"fd": [9.0, 11.0]}},
}


def changed(*path: str, to: Any) -> dict[str, Any]:
    """The rows with one value changed; `...` removes it."""
    rows: Any = copy.deepcopy(ROWS)
    inner = rows
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return rows


def found(comparison: Comparison) -> list[tuple[str, str]]:
    return [(difference.row, difference.metric) for difference in comparison.differences]


def test_equal_rows_agree() -> None:
    comparison = compare(ROWS, copy.deepcopy(ROWS))
    assert (found(comparison), comparison.compared, comparison.largest) == ([], 6, 0.0)


@pytest.mark.parametrize(
    ("again", "tolerance", "expected"),
    [
        (changed("mle", "fd", to=20.0 * (1 + 5e-7)), 0.0, []),
        (changed("mle", "fd", to=20.0 * (1 + 5e-6)), 0.0, [("mle", "fd")]),
        (changed("mle", "fd", to=20.4), 0.5, []),
        (changed("mle", "fd", to=20.6), 0.5, [("mle", "fd")]),
        (changed("mle", "kid", to=-0.505), 0.5, []),  # no interval: 0.02 stands for half of one
        (changed("mle", "kid", to=-0.52), 0.5, [("mle", "kid")]),
        (changed("mle", "n", to=1999), 99.0, [("mle", "n")]),
        (changed("mle", "nll_new_people", to=4.0), 99.0, [("mle", "nll_new_people")]),
        (changed("mle", "kid", to=None), 99.0, [("mle", "kid")]),
        (changed("mle", "kid", to=...), 99.0, [("mle", "kid")]),
        (changed("mle", "intervals", "fd", to=[19.0, 21.5]), 0.0, [("mle", "fd (high)")]),
        (changed("mle", "intervals", "fd", to=...), 0.0, [("mle", "fd (low)"), ("mle", "fd (high)")]),
        (changed("ral", to=...), 99.0, [("ral", "")]),
        (changed("other", to={"fd": 1.0}), 99.0, [("other", "")]),
    ],
)
def test_what_differs_is_named(again, tolerance, expected) -> None:
    assert found(compare(ROWS, again, tolerance)) == expected


def test_figures_that_an_older_version_did_not_save_are_named_and_not_compared() -> None:
    older = {name: {key: row[key] for key in ("fd", "n")} for name, row in ROWS.items()}
    comparison = compare(older, ROWS)
    assert (found(comparison), comparison.compared) == ([], 4)
    assert comparison.unknown == ["kid", "nll_new_people", "intervals"]
