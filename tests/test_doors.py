"""Names of parts: which words of a command line let code in, and what a run folder can name without being believed."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from ral_gym import registry
from ral_gym.commands.cli import main
from ral_gym.registry import allow_given


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(registry, "_allowed", set())


@pytest.mark.parametrize(
    "words, names",
    [
        ("train --algo a:A --data=b:B:images.npy --prior.kind c.d:C", {"a:A", "b:B", "c.d:C"}),
        ("train --ral.reward_weights critic 1 a:A 0.5 b:B 2 --seed 3", {"a:A", "b:B"}),
        (
            "train --evaluation.metrics a:A b:B --evaluation.extractor=c:C --critic.kind d:D",
            {"a:A", "b:B", "c:C", "d:D"},
        ),
        ("train --preset a:A --plugin b:B c --vqvae.kind d:D --vqvae.options block e:E", {"a:A", "b:B", "d:D", "e:E"}),
        ("--algos reinforce a:A", {"a:A"}),
        ("presets a:A", {"a:A"}),
        ("sample a:A --plugin b:B", {"b:B"}),
        ("sample a:A --output b:B --codes c:C --device d:D", set()),
        ("complete a:A b:B --seeds 4", set()),
        ("report a:A", set()),
        ("train --start-from a:A --name b:B --runs c:C --data.cache-dir d:D --start_from=e:E", set()),
        ("train --data folder:images --data.source=hf:name:train", set()),
        ("train --data folder:images --data.test a:A:held_out.npy", {"a:A"}),
        ("train --data folder:images --data.test=folder:held_out", set()),
    ],
)
def test_only_flags_that_name_parts_let_them_in(words: str, names: set[str]) -> None:
    """A path may look like a name: a stranger chooses the names of the files that are typed here."""
    allow_given(shlex.split(words))
    assert registry._allowed == names


def test_every_registry_can_be_asked_by_a_flag() -> None:
    """A flag for a new kind of part is known to `allow_given`."""
    settings = [
        *("data.source", "data.test", "vqvae.kind", "prior.kind", "critic.kind", "ral.reward-weights", "ral.algo"),
        *("evaluation.extractor", "evaluation.metrics"),
    ]
    for setting in settings:
        allow_given([f"--{setting}", f"{setting.replace('.', '_').replace('-', '_')}:Mine"])
    assert len(registry._allowed) == len(settings)
    known = [one for one in vars(registry).values() if isinstance(one, registry.Registry)]
    assert len(known) == len(settings)  # a source has two flags; presets are no setting


def test_a_run_folder_whose_path_is_a_name_imports_nothing(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unpacked archive: a folder called hostile_part:Bad, whose files name the module that lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile_part.py").write_text("class Bad: pass\n")
    run = shutil.copytree(smoke_run, tmp_path / "hostile_part:Bad")
    config = (run / "config.json").read_text()
    for old in ('"kind": "patch"', '"algo": "reinforce"', '"extractor": "encoder"', '"source": "faces"'):
        assert old in config
        (run / "config.json").write_text(config.replace(old, old.split(":")[0] + ': "hostile_part:Bad"'))
        for words in (["report"], ["evaluate"], ["train", "--name", "again", "--start-from"]):
            main([*words, run.name])
            assert "hostile_part" not in sys.modules, (old, words)
        assert "is code that a file names" in capsys.readouterr().err


PARTS = """
from torch import nn
from ral_gym.rewards.terms import reward

number = 3

@reward("seen", sees="features")
def seen(features):
    return features.mean(1)

class Own(nn.Module):
    pass

class Critic(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
"""


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--ral.reward-weights critic 1 late_parts:nothing 1", "module late_parts has no nothing"),
        ("--ral.reward-weights missing_parts:bright 1", "importing missing_parts failed"),
        ("--ral.reward-weights late_parts:number 1", "reward 'late_parts:number' is"),
        (
            "--plugin late_parts --ral.reward-weights seen 1 --vqvae.kind late_parts:Own",
            "choose --ral.reward-features",
        ),
        ("--critic.kind late_parts:nothing", "module late_parts has no nothing"),
        ("--critic.kind late_parts:number", "critic 'late_parts:number' is"),
        ("--critic.kind late_parts:Critic", "cannot be made (missing a required argument: 'width')"),
        ("--critic.kind late_parts:Critic --critic.options depth 3", "takes no depth"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_before_stage_1(
    flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "late_parts", raising=False)
    for registered in (registry.REWARDS, registry.CRITICS, registry.TOKENIZERS):
        monkeypatch.setattr(registered, "_parts", dict(registered._parts))
    run = ["--preset", "smoke", "--quiet", "--runs", str(tmp_path), "--name", "r"]
    assert main(["train", *run, *flags.split()]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "r").exists()
