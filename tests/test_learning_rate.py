"""The learning rate of stage 2: how it falls, how the end comes early, and how the control of equal time uses it."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ral_gym.config import Config
from ral_gym.errors import RunError
from ral_gym.grid import CodeGrid
from ral_gym.presets import SMOKE
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.storage import save_json
from ral_gym.stages.controls import continue_prior, equal_time_updates, train_equal_time
from ral_gym.stages.learning_rate import LearningRate
from ral_gym.stages.levels import load_generator
from ral_gym.stages.train_prior import train_prior
from ral_gym.tokenizers.code_set import CodeSet
from tests.kills import Killed
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")


def rates(kind: str, steps: int, share: float = 1.0) -> list[float]:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5)
    rate = LearningRate(optimizer, kind, steps, share)
    found = []
    for step in range(1, steps + 1):
        rate.set(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_it_falls_in_a_line_or_along_a_cosine_over_the_last_steps() -> None:
    assert rates("constant", 3) == [0.5, 0.5, 0.5]
    assert rates("linear", 4) == [0.5, 0.375, 0.25, 0.125]
    assert rates("linear", 6, 0.5) == [0.5, 0.5, 0.5, *(0.5 * (1 - n / 3) for n in range(3))]
    assert rates("cosine", 4) == pytest.approx([0.25 * (1 + math.cos(math.pi * n / 4)) for n in range(4)])
    assert rates("linear", 3, 0.01) == [0.5, 0.5, 0.5]  # a decay of one step: its first has the full rate


@pytest.mark.parametrize(("kind", "last"), [("linear", 23), ("constant", 20)])
def test_the_end_begins_once_the_likelihood_has_been_flat_for_long_enough(kind: str, last: int) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    rate = LearningRate(optimizer, kind, 30, 0.1, patience=2)
    values = [3.0, 2.0, 2.5, 1.9, 1.9, 2.0]  # steps 10, 12, .., 20: equal is not lower
    flat = [rate.flattened(value) for value in values]
    assert flat == [False, False, False, False, False, True]
    rate.end_early(20)
    assert rate.last == last
    rate.end_early(22)  # it falls already
    assert rate.last == last
    again = LearningRate(optimizer, kind, 30, 0.1, patience=2)
    again.load_state_dict(rate.state_dict())
    assert [again.factor(step) for step in range(1, last + 1)] == [rate.factor(step) for step in range(1, last + 1)]
    with pytest.raises(ValueError, match="falls from step"):
        LearningRate(optimizer, kind, 19, 0.1).load_state_dict(rate.state_dict())


def stage_2(path: Path, **settings: object) -> tuple[Run, CodeSet, CodeGrid]:
    """A tiny run whose prior is to be trained."""
    make_tiny_run(path)
    (path / "prior.safetensors").unlink()
    config = Config.from_dict(json.loads((path / "config.json").read_text()))
    config = replace(config, prior=replace(SMOKE.prior, evaluate_every=2, batch_size=4, **settings))  # type: ignore[arg-type]
    (path / "config.json").write_text(config.to_json())
    grid = CodeGrid(4, 4, 16)
    return Run(path, config), CodeSet.load(path / "codes.safetensors", grid), grid


def test_a_flat_prior_ends_early_and_a_stopped_run_ends_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random codes: there is nothing to learn, so that held-out likelihood soon gets no better."""
    monkeypatch.setattr("ral_gym.stages.common.CHECKPOINT_SECONDS", 0.0)
    saved = Run.save_checkpoint
    settings = {"training_steps": 60, "learning_rate": 1e-2, "learning_rate_schedule": "linear", "decay_share": 0.1}
    found = {}
    for name, stop in (("whole", 0), ("in the flat part", 5), ("in the decay", -2)):
        run, codes, grid = stage_2(tmp_path / name, patience=2, **settings)

        def save(run: Run, stage: str, state: dict[str, object], stop: int = stop) -> None:
            saved(run, stage, state)
            if stop and state["step"] == (stop if stop > 0 else found["whole"][1] + stop):
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save_checkpoint", save)
            with nullcontext() if not stop else pytest.raises(Killed):
                train_prior(run, codes, grid, CPU, progress=False)
        train_prior(run, codes, grid, CPU, progress=False)
        steps = [line["step"] for line in run.metrics("prior")]
        found[name] = [[run.file(f"{file}.safetensors").read_bytes() for file in ("prior", "prior_ema")], max(steps)]
    assert 10 < found["whole"][1] < 60
    assert found["whole"] == found["in the flat part"] == found["in the decay"]


def test_the_optimizer_takes_its_steps_at_these_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam, *arguments: object) -> object:
        taken.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    run, codes, grid = stage_2(tmp_path / "run", training_steps=4, learning_rate=0.5, learning_rate_schedule="linear")
    prior = train_prior(run, codes, grid, CPU, progress=False)
    assert taken == [0.5, 0.375, 0.25, 0.125]
    save_json(run.file("equal_time.json"), {"updates": 2})
    train_equal_time(run, prior, codes, CPU, progress=False)
    rate = run.config.ral.learning_rate
    assert taken[4:] == [rate, rate / 2]


def test_the_control_of_equal_time_takes_as_many_steps_as_fit_and_keeps_that_number(tmp_path: Path) -> None:
    make_tiny_run(tmp_path / "run")
    run = Run(tmp_path / "run", read_config(tmp_path / "run"))
    prior, codes = load_generator(run, "prior"), CodeSet.load(run.file("codes.safetensors"), CodeGrid(4, 4, 16))
    with pytest.raises(RunError, match="no times of RAL and of its control"):
        train_equal_time(run, prior, codes, CPU, progress=False)
    continue_prior(run, prior, codes, CPU, progress=False)
    save_json(run.file("seconds.json"), {"ral": 6.0, "prior_continued": 2.0})
    assert equal_time_updates(run) == 3 * run.config.ral.n_updates
    annealed = train_equal_time(run, prior, codes, CPU, progress=False)
    assert torch.equal(weights(annealed), weights(load_generator(run, "prior_equal_time")))
    assert not torch.equal(weights(annealed), weights(load_generator(run, "prior_continued")))
    run.file("prior_equal_time.safetensors").unlink()
    save_json(run.file("seconds.json"), {"ral": 60.0, "prior_continued": 2.0})  # what is measured later does not matter
    assert torch.equal(weights(train_equal_time(run, prior, codes, CPU, progress=False)), weights(annealed))
    save_json(run.file("equal_time.json"), {"updates": "many"})
    with pytest.raises(RunError, match=r"equal_time\.json holds no number of updates"):
        equal_time_updates(run)


def weights(prior: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in prior.state_dict().values()])
