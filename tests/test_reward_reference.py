"""Rewards against statistics of real images: equal to those against the images, and refused where they do not fit."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ral_gym.agents.rewards.composite import CompositeReward
from ral_gym.agents.train_ral import make_stage, train_ral
from ral_gym.commands.cli import main
from ral_gym.errors import ConfigError, RunError
from ral_gym.metrics import EncoderFeatures, PyramidFeatures
from ral_gym.registry import REWARDS
from ral_gym.rewards.distribution import FORMS, FrechetReward
from ral_gym.rewards.moments import Moments
from ral_gym.rewards.options import check_terms
from ral_gym.rewards.reference import load_reference, reference_of, save_reference
from ral_gym.rewards.terms import RewardTerm
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.reference import run_reference
from ral_gym.tokenizers.base import encoder_features
from ral_gym.tokenizers.code_set import CodeSet
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")
EXTRACTOR = EncoderFeatures(torch.nn.Identity(), 5)


def features(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 5, generator=generator).double()
    return torch.randn(n, 5, generator=generator).double() @ mixing + 2


@pytest.mark.parametrize("components", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_rewards_by_statistics_are_those_by_the_images(tmp_path: Path, form: Any, components: int | None) -> None:
    real = features(50, seed=0)
    save_reference(tmp_path / "stats.npz", Moments.of(real, EXTRACTOR))
    by_images = FrechetReward(real, form, ema=0.5, components=components)
    by_file = FrechetReward(load_reference(tmp_path / "stats.npz"), form, ema=0.5, components=components)
    for seed in (1, 2, 3):
        batch = features(12, seed)
        expected, earned = by_images(batch), by_file(batch)
        assert (earned - expected).abs().max() < 1e-9 * expected.abs().max()
        assert by_file.distance == pytest.approx(by_images.distance, rel=1e-9)
    assert expected.std() > 0.1


def test_variances_are_enough_for_the_diagonal_form_only() -> None:
    real = features(50, seed=0)
    moments = Moments.of(real, EXTRACTOR)
    variances = replace(moments, covariance=moments.covariance.diagonal())
    batch = features(12, seed=1)
    assert torch.allclose(FrechetReward(variances, "diagonal")(batch), FrechetReward(real, "diagonal")(batch))
    for form in ("exact", "first_order"):
        with pytest.raises(ConfigError, match="has variances only: the reward loo_fd_diagonal uses these"):
            FrechetReward(variances, form)


def test_moments_of_batches_are_those_of_the_whole_set() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (150, 3, 16, 16), dtype=np.uint8))
    extractor = PyramidFeatures()
    in_batches, whole = reference_of(images.split(11), extractor), Moments.of(extractor(images), extractor)
    assert in_batches.n == whole.n == 150
    assert torch.allclose(in_batches.mean, whole.mean, rtol=1e-6)
    assert torch.allclose(in_batches.covariance, whole.covariance, rtol=1e-5, atol=1e-9)


def test_the_file_is_that_of_common_fid_implementations(tmp_path: Path) -> None:
    real = features(20, seed=0)
    save_reference(tmp_path / "stats.npz", Moments.of(real, EXTRACTOR))
    with np.load(tmp_path / "stats.npz") as found:
        assert np.allclose(found["sigma"], np.cov(real.numpy(), rowvar=False))
        assert np.allclose(found["mu"], real.numpy().mean(0))
        assert (int(found["n"]), str(found["extractor"])) == (20, "encoder")


# Files ----------------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"mu": np.zeros(3), "sigma": np.eye(3), "n": np.int64(9), "extractor": np.array("pyramid")}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extractor": None}, "has no extractor: it needs mu, sigma, n and extractor"),
        ({"mu": None}, "has no mu"),
        ({"n": np.int64(2)}, "n is no number of 3 or more images"),
        ({"n": np.array([9])}, "n is no number of 3 or more images"),
        ({"extractor": np.int64(3)}, "extractor and weights are not text"),
        ({"sigma": np.eye(2)}, r"mu is \(3,\) and sigma \(2, 2\): give \(F,\), and \(F, F\) or \(F,\)"),
        ({"sigma": np.eye(3) * np.nan}, "NaN or infinite"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "no covariance: it is not symmetric"),
        ({"sigma": -np.eye(3)}, "a variance below 0"),
        ({"mu": np.array([object()] * 3, dtype=object)}, "cannot be read as a NumPy archive .*holds objects"),
        ({"extractor": np.array("x" * 300)}, "more than 200 characters"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **{name: value for name, value in (GOOD | changed).items() if value is not None})
    with pytest.raises(ConfigError, match=message) as caught:
        load_reference(path)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(ConfigError, match=r"stats\.npz does not exist"):
        load_reference(path)
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot be read as a NumPy archive"):
        load_reference(path)


def test_a_header_cannot_ask_for_more_than_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
    with pytest.raises(ConfigError, match="another size than its header says"):
        load_reference(path)


def test_other_features_are_refused(tmp_path: Path) -> None:
    paths = [make_tiny_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    one, other = (load_vqvae(Run(path, read_config(path))) for path in paths)
    own = encoder_features(one)
    moments = Moments.of(torch.randn(9, own.num_features), own)
    moments.check(own)
    with pytest.raises(ConfigError, match="another tokenizer's encoder features"):
        moments.check(encoder_features(other))
    with pytest.raises(ConfigError, match="statistics of encoder features, but the rewards see pyramid features"):
        moments.check(PyramidFeatures())
    with pytest.raises(ConfigError, match=r"statistics of 3 features, but encoder gives \d+ here"):
        replace(moments, mean=moments.mean[:3]).check(own)


# Runs -----------------------------------------------------------------------------------------------------------------


def stage_2(path: Path, **ral: Any) -> Run:
    make_tiny_run(path)
    config = read_config(path)
    settings = {"n_envs": 8, "n_updates": 2, "reset_mode": "full", "reward_weights": {"loo_fd": 1.0}} | ral
    config = replace(config, ral=replace(config.ral, **settings))
    (path / "critic.safetensors").unlink()
    (path / "config.json").write_text(config.to_json())
    return Run(path, config)


def parts(run: Run) -> tuple[Any, ...]:
    return run, load_vqvae(run), load_generator(run, "prior"), CodeSet.load(run.file("codes.safetensors")), CPU


@pytest.mark.parametrize("name", ["encoder", "pyramid"])
def test_a_run_is_rewarded_by_its_statistics_as_by_its_images(tmp_path: Path, name: str, capsys: Any) -> None:
    stats = tmp_path / "stats.npz"
    curves = []
    for given in (None, str(stats)):
        run = stage_2(tmp_path / f"run{len(curves)}", reward_reference=given, reward_features=name)
        if given is None:
            assert main(["reference", str(run.path), "--features", name, "--output", str(stats), "--quiet"]) == 0
            assert f"{name} features of 12 images" in capsys.readouterr().out
        train_ral(*parts(run), progress=False)
        curves.append([line["reward/loo_fd_distance"] for line in run.metrics("ral")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][0] != curves[0][1]


def test_the_default_file_lies_in_the_run_and_other_images_may_be_named(tmp_path: Path) -> None:
    from PIL import Image

    run = make_tiny_run(tmp_path / "run")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 40), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:02}.png")
    images = ["--data", f"folder:{tmp_path / 'images'}", "--n", "5", "--device", "cpu", "--quiet"]
    assert main(["reference", str(run), "--features", "pyramid", *images]) == 0
    found = load_reference(run / "reference_pyramid.npz")
    assert (found.n, found.extractor, len(found.mean)) == (5, "pyramid", PyramidFeatures().num_features)
    own = run_reference(run, "pyramid", device="cpu")
    assert own.n == 12
    assert (own.mean - found.mean).abs().max() > 0


def test_a_world_without_real_codes_is_rewarded_by_statistics(tmp_path: Path) -> None:
    run = stage_2(tmp_path / "run")
    save_reference(tmp_path / "stats.npz", run_reference(run.path, device="cpu"))
    model: Any = make_stage(*parts(run), progress=False).model
    model.env.world = model.env.core.world = replace(model.env.world, real_codes=None)
    with pytest.raises(ConfigError, match=r"or give statistics of real images \(ral.reward_reference\)"):
        CompositeReward({"loo_fd": 1.0}).init_callback(model)
    reward = CompositeReward({"loo_fd": 1.0}, statistics=load_reference(tmp_path / "stats.npz"))
    model.learn(1, callback=reward)
    assert reward.terms[0].function(4).distance > 0


def test_statistics_that_no_reward_can_use_are_refused_before_stage_1(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **GOOD)

    def check(**ral: Any) -> None:
        config = read_config(make_tiny_run(tmp_path / "run"))
        given = {"reward_reference": str(path), "reset_mode": "full", "reward_features": "pyramid"} | ral
        config = replace(config, ral=replace(config.ral, **given))
        config.check()
        check_terms(config, [RewardTerm(name, REWARDS.get(name)) for name in config.ral.reward_weights])

    check(reward_weights={"loo_fd": 1.0})
    with pytest.raises(ConfigError, match="no reward compares to statistics"):
        check(reward_weights={"kid": 1.0})
    with pytest.raises(ConfigError, match=r"statistics of pyramid features, but ral.reward_features is encoder"):
        check(reward_weights={"loo_fd": 1.0}, reward_features="encoder")
    with pytest.raises(ConfigError, match=r"ral.reset_mode is mixed, which stops some early: give .* full or continue"):
        check(reward_weights={"loo_fd": 1.0}, reset_mode="mixed")
    np.savez(path, **GOOD | {"sigma": np.ones(3)})
    check(reward_weights={"loo_fd_diagonal": 1.0})
    with pytest.raises(ConfigError, match="has variances only, which loo_fd_diagonal can use; loo_fd needs"):
        check(reward_weights={"loo_fd_diagonal": 1.0, "loo_fd": 1.0})


def test_a_run_goes_on_with_the_same_statistics_only(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    run = stage_2(tmp_path / "run", reward_reference=str(path), n_updates=1)
    moments = run_reference(run.path, device="cpu")
    save_reference(path, moments)
    train_ral(*parts(run), progress=False)
    run.file("policy.safetensors").unlink()
    moved = path.rename(tmp_path / "moved.npz")
    again = Run(run.path, replace(run.config, ral=replace(run.config.ral, reward_reference=str(moved))))
    train_ral(*parts(again), progress=False)
    run.file("policy.safetensors").unlink()
    save_reference(moved, replace(moments, mean=moments.mean + 1))
    with pytest.raises(
        RunError, match=r"rewarded with another file as ral.reward_reference \(the file is not that of rewards"
    ):
        train_ral(*parts(again), progress=False)
