"""TensorBoard's curves and pictures of every stage, and that looking changes nothing."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ral_gym.agents import train_ral as stage_3
from ral_gym.agents.train_ral import train_ral
from ral_gym.data.images import load_images
from ral_gym.data.subsets import subset
from ral_gym.presets import SMOKE
from ral_gym.priors.two_level import split_prior
from ral_gym.runs.run import Run, random_state, read_config
from ral_gym.runs.storage import weights_of
from ral_gym.stages import boards
from ral_gym.stages import train_vqvae as stage_1
from ral_gym.stages.boards import N_IMAGES, add_grid, add_samples, due
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.train_vqvae import train_vqvae
from ral_gym.tokenizers.code_set import CodeSet, decode_codes
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def picture(event: Any) -> np.ndarray:
    return np.array(Image.open(BytesIO(event.encoded_image_string)))  # (h, w, 3)


def as_text(state: dict[str, Any]) -> str:
    return str({name: np.asarray(value, dtype=object).tolist() for name, value in state.items()})


@pytest.mark.parametrize("steps", [1, 3, 5, 20, 1501])
def test_there_are_five_grids_or_one_per_step(steps: int) -> None:
    shown = [step for step in range(1, steps + 1) if due(step, steps)]
    assert len(shown) == min(5, steps) and shown[-1] == steps


def test_a_grid_is_the_images_row_by_row(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 3, 4, 6), dtype=np.uint8)
    with SummaryWriter(str(tmp_path)) as writer:
        add_grid(writer, "a", images, step=7, columns=3)
    (event,) = events(tmp_path).Images("a")
    found = picture(event)
    assert event.step == 7 and found.shape == (8, 18, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        assert (found[4 * row :, 6 * column :][:4, :6] == images[i].transpose(1, 2, 0)).all()
    assert not found[4:, 12:].any()


def test_stage_1_shows_curves_and_reconstructions_and_is_not_changed_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMOKE, vqvae=replace(SMOKE.vqvae, training_steps=10))
    images = load_images(config.data, progress=False)
    looked, blind = (Run(tmp_path / name, config) for name in ("looked", "blind"))
    vqvae = train_vqvae(looked, images, CPU, progress=False)
    monkeypatch.setattr(stage_1, "due", lambda step, steps: False)
    monkeypatch.setattr(boards.FirstImages, "show", lambda self, step: None)
    train_vqvae(blind, images, CPU, progress=False)
    assert looked.file(boards.PROGRESS).is_file() and not blind.file(boards.PROGRESS).exists()
    assert looked.file("vqvae.safetensors").read_bytes() == blind.file("vqvae.safetensors").read_bytes()
    found = events(looked.file("tensorboard"))
    scalars = {f"vqvae/{name}" for name in ("loss", "reconstruction_error", "perplexity", "code_usage")}
    assert set(found.Tags()["scalars"]) == scalars
    shown = found.Images("vqvae/real_and_reconstruction")
    assert [event.step for event in shown] == [2, 4, 6, 8, 10]
    grid = picture(shown[-1])[:, :, 0]
    side = config.data.image_size
    real = [grid[:side, i * side :][:, :side] for i in range(N_IMAGES)]
    held_out = images.test[subset(len(images.test), N_IMAGES, seed=0)]
    assert all((one == image[0]).all() for one, image in zip(real, held_out, strict=True))
    with torch.no_grad():
        codes = torch.cat(vqvae.encode(torch.from_numpy(held_out[:1]).float() / 127.5 - 1), dim=1)
        assert (decode_codes(vqvae, codes)[0, 0].numpy() == grid[side:, :side]).all()
    assert not events(blind.file("tensorboard")).Tags()["images"]


def test_first_images_are_shown_early_and_named_once(tmp_path: Path, monkeypatch, capsys) -> None:
    seconds, written = [0.0], list[int]()
    monkeypatch.setattr(boards.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(boards, "save_first_images", lambda path, vqvae, images, step, steps: written.append(step))
    path, images = tmp_path / "progress.png", np.zeros((1, 1, 4, 4), np.uint8)
    shown = boards.FirstImages(path, None, images, steps=100, quiet=False)  # type: ignore[arg-type]
    for step in range(1, 41):
        shown.show(step)
        seconds[0] += 2.0
    assert written == [11, 20, 40]  # after 20 s, then at every grid
    assert capsys.readouterr().err == f"First images: {path} (drawn again as training goes on)\n"
    again = boards.FirstImages(path, None, images, steps=100, quiet=True)  # type: ignore[arg-type]
    again.show(20)
    assert written[3:] == [20] and capsys.readouterr().err == ""


def test_first_images_are_of_codes_at_their_own_places(tmp_path: Path, monkeypatch) -> None:
    images = np.repeat(np.arange(16, dtype=np.uint8), 16).reshape(16, 1, 4, 4)
    codes = np.stack([np.arange(16), 100 + np.arange(16)], 1).astype(np.int16)  # (M, T): each place has its own codes
    monkeypatch.setattr(boards, "encode_images", lambda vqvae, picked, progress: codes[: len(picked)])
    decoded: list[np.ndarray] = []

    def decode(vqvae: Any, drawn: np.ndarray) -> torch.Tensor:
        decoded.append(np.asarray(drawn))
        return torch.zeros(len(drawn), 1, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(boards, "decode_codes", decode)
    state = as_text(random_state())
    for _ in range(2):
        boards.save_first_images(tmp_path / "a.png", None, images, 3, 10)  # type: ignore[arg-type]
    assert as_text(random_state()) == state and (tmp_path / "a.png").is_file()
    rebuilt, drawn, _, again = decoded
    assert (rebuilt == codes).all() and (drawn == again).all() and drawn.shape == (16, 2)
    assert set(drawn[:, 0]) <= set(range(16)) and set(drawn[:, 1]) <= set(range(100, 116))
    assert (drawn[:, 1] - drawn[:, 0] != 100).any()  # independent of each other


@pytest.mark.parametrize("levels", [1, 2])
def test_samples_are_the_same_whenever_asked_and_nothing_moves(tmp_path: Path, levels: int) -> None:
    run = Run(make_tiny_run(tmp_path / "run", levels=levels), read_config(tmp_path / "run"))
    vqvae, priors = load_vqvae(run), split_prior(load_generator(run, "prior"))
    prior, top = priors[-1].train(), priors[0] if levels == 2 else None
    before, state = weights_of(prior), as_text(random_state())
    with SummaryWriter(str(tmp_path / "board")) as writer:
        for step in (1, 2):
            add_samples(writer, "prior/samples", prior, vqvae, step, top)
    assert as_text(random_state()) == state
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(prior).items())
    assert all(part.training for part in prior.modules()) and not vqvae.training
    one, other = (picture(event) for event in events(tmp_path / "board").Images("prior/samples"))
    assert one.shape[:2] == (2 * 32, N_IMAGES * 32)
    assert (one == other).all() and len(np.unique(one)) > 2


def test_stage_3_shows_curves_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_3, "SAMPLE_EVERY", 2)
    path = make_tiny_run(tmp_path / "run")
    weights = {"loo_fd": 1.0}
    config = replace(read_config(path), ral=replace(SMOKE.ral, n_updates=4, checkpoint_every=2, reward_weights=weights))
    path.joinpath("config.json").write_text(config.to_json())
    run = Run(path, config)
    codes = CodeSet.load(run.file("codes.safetensors"))
    train_ral(run, load_vqvae(run), load_generator(run, "prior"), codes, CPU, progress=False)
    found = events(run.file("tensorboard"))
    assert {"reward/loo_fd_distance", "reward/std", "train/loss", "rollout/ep_rew_mean"} <= set(found.Tags()["scalars"])
    assert len(found.Images("samples/ral")) == 1 and run.file("samples/ral_00002.png").exists()
