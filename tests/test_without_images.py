"""A run imported without images: stage 3 tunes it with rewards that need none, and what needs some is refused."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym import registry
from ral_gym.agents import GRPO
from ral_gym.agents.train_ral import load_run
from ral_gym.commands.cli import main
from ral_gym.envs.from_run import run_world
from ral_gym.errors import RunError
from ral_gym.metrics import PyramidFeatures, extract
from ral_gym.presets import get_preset
from ral_gym.rewards.moments import Moments
from ral_gym.rewards.reference import save_reference
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.fork import fork_run
from ral_gym.stages.levels import load_generator
from tests.kills import killed_after
from tests.released_files import N, gpt, llamagen_files, taming_file, taming_state

SHORT = ["--ral.n-envs", "10", "--ral.n-updates", "2", "--quiet", "--ral.learning-rate", "1e-3"]
NAMES = [f"class {n}" for n in range(N)]


def bright(images: Tensor) -> Tensor:
    return images.float().mean((1, 2, 3))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `llamagen`, with names, `taming`, and `unconditional`, taming's too."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "names.txt").write_text("\n".join(NAMES))
    runs = ["--runs", str(folder)]
    assert main([*llamagen_files(folder), *runs, "--name", "llamagen", "--class-names", str(folder / "names.txt")]) == 0
    argv = taming_file(folder / "last.ckpt", taming_state())
    assert main([*argv, *runs, "--name", "taming", "--classes", str(N)]) == 0
    argv = taming_file(folder / "plain.ckpt", taming_state(gpt(classes=0)))
    assert main([*argv, *runs, "--name", "unconditional", "--classes", "0"]) == 0
    return folder


@pytest.fixture
def rewarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a reward that needs no real image; nothing that is allowed stays so."""
    module = ModuleType("bright_parts")
    module.bright = bright  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bright_parts", module)
    monkeypatch.setattr(registry, "_allowed", set())
    return ["--ral.reward-weights", "bright_parts:bright", "1"]


def start_from(source: Path, name: str, *more: str) -> list[str]:
    return ["train", "--start-from", str(source), "--runs", str(source.parent), "--name", name, *SHORT, *more]


@pytest.mark.parametrize("project", ["unconditional", "llamagen", "taming"])
def test_stage_3_tunes_an_imported_prior(project: str, imported: Path, rewarded: list[str]) -> None:
    argv = start_from(imported / project, f"{project}-grpo", "--stages", "vqvae", "prior", "ral", *rewarded)
    assert main(argv) == 0
    run = Run(imported / f"{project}-grpo", read_config(imported / f"{project}-grpo"))
    assert run.has("policy_ema.safetensors") and not run.has("prior_continued.safetensors")
    before, after = (load_generator(run, name).output.weight for name in ("prior", "policy"))
    assert not torch.equal(before, after)
    stage = load_run(run.path, "cpu", plugins=["bright_parts:bright"])
    assert stage.run_callback.updates == 2
    assert main(argv) == 0, "a finished stage is not repeated"


def test_a_frechet_reward_compares_to_statistics(imported: Path, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (300, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pyramid = PyramidFeatures()
    save_reference(tmp_path / "stats.npz", Moments.of(extract(pyramid, images), pyramid))
    given = ["--ral.reward-weights", "loo_fd", "1", "--ral.reward-features", "pyramid"]
    given += ["--ral.reward-reference", str(tmp_path / "stats.npz")]
    assert main(start_from(imported / "unconditional", "frechet", "--stages", "ral", *given)) == 0
    assert Run(imported / "frechet", read_config(imported / "frechet")).has("policy.safetensors")


def test_the_recipe_tunes_an_imported_prior_and_goes_on_bit_for_bit(imported: Path, tmp_path: Path) -> None:
    """`--preset llamagen-grpo` after --start-from: its stage 3, with the model of the run."""
    images = torch.randint(0, 256, (300, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_reference(tmp_path / "stats.npz", Moments.of(extract(PyramidFeatures(), images), PyramidFeatures()))
    recipe = get_preset("llamagen-grpo").ral
    flags = ["--preset", "llamagen-grpo", "--ral.reward-weights", "loo_fd_diagonal", "1", "--ral.n-envs", "12"]
    flags += ["--ral.reward-features", "pyramid", "--ral.reward-reference", str(tmp_path / "stats.npz")]
    flags += ["--ral.grpo.group-size", "4", "--ral.grpo.batch-size", "64", "--ral.checkpoint-every", "2"]
    flags += ["--ral.learning-rate", "1e-3", "--ral.n-updates", "6", "--stages", "ral", "--quiet"]
    runs = ["train", "--start-from", str(imported / "llamagen"), "--runs", str(imported)]
    labels: list[np.ndarray] = []
    update = GRPO.train

    def noted(model: GRPO) -> None:
        labels.append(model.rollout_buffer.codes[:, -1].copy())
        update(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPO, "train", noted)
        assert main([*runs, "--name", "whole", *flags]) == 0
    assert len(labels) == 6
    for drawn in labels:  # four images of each of three classes
        groups = drawn.reshape(3, 4)
        assert (groups == groups[:, :1]).all()
    assert len({tuple(drawn) for drawn in labels}) > 1
    whole = Run(imported / "whole", read_config(imported / "whole"))
    assert whole.config.ral.grpo == replace(recipe.grpo, group_size=4, batch_size=64)
    assert whole.config.ral.kl_coef == recipe.kl_coef and whole.config.prior.kind == "transformer"
    bonus = [line["train/ent_coef"] for line in whole.metrics("ral")]
    assert len(bonus) == 6 and len(set(bonus)) > 3
    with killed_after(3):
        main([*runs, "--name", "broken", *flags])
    assert main([*runs, "--name", "broken", *flags]) == 0
    for name in ("policy", "policy_ema"):
        files = [(imported / run / f"{name}.safetensors").read_bytes() for run in ("whole", "broken")]
        assert files[0] == files[1]


def test_the_world_has_classes_and_names_and_no_real_codes(imported: Path) -> None:
    world = run_world(str(imported / "llamagen"), reward="none")
    assert world.real_codes is None and world.grid.classes == N and world.class_names == tuple(NAMES)
    assert run_world(str(imported / "taming"), reward="none").class_names == ()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "stage evaluate compares with real images, but this run has no images (data.source none): give --stages"),
        (["--stages", "ral"], "the critic is trained on real images"),
        (["--stages", "ral", "--ral.reset-mode", "continue"], "ral.reset_mode continue continues real images"),
        (["--stages", "ral", "--ral.reset-mode", "mixed"], "ral.reset_mode mixed continues real images"),
        (["--stages", "ral", "--ral.mle-coef", "0.1"], "ral.mle_coef 0.1 is maximum likelihood on real images"),
        (["--stages", "ral", "--ral.reward-weights", "loo_fd", "1"], "the reward loo_fd compares with real images"),
        (["--stages", "ral", "--ral.reward-weights", "kid", "1"], "the reward kid compares with real images"),
    ],
)
def test_what_needs_images_is_refused_before_anything_starts(
    more: list[str], said: str, imported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(start_from(imported / "llamagen", "refused", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "or import the checkpoint again with --data" in line
    assert not (imported / "refused").exists()


def test_it_is_not_evaluated(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(imported / "llamagen")]) == 2
    assert "stage evaluate compares with real images" in capsys.readouterr().err


def test_without_images_nothing_is_trained_from_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--preset", "smoke", "--data", "none", "--stages", "vqvae", "prior", "--runs", str(tmp_path)]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no vqvae.safetensors, prior.safetensors, prior_ema.safetensors, and data.source none gives" in line
    assert not any(tmp_path.iterdir())


def test_a_file_of_a_fork_that_differs_is_refused(imported: Path, tmp_path: Path) -> None:
    source = Run(imported / "llamagen", read_config(imported / "llamagen"))
    fork_run(source, tmp_path / "fork", source.config)
    assert not (tmp_path / "fork" / "codes.safetensors").exists()
    shutil.copyfile(source.file("vqvae.safetensors"), tmp_path / "fork" / "prior.safetensors")
    with pytest.raises(RunError, match=r"was started from a prior.safetensors that differs"):
        fork_run(source, tmp_path / "fork", source.config)


def test_labels_of_groups_are_drawn_uniformly(imported: Path) -> None:
    """Without images there is no share of classes to draw from."""
    env = gym.make_vec("ral_gym/LatentCode-v0", 500, run=str(imported / "taming"), reward="none")
    labels = env.reset(seed=0)[0][:, -1]
    counts = np.bincount(labels - labels.min(), minlength=N)
    assert len(counts) == N and counts.min() > 60
