"""What `ral-gym play` compares and gives away: models side by side, the GIF, the five lines that repeat an episode."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ral_gym.play.comparison import finish_by_each
from ral_gym.play.models import load_models
from ral_gym.play.session import Session
from ral_gym.play.sharing import MOST_FRAMES, gif, python_lines, stages
from tests.play_runs import faces, folders, models
from tests.tiny import make_tiny_run

__all__ = ["faces", "folders", "models"]  # fixtures


# Side by side ---------------------------------------------------------------------------------------------------------


def test_both_finish_the_same_beginning_from_the_same_random_numbers(models) -> None:
    session = Session(models, seed=11)
    session.draw(6)
    begun = session.codes.copy()
    endings = finish_by_each(session, 3)
    assert list(endings) == ["MLE", "RAL"] and (session.codes == begun).all()
    for name, found in endings.items():
        assert [ending.seed for ending in found] == [11, 12, 13]
        assert all((ending.codes[:6] == begun[:6]).all() for ending in found)
        session.set(generator=name)
        session.draw(None)
        assert (session.codes == found[0].codes).all() and found[0].score.value == session.score().value
        session.undo()
    assert any((a.codes != b.codes).any() for a, b in zip(endings["MLE"], endings["RAL"], strict=True))


def test_a_finished_image_is_finished_again_from_its_beginning(models) -> None:
    session = Session(models)
    session.start_from_real(1, 2)
    session.draw(None)
    endings = finish_by_each(session, 2)
    assert (endings["RAL"][0].codes == session.codes).all()
    assert (endings["MLE"][0].codes[session.given] == session.codes[session.given]).all()


# To take away ---------------------------------------------------------------------------------------------------------


def repeat(session: Session) -> dict[str, Any]:
    lines = python_lines(session)
    assert len(lines.splitlines()) == 5
    found: dict[str, Any] = {}
    exec(lines, found)
    assert (session.grid.without_labels(found["observation"]) == session.codes).all()
    return found


def test_the_five_lines_repeat_any_episode(models, capsys) -> None:
    session = Session(models, seed=5)
    repeat(session)
    session.draw(4)
    repeat(session)
    session.choose(3)
    session.draw(None)
    session.put_wrong(5)
    repeat(session)
    session.set(generator="MLE", temperature=0.7)
    session.draw(None)
    assert repeat(session)["reward"] == session.score().value
    session.start_from_real(2, 2)
    session.put_wrong(1)
    session.draw(3)
    repeat(session)
    session.draw(None)
    assert repeat(session)["reward"] == pytest.approx(session.score().value, abs=1e-6)
    assert str(session.codes.tolist())[:-1] in capsys.readouterr().out


def test_the_five_lines_repeat_the_bundled_faces(faces, capsys) -> None:
    session = Session(faces, seed=1)
    session.draw(None)
    found = repeat(session)
    assert "Faces-v0" in python_lines(session) and found["terminated"]
    assert found["reward"] == session.score().value


def test_the_gif_shows_the_episode(models) -> None:
    session = Session(models)
    session.start_from_real(0, 1)
    session.draw(3)
    given = models.grid.codes_of(1)
    assert ((stages(session) != models.grid.not_drawn).sum(1) == given + np.arange(4)).all()
    assert (stages(session)[-1] == session.codes).all()
    with Image.open(io.BytesIO(gif(session))) as picture:
        assert picture.format == "GIF" and picture.n_frames == 4 and picture.width >= 256
    session.draw(None)
    assert len(stages(session)) == min(models.grid.n_codes - given + 1, MOST_FRAMES)


def test_a_run_without_stage_3_is_repeated_without_a_reward(tmp_path) -> None:
    run = make_tiny_run(tmp_path / "run")
    (run / "critic.safetensors").unlink()
    session = Session(load_models(str(run), "cpu"))
    session.draw(None)
    assert repeat(session)["reward"] == 0
    assert finish_by_each(session, 1)["MLE"][0].score is None
