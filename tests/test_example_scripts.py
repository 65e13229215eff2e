"""The scripts about algorithms run: any of them on one task, PPO and RAL without SB3, and through rl_zoo3."""

import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from stable_baselines3 import A2C, PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ral_gym.agents import PriorPolicy
from ral_gym.assets import asset_path

pytestmark = pytest.mark.commands
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments: object, cwd: Path) -> str:
    """The standard output of a Python command with warnings as errors."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("swap_algorithm")


def swap_flags(runs: Path, *more: str) -> list[str]:
    sizes = ["--images", "30", "--n-envs", "8", "--evaluation-images", "8", "--seeds", "0", "1"]
    return ["--runs", str(runs), "--quiet", "--env", "ral_gym/Toy-v0", *sizes, *more]


def test_every_algorithm_swaps_in_from_the_same_start_with_the_same_images(swap, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    swap.main(swap_flags(tmp_path, "--algos", *swap.ALGORITHMS), console)
    folder = tmp_path / "swap_algorithm"
    summary = json.loads((folder / "results.json").read_text())["ral_gym/Toy-v0"]
    assert set(summary) == set(swap.ALGORITHMS)
    for algo, runs in summary.items():
        assert [result["seed"] for result in runs] == [0, 1]
        assert {result["images"] for result in runs} == {32}  # 30, in rounds of 8
        assert all(len(result["curve"]["reward"]) == 32 for result in runs)
        values = algo in ("dqn", "qrdqn")
        assert all((result["final"]["entropy"] is None) == values for result in runs)
        assert values or [result["start"] for result in runs] == [result["start"] for result in summary["reinforce"]]
        assert values or all(result["start"]["entropy"] != result["final"]["entropy"] for result in runs)
    assert (folder / "ral_gym-Toy-v0" / "learning_curves.png").stat().st_size > 10_000
    text, table = console.export_text(), (folder / "table.md").read_text()
    assert "32 images, seeds 0, 1" in text
    assert all(re.search(rf"^ *{algo} +\S+ ± \S+ ", text, re.M) for algo in summary), text
    assert all(re.search(rf"^\| {algo} \| \S+ ± \S+ \|.* / \S+ \|$", table, re.M) for algo in summary), table
    assert "dqn and qrdqn: from scratch, without the prior" in text


def test_on_the_oracle_the_figure_is_the_divergence_from_it(swap, tmp_path: Path) -> None:
    flags = swap_flags(tmp_path, "--env", "ral_gym/Oracle-v0", "--algos", "reinforce", "a2c", "--images", "16")
    swap.main(flags, Console(quiet=True))
    summary = json.loads((tmp_path / "swap_algorithm" / "results.json").read_text())["ral_gym/Oracle-v0"]
    for runs in summary.values():
        for result in runs:
            assert 0.3 < result["start"]["kl"] < 0.5 and result["final"]["kl"] != result["start"]["kl"]
            # What the rollouts' log o - log pi say of the same divergence, by a few images.
            assert len(result["curve"]["kl"]) == len(result["curve"]["reward"]) == 16
            assert sum(result["curve"]["kl"]) / 16 == pytest.approx(result["start"]["kl"], abs=0.15)
    table = (tmp_path / "swap_algorithm" / "table.md").read_text()
    assert re.search(r"^\| algorithm \| KL to oracle \| reward \|.*\| kl, per seed \|$", table, re.M)
    assert re.search(r"^\| \(start\) \| 0\.[34]\d+ ± \S+ \| -2\d\d", table, re.M)


def test_a_finished_pair_is_kept_and_other_settings_are_refused(swap, tmp_path: Path) -> None:
    flags = swap_flags(tmp_path, "--algos", "reinforce")
    swap.main(flags, Console(quiet=True))
    pair = tmp_path / "swap_algorithm" / "ral_gym-Toy-v0" / "reinforce-seed1.json"
    written = pair.stat().st_mtime_ns
    swap.main([*flags, "--seeds", "1", "2"], Console(quiet=True))
    assert pair.stat().st_mtime_ns == written
    with pytest.raises(swap.RunError, match=r"learning_rate: None there, 0.01 here.*choose another --runs"):
        swap.main([*flags, "--learning-rate", "0.01"], Console(quiet=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algos", "ppo", "sac"], "'sac' acts in continuous spaces only"),
        (["--algos", "alphago"], "'alphago' is unknown: choose one of reinforce, ppo"),
        (["--env", "ral_gym/Toi-v0"], "environment 'ral_gym/Toi-v0' is unknown: choose one of ral_gym/Toy-v0"),
        (["--env", "ral_gym/LatentCode-v0"], "give --run runs/NAME"),
        (["--images", "0"], "at least one"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(swap, flags, message, tmp_path: Path, capsys) -> None:
    assert swap.run_command(swap.main, ["--runs", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ppo_single_file_learns_without_sb3(tmp_path: Path) -> None:
    text = run(EXAMPLES / "ppo_single_file.py", "--total-timesteps", 10 * 1024, "--save-model", cwd=tmp_path)
    source = (EXAMPLES / "ppo_single_file.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (stable_baselines3|sb3_contrib|ral_gym\.agents)", source, re.M)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"ral_gym-Toy-v0__ppo_single_file__1__\d+", folder.name)
    assert (folder / "prior.safetensors").stat().st_size > 1000
    events = EventAccumulator(str(folder)).Reload()
    names = {"charts/episodic_return", "charts/SPS", "losses/value_loss", "losses/approx_kl", "losses/entropy"}
    assert names <= set(events.Tags()["scalars"])
    returns = [event.value for event in events.Scalars("charts/episodic_return")]
    assert len(returns) == 10 and np.mean(returns[:2]) < 0.25 and returns[-1] > 0.3  # random images score 0.18
    assert max(event.value for event in events.Scalars("charts/episodic_length")) == 16
    assert "640 images" in text and "solved from 0.9 on" in text


RAL_SIZES = ["--num-envs", "16", "--total-timesteps", str(2 * 16 * 64), "--critic-warmup", "4", "--critic-steps", "2"]
RAL_SIZES += ["--augmented-passes", "1", "--eval-samples", "32", "--eval-extractor", "encoder", "--save-model"]


def test_ral_single_file_shows_all_of_ral_without_sb3(tmp_path: Path) -> None:
    source = (EXAMPLES / "ral_single_file.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (stable_baselines3|sb3_contrib|ral_gym\.agents)", source, re.M)
    assert len(source.splitlines()) <= 300
    text = run(EXAMPLES / "ral_single_file.py", *RAL_SIZES, "--tensorboard", cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"ral_gym-Faces-v0__ral_single_file__1__\d+", folder.name)
    events = EventAccumulator(str(folder)).Reload()
    names = {"critic/heldout_auc", "charts/score", "losses/policy_loss", "losses/entropy", "losses/mle_loss"}
    assert names <= set(events.Tags()["scalars"])
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([2e-4, 1e-4])
    found = re.search(r"^FD (\S+) -> (\S+) \(MLE prior -> RAL, temperature 1, encoder features, 32 images", text, re.M)
    assert found and found[1] != found[2], text
    before = load_file(asset_path("faces/prior.safetensors"))
    after = load_file(folder / "prior.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == set(before)


def test_the_control_of_ral_single_file_trains_no_critic(tmp_path: Path) -> None:
    text = run(EXAMPLES / "ral_single_file.py", *RAL_SIZES, "--pg-coef", "0", "--mle-coef", "1", cwd=tmp_path)
    assert re.search(r"^FD \S+ -> \S+ \(MLE prior -> MLE continued, ", text, re.M), text
    assert "losses/mle_loss" in text and "critic" not in text


def test_rl_zoo3_trains_with_the_configuration(tmp_path: Path) -> None:
    """The real command line, once per algorithm, in one process."""
    options = ["--env", "ral_gym/Toy-v0", "--gym-packages", "ral_gym", "-conf", str(EXAMPLES / "rl_zoo3_conf.py")]
    options += ["-n", "512", "--eval-freq", "-1", "-f", str(tmp_path), "--device", "cpu", "--seed", "1"]
    code = f"""
        import sys
        from rl_zoo3.train import train
        for algo in ("ppo", "a2c", "trpo", "dqn", "qrdqn"):
            sys.argv = ["train", "--algo", algo, *{options!r}]
            train()
        sys.argv = ["train", "--algo", "sac", *{options!r}]
        try:
            train()
        except ValueError as error:
            print(error)
    """
    text = run("-c", textwrap.dedent(code), cwd=tmp_path)
    assert "algorithm 'sac' acts in continuous spaces only" in text
    for algo, cls in {"ppo": PPO, "a2c": A2C}.items():
        folder = tmp_path / algo / "ral_gym-Toy-v0_1"
        model = cls.load(folder / "ral_gym-Toy-v0.zip", device="cpu")
        assert model.num_timesteps == 512 and type(model.policy) is PriorPolicy
        saved = yaml.load((folder / "ral_gym-Toy-v0" / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
        assert dict(saved)["rollout_buffer_class"].__name__ == "EpisodeRolloutBuffer"
        assert (folder / "ral_gym-Toy-v0" / "config.yml").stat().st_size < 10_000  # no weights in it
    assert {path.name for path in tmp_path.iterdir()} == {"ppo", "a2c", "trpo", "dqn", "qrdqn"}
