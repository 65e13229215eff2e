"""The command line for people: what it says when it is asked what to type, and after it has done something."""

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ral_gym.commands import next_steps
from ral_gym.commands.arguments import COMMANDS, Arguments, TrainArguments, parse, parse_train
from ral_gym.commands.cli import main, train_main
from ral_gym.commands.completion import ALGORITHMS, completion_script
from ral_gym.commands.help import COMMON, flag, meaning
from ral_gym.commands.look_arguments import DemoArguments, training_words
from ral_gym.commands.next_steps import next_lines, steps_of
from ral_gym.commands.run_list import age, find_runs, read_facts
from ral_gym.presets import PRESETS
from ral_gym.registry import ALGORITHMS as REGISTERED

NAMES = [name for names in COMMON.values() for name in names]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a command prints."""
    try:
        assert main(argv) == code
    except SystemExit as caught:
        assert caught.code == code
    captured = capsys.readouterr()
    return captured.out + captured.err


# Help ---------------------------------------------------------------------------------------------------------------


def test_the_short_help_names_settings_that_exist_with_their_values(capsys) -> None:
    text = printed(capsys, "train", "--help", "--preset", "celeba128")
    assert 15 <= len(NAMES) <= 25 and len(text.splitlines()) < 80
    everything = printed(capsys, "train", "--help-all")
    for name in NAMES:
        assert f"{flag(name)} " in text and re.search(rf"{re.escape(flag(name))}\b", everything), name
    assert re.search(r"--data.image-size .*\n?.*\[128\]", text) and "[celeba128]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_setting_of_the_short_help_has_its_text() -> None:
    defaults = TrainArguments(PRESETS["demo"])
    assert meaning(defaults, "ral.n_envs").startswith("Images drawn in parallel")
    assert all(meaning(defaults, name) for name in NAMES)


def test_the_full_help_has_every_flag(capsys) -> None:
    for run in (lambda: main(["train", "--help-all"]), lambda: train_main(["--help-all"])):
        with pytest.raises(SystemExit) as caught:
            run()
        text = capsys.readouterr().out
        assert caught.value.code == 0
        assert "--ral.grpo.group-size" in text and "--gradient-accumulation" in text and "--critic.options" in text
    short = printed(capsys, "train", "-h")
    assert "--ral.grpo.group-size" not in short and "ral-gym train --help-all" in short
    count = int(re.search(r"All (\d+) settings", short)[1])  # type: ignore[index]
    assert count == len(set(re.findall(r"^[│\s]*(--[a-z][a-z0-9.-]*[a-z0-9])(?:,| )", text, re.MULTILINE)))


def test_a_mistyped_flag_suggests_the_right_one(capsys) -> None:
    text = printed(capsys, "train", "--ral.lerning-rate", "3", code=2)
    assert "--ral.lerning-rate" in text and "Perhaps you meant" in text and "--ral.learning-rate FLOAT" in text


@pytest.mark.parametrize("argv", [["train", "--preset", "dmo"], ["presets", "dmo"]])
def test_an_unknown_preset_lists_them_one_a_line(capsys, argv) -> None:
    text = printed(capsys, *argv, code=2)
    first, *lines = text.splitlines()
    assert first.startswith("error: preset 'dmo' is unknown (did you mean demo?): choose one of these")
    assert [line.split()[0] for line in lines] == list(PRESETS)
    two_levels = lines[list(PRESETS).index("demo-2level")]
    assert two_levels.split(maxsplit=1)[1].startswith("faces, 64x64 pixels as 8x8 + 16x16 codes of 128; pixelcnn")


# Completion ---------------------------------------------------------------------------------------------------------


def complete(script: Path, *words: str) -> set[str]:
    """What bash would offer for the last word."""
    lines = [f"source {script}", f"COMP_WORDS=({' '.join(repr(word) for word in words)})"]
    lines += [f"COMP_CWORD={len(words) - 1}", "_tyro_ral_gym", 'printf "%s\\n" "${COMPREPLY[@]}"']
    result = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_flags_and_names(tmp_path, capsys) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(printed(capsys, "completion", "bash"))
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert complete(script, "ral-gym", "re") == {"report", "reference"}
    assert complete(script, "ral-gym", "train", "--ral.n-u") == {"--ral.n-updates"}
    assert complete(script, "ral-gym", "train", "--preset", "celeba1") == {"celeba128", "celeba128-16x16"}
    assert complete(script, "ral-gym", "demo", "--algo", "p") == {"ppo"}


def test_the_completion_of_zsh_names_the_same(capsys) -> None:
    script = completion_script("zsh")
    assert script.startswith("#compdef ral-gym") and "'choices': ['reinforce', 'ppo'" in script
    assert all(f"'{name}'" in script for name in PRESETS.builtin)
    assert set(ALGORITHMS) <= set(REGISTERED.builtin)


# What to type next --------------------------------------------------------------------------------------------------


def test_alone_it_says_what_to_begin_with(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(capsys)
    assert "Begin:" in text and "ral-gym demo" in text and "ral-gym --help" in text
    assert list(tmp_path.iterdir()) == []


def test_alone_it_says_how_to_go_on_with_the_newest_run(capsys, tmp_path, monkeypatch, smoke_run) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke_run, tmp_path / "runs" / "old")
    begun = tmp_path / "runs" / "begun"
    begun.mkdir()
    shutil.copy(smoke_run / "config.json", begun)
    for file in (tmp_path / "runs" / "old").rglob("*"):
        os.utime(file, (1e9, 1e9))
    text = printed(capsys)
    assert "Newest of 2 run(s) in runs: runs/begun (nothing finished yet" in text
    shutil.rmtree(begun)
    text = printed(capsys)
    assert "runs/old (done: measured" in text and "ral-gym report runs/old" in text


def test_the_command_that_continues_a_run_has_its_settings(tmp_path, monkeypatch, smoke_run) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(smoke_run / "config.json", folder)
    (line,) = steps_of(read_facts(Path("runs/mine")))
    command = line.partition("   ")[0].split()
    assert command[:2] == ["ral-gym", "train"]
    again = parse_train(command[2:])
    assert again.config == read_facts(folder).config and (again.runs, again.name) == ("runs", "mine")


def test_every_command_says_what_to_try_next(smoke_run) -> None:
    silent = {"Play", "Cache", "Completion"}  # play runs until it is stopped; the others end with their own words
    kinds = {cls.__name__.removesuffix("Arguments"): cls for cls in Arguments.__args__}
    assert len(kinds) == len(COMMANDS)
    given = {"run": str(smoke_run), "folder": str(smoke_run.parent), "name": "demo", "runs": str(smoke_run.parent)}
    for kind, cls in kinds.items():
        if kind in silent | {"Import", "Push", "Pull"}:
            continue
        fields = {field.name for field in dataclasses.fields(cls)}
        arguments = object.__new__(cls)
        for name in fields & given.keys():
            setattr(arguments, name, given[name])
        if kind in ("Train", "Demo"):
            arguments.name, arguments.dry_run = "smoke", False
        lines = next_lines(arguments)
        assert lines and all("ral-gym" in line or "open" in line for line in lines), kind


def test_a_finished_run_ends_with_what_to_try(smoke_run, smoke_options, capsys, monkeypatch) -> None:
    argv = [*smoke_options, "--runs", str(smoke_run.parent)]
    assert train_main(argv) == 0
    assert "Next:" not in capsys.readouterr().out  # a program reads it
    monkeypatch.setattr(next_steps, "is_for_people", lambda console: True)
    assert train_main(argv) == 0
    out = capsys.readouterr().out
    assert "real_mle_ral.png" in out and f"ral-gym report {smoke_run}" in out.partition("Next:")[2]


# The demo -----------------------------------------------------------------------------------------------------------


def test_the_demo_is_a_training_of_the_same_settings() -> None:
    assert parse_train(training_words(DemoArguments())) == parse_train([])
    asked = parse(["demo", "--algo", "ppo", "--seed", "2", "--runs", "x", "--quiet", "--device", "cpu"])
    assert isinstance(asked, DemoArguments)
    words = ["--algo", "ppo", "--seed", "2", "--runs", "x", "--quiet", "--device", "cpu"]
    assert parse_train(training_words(asked)) == parse_train(words)


def test_the_demo_trains_and_is_continued(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(next_steps, "PICTURE", "samples/x.png")
    seen: list[TrainArguments] = []
    monkeypatch.setattr("ral_gym.commands.cli.train", lambda arguments, console: seen.append(arguments))
    assert main(["demo", "--preset", "smoke", "--runs", str(tmp_path)]) == 0
    assert seen[0].config == PRESETS["smoke"] and seen[0].name == "smoke"


# The runs of a folder -----------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first(tmp_path, capsys, smoke_run) -> None:
    for name in ("done", "half", "broken"):
        shutil.copytree(smoke_run, tmp_path / name)
    for file in (tmp_path / "done").rglob("*"):
        os.utime(file, (1e9, 1e9))
    (tmp_path / "half" / "policy.safetensors").unlink()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "broken" / "results.json").write_text("[1]")
    (tmp_path / "other").mkdir()
    found = {facts.path.name: facts for facts in find_runs(tmp_path)}
    assert list(found)[-1] == "done" and set(found) == {"done", "half", "broken"}
    assert [found[name].stage for name in ("done", "half", "broken")] == ["measured", "prior", "-"]
    done = found["done"]
    assert done.size == sum(file.stat().st_size for file in (tmp_path / "done").rglob("*") if file.is_file())
    assert done.fd is not None and done.fd_before is not None and found["broken"].fd is None
    text = printed(capsys, "runs", str(tmp_path))
    row = next(line for line in text.splitlines() if line.startswith("done"))
    assert re.search(r"done +smoke +reinforce +measured +\d+ d +[\d.]+ MB", row) and f"{done.fd:.4g}" in row


def test_a_folder_without_runs_is_said_to_be_one(tmp_path, capsys) -> None:
    assert "holds no runs" in printed(capsys, "runs", str(tmp_path), code=2)
    assert "holds no runs" in printed(capsys, "runs", str(tmp_path / "none"), code=2)


def test_ages_are_short(monkeypatch) -> None:
    monkeypatch.setattr("ral_gym.commands.run_list.time.time", lambda: 1e6)
    assert [age(1e6 - seconds) for seconds in (5, 90, 7200, 200_000)] == ["5 s", "1 min", "2 h", "2 d"]
