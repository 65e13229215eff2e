"""`make results`: commands side by side, their order, failures, Ctrl-C, resuming, and the document they end in."""

import importlib
import io
import json
import os
import re
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest
from evidence.results_page import fenced, fill_blocks, machine_line, table_with_figures, times_table
from evidence.schedule import Job, Schedule
from rich.console import Console

from ral_gym.commands.arguments import parse_train
from ral_gym.errors import RunError

ROOT = Path(__file__).parents[1]
PAGE = "prose\n<!-- begin demo -->\nold\n<!-- end demo -->\nmore  \n<!-- begin swap -->\n<!-- end swap -->\nend"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("make_results")


def job(name: str, code: str, **more) -> Job:
    return Job(name, ("-c", code), **more)


def stamps(folder: Path, name: str, seconds: float = 0.3, **more) -> Job:
    """A job that writes down when it began and ended."""
    code = f"""
        import pathlib, time
        began = time.time()
        time.sleep({seconds})
        pathlib.Path({str(folder / name)!r}).write_text(f"{{began}} {{time.time()}}")
    """
    return job(name, textwrap.dedent(code), **more)


def spans(folder: Path, *names: str) -> list[tuple[float, float]]:
    return [tuple(map(float, (folder / name).read_text().split())) for name in names]  # type: ignore[misc]


def console() -> Console:
    return Console(record=True, width=100, file=io.StringIO())


def test_jobs_run_side_by_side_in_order_and_alone(tmp_path: Path) -> None:
    jobs = [
        stamps(tmp_path, "bench", alone=True),
        stamps(tmp_path, "last", needs=("a", "b")),  # preferred, but not ready
        stamps(tmp_path, "a"),
        stamps(tmp_path, "b", needs=("not planned",)),
        stamps(tmp_path, "c", 0.8),
        stamps(tmp_path, "later", needs=("a", "b"), alone=True),  # ready while c runs
    ]
    schedule = Schedule(jobs, tmp_path / "results", console(), slots=2)
    states = schedule.run()
    assert next(iter(states)) == "bench" and set(states.values()) == {"done"} and len(states) == 6
    bench, last, a, b, c, later = spans(tmp_path, "bench", "last", "a", "b", "c", "later")
    assert all(one[0] >= bench[1] for one in (last, a, b, c)), "alone means alone"
    assert all(one[1] <= later[0] or one[0] >= later[1] for one in (last, a, b, c)), "also in the middle"
    assert a[0] < b[1] and b[0] < a[1], "two at once"
    assert last[0] >= max(a[1], b[1])
    events = sorted([(one[0], 1) for one in (a, b, c, last)] + [(one[1], -1) for one in (a, b, c, last)])
    running = [sum(step for _, step in events[: i + 1]) for i in range(len(events))]
    assert max(running) == 2


def test_times_add_up_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    made = tmp_path / "made"
    spin = job("spin", f"import time\nwhile time.process_time() < 0.4: pass\nopen({str(made)!r}, 'w')", makes=made)
    always = job("summary", "pass")
    folder = tmp_path / "results"
    assert Schedule([spin, always], folder, console()).run() == {"summary": "done", "spin": "done"}
    kept = json.loads((folder / "times.json").read_text())
    first = kept["jobs"]["spin"]
    assert 0.3 < first["cpu"] < 1.5 and first["wall"] > 0.2 and first["done"] and kept["elapsed"] >= first["wall"] - 0.1
    again = Schedule([spin, always], folder, console())
    assert again.unfinished == []
    assert again.run() == {"spin": "kept", "summary": "done"}
    made.unlink()  # removed: made again
    assert Schedule([spin, always], folder, console()).run()["spin"] == "done"
    times = json.loads((folder / "times.json").read_text())["jobs"]
    assert times["spin"]["sittings"] == 2 and times["spin"]["cpu"] >= first["cpu"] + 0.3
    assert times["summary"]["sittings"] == 3
    other = Job("spin", ("-c", "pass"), makes=made)  # another command: not what has been done
    assert Schedule([other], folder, console()).run() == {"spin": "done"}


def test_a_failure_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    shown = console()
    code = "print('early'); print('the reason'); raise SystemExit(2)"
    jobs = [job("bad", code), job("needs-bad", "pass", needs=("bad",)), job("further", "pass", needs=("needs-bad",))]
    schedule = Schedule([*jobs, job("good", "pass")], tmp_path, shown)
    assert schedule.run() == {"bad": "failed", "needs-bad": "left out", "further": "left out", "good": "done"}
    text = shown.export_text()
    assert "failed: bad, exit code 2" in text and "the reason" in text
    assert f"by itself: {jobs[0]}" in text
    assert "left out: further, which needs needs-bad" in text
    assert schedule.log("bad").read_text() == "early\nthe reason\n"
    assert not json.loads((tmp_path / "times.json").read_text())["jobs"]["bad"]["done"]


WORKER = """
    import pathlib, signal, sys, time
    here = pathlib.Path(sys.argv[1])
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        here.with_suffix(".begun").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        here.with_suffix(".saved").touch()
"""


def interrupt(folder: Path, number: int, *flags: str) -> str:
    """Send a signal to this process as soon as two of three jobs have begun; what the schedule says."""
    jobs = [Job(name, ("-c", textwrap.dedent(WORKER), str(folder / name), *flags)) for name in ("a", "b", "c")]

    def send() -> None:
        until = time.monotonic() + 60
        while not all((folder / f"{name}.begun").exists() for name in "ab") and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    shown, sender = console(), threading.Thread(target=send)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind a shell's &
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Schedule(jobs, folder, shown).run()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    return shown.export_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_jobs_save_and_waits_for_them(tmp_path: Path, number: int) -> None:
    assert "stopping a, b; what they have saved is kept" in interrupt(tmp_path, number)
    assert all((tmp_path / f"{name}.saved").exists() for name in "ab") and not (tmp_path / "c.begun").exists()
    times = json.loads((tmp_path / "times.json").read_text())["jobs"]
    assert {name: entry["sittings"] for name, entry in times.items()} == {"a": 1, "b": 1}


def test_a_job_that_does_not_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evidence.schedule.GRACE_SECONDS", 0.5)
    interrupt(tmp_path, signal.SIGINT, "stubborn")
    assert not (tmp_path / "a.saved").exists()
    assert not any(entry["done"] for entry in json.loads((tmp_path / "times.json").read_text())["jobs"].values())


def test_only_what_lies_between_the_markers_changes() -> None:
    filled = fill_blocks(PAGE, {"demo": "\nnew\ntable\n\n"})
    assert filled == PAGE.replace("old\n", "new\ntable\n")
    assert fill_blocks(filled, {"demo": "new\ntable"}) == filled
    assert fill_blocks(PAGE, {}) == PAGE
    assert fill_blocks("a\r\n", {}) == "a\r\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin demo -->\n", "begin demo without its end"),
        ("<!-- end demo -->\n", "line 1: end demo without its begin"),
        (
            "<!-- begin demo -->\n<!-- begin b -->\n<!-- end b -->\n<!-- end demo -->",
            "begin b appears inside the block demo",
        ),
        ("<!-- begin demo -->\n<!-- end demo -->\n" * 2, "line 3: begin demo appears for the second time"),
        ("nothing\n", "no place for demo: add <!-- begin demo -->"),
    ],
)
def test_damaged_markers_are_refused(text: str, message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        fill_blocks(text, {"demo": "x"})


def test_pieces_of_the_document(tmp_path: Path) -> None:
    folder, docs = tmp_path / "runs" / "x", tmp_path / "docs"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text("| a |\n|---|\n\nCaption.\n")
    (folder / "curve.png").write_bytes(b"png")
    text = table_with_figures(folder, {folder / "curve.png": "x_curve"}, docs)
    assert text == "| a |\n|---|\n\nCaption.\n\n![x curve](x_curve.png)"
    assert (docs / "x_curve.png").read_bytes() == b"png"
    assert fenced("python a.py", "\nb  \n  c\n") == "`python a.py`:\n\n```\nb\n  c\n```"
    entry = {"wall": 10.0, "cpu": 7.0, "sittings": 1, "done": True}
    table = times_table({"demo-seed0": entry, "demo-summary": entry, "partial_generation": entry}, 120.0)
    assert "| demo | 2 | 20 | 14 |" in table and "| partial_generation | 1 | 10 | 7 |" in table
    assert "| all | 3 | 30 | 21 |" in table and "2 minutes" in table
    machine = {"date": "today", "cpu": "Fast", "cores": 2, "memory": None, "python": "3", "torch": "2", "load": 0.1}
    assert machine_line(machine) == "Begun today at a load average of 0.1: 2 cores of Fast; Python 3, PyTorch 2."


def test_real_data_sets_are_made_only_if_named(script) -> None:
    assert not any("cifar10" in str(job) for job in script.plan(script.Arguments()))
    parts = script.Arguments(parts=("cifar10", "celeba"), seeds=(0, 1), images="/data")
    jobs = {job.name: job for job in script.plan(parts)}
    assert list(jobs) == [f"{part}-{end}" for part in parts.parts for end in ("seed0", "seed1", "summary")]
    assert "--data folder:/data/cifar10/train --test folder:/data/cifar10/test --seeds 1 " in str(jobs["cifar10-seed1"])
    assert "--preset demo-celeba --data celeba:/data/celeba_half.zip" in str(jobs["celeba-summary"])


def test_the_plan_trains_each_base_once_and_before_what_starts_from_it(script) -> None:
    jobs = {job.name: job for job in script.plan(script.Arguments())}
    assert jobs["oracle-seed1"].needs == ("base-seed1",) and "--preset demo-patchgan" in str(jobs["base-seed1"])
    assert jobs["oracle-summary"].needs == ("oracle-seed0", "oracle-seed1", "oracle-seed2")
    assert jobs["swap-seed2"].needs == () and "--seeds 2 --runs runs" in str(jobs["swap-seed2"])
    assert [name for name in jobs if name.startswith("exposure")] == ["exposure-summary"]
    assert all(jobs[name].alone for name in script.BENCHMARKS) and not jobs["gradient"].alone
    assert jobs["ablation-maps"].needs == ("base-seed0",) and "--groups maps" in str(jobs["ablation-maps"])
    some = {job.name: job for job in script.plan(script.Arguments(parts=("oracle", "ablation"), seeds=(1,)))}
    assert {name for name in some if name.startswith("base")} == {"base-seed0", "base-seed1"}
    assert some["oracle-seed1"].needs == ("base-seed1",) and some["ablation-gamma"].needs == ("base-seed0",)
    mixed = {job.name: job for job in script.plan(script.Arguments(parts=("demo", "ablation"), seeds=(1,)))}
    assert mixed["ablation-maps"].needs == ("base-seed0",) and "base-seed1" not in mixed
    for job in (*jobs.values(), *some.values()):
        assert set(job.needs) <= {*jobs, *some}


def test_scripts_take_the_flags_they_are_given(script) -> None:
    """Every planned command names a script that is there, and whose options have these names."""
    for job in script.plan(script.Arguments(seeds=(0,))):
        source = (ROOT / job.command[0]) if not Path(job.command[0]).is_absolute() else Path(job.command[0])
        if source.exists():
            flags = [flag[2:] for flag in job.command if flag.startswith("--")]
            if source.stem == "train_celeba":  # its flags are those of `ral-gym train`
                assert parse_train(job.command[1:]).config.preset == "demo-patchgan"
                continue
            text = source.read_text(encoding="utf-8")
            assert all(re.search(rf'^    {flag}: |"--{flag}"', text, re.M) for flag in flags), (source.name, flags)


def test_figures_are_called_after_their_part(script) -> None:
    names = {("ablation", "ablation.png"), ("oracle", "nll_curve.png"), ("swap", "ral_gym-Toy-v0/learning_curves.png")}
    assert {script.figure_name(part, Path(file)) for part, file in names} == {
        "results_ablation",
        "results_oracle_nll_curve",
        "results_swap_ral_gym_Toy_v0_learning_curves",
    }


def test_the_documents_have_a_place_for_every_part(script) -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    names = [*script.EXPERIMENTS, *script.BENCHMARKS, "gradient", "times", "machine"]
    fill_blocks(text, dict.fromkeys(names, "x"))


def test_from_commands_to_document(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it with two fake experiments, one of which fails at first."""
    fakes = {"demo": script.Experiment("one", from_base=False), "swap": script.Experiment("two", from_base=False)}
    monkeypatch.setattr(script, "EXPERIMENTS", fakes)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    fake = """
        import pathlib, sys
        name, runs = pathlib.Path(sys.argv[0]).stem, pathlib.Path(sys.argv[sys.argv.index("--runs") + 1])
        if name == "two" and not (runs / "mended").exists():
            raise SystemExit("error: out of luck")
        seeds = " ".join(sys.argv[sys.argv.index("--seeds") + 1 : sys.argv.index("--runs")])
        (runs / name).mkdir(exist_ok=True, parents=True)
        (runs / name / "table.md").write_text(f"{name} of seeds {seeds}")
        (runs / name / "curve.png").write_bytes(b"png")
    """
    (tmp_path / "examples").mkdir()
    for name in ("one", "two"):
        (tmp_path / "examples" / f"{name}.py").write_text(textwrap.dedent(fake))
    docs, runs = tmp_path / "docs", tmp_path / "runs"
    docs.mkdir()
    extra = "".join(f"\n<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("times", "machine"))
    (docs / "results.md").write_text(PAGE + extra)
    flags = ["--parts", "demo", "swap", "--seeds", "4", "5", "--runs", str(runs), "--docs", str(docs)]
    with pytest.raises(RunError, match="swap-seed4, swap-seed5, swap-summary failed"):
        script.main(flags, console())
    page = (docs / "results.md").read_text()
    assert "one of seeds 4 5\n\n![results demo curve](results_demo_curve.png)\n<!-- end demo -->" in page
    assert "<!-- begin swap -->\n<!-- end swap -->" in page and "| demo | 3 |" in page and "Begun 20" in page
    assert (docs / "results_demo_curve.png").read_bytes() == b"png"
    (runs / "mended").touch()
    shown = console()
    script.main(flags, shown)
    assert "2 finished before: demo-seed4, demo-seed5" in shown.export_text()
    assert "two of seeds 4 5" in (docs / "results.md").read_text()
    (runs / "one" / "table.md").write_text("by hand")
    script.main([*flags, "--assemble-only"], console())
    assert "by hand" in (docs / "results.md").read_text()
