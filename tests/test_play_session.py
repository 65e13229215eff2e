"""The page's logic without the page: an episode, a wrong code, two models side by side, what can be shared."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.errors import ConfigError, RunError
from ral_gym.play.comparison import finish_by_each, last_mistake
from ral_gym.play.models import Models, load_models
from ral_gym.play.session import Session
from ral_gym.play.sharing import MOST_FRAMES, gif, python_lines, stages
from ral_gym.priors.base import load_prior, save_prior
from ral_gym.priors.sampler import make_sampler
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.completion import complete, seeded_uniforms
from ral_gym.stages.levels import load_generator, load_vqvae
from tests.class_runs import NAMES, make_class_run
from tests.tiny import make_tiny_run


def add_policy(run: Path, name: str = "prior") -> Path:
    """A "RAL" generator with other weights than the prior's."""
    prior = load_generator(Run(run, read_config(run)), name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for weights in prior.parameters():
            weights.data += 0.3 * torch.randn_like(weights)
    save_prior(run / "policy_ema.safetensors", prior)
    return run


@pytest.fixture(scope="module")
def faces() -> Models:
    return load_models(device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "plain": add_policy(make_tiny_run(root / "plain")),
        "two levels": add_policy(make_tiny_run(root / "two", levels=2, critic_layers=3)),
        "classes": add_policy(make_class_run(root / "classes")),
    }


@pytest.fixture(scope="module", params=["plain", "two levels", "classes"])
def models(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Models:
    return load_models(str(folders[request.param]), "cpu")


# Drawing --------------------------------------------------------------------------------------------------------------


def test_code_by_code_draws_what_all_at_once_does(models) -> None:
    one, all_ = Session(models, seed=3), Session(models, seed=3)
    while not one.finished:
        one.draw()
    all_.draw(None)
    assert (one.codes == all_.codes).all() and one.position == all_.position == models.grid.n_codes


def test_a_session_draws_what_the_sampler_does(models) -> None:
    session = Session(models, seed=7, generator="MLE")
    session.set(temperature=0.8)
    session.draw(None)
    sampler = make_sampler(models.generators["MLE"])
    sequence = models.sequences(np.full((1, models.grid.n_codes), models.grid.not_drawn), 0)
    uniforms = seeded_uniforms(7, 1, models.grid.n_codes)
    assert (sampler.sample(codes=sequence, uniforms=uniforms, temperature=0.8)[0][0].numpy() == session.codes).all()


def test_the_distribution_is_the_one_that_codes_are_drawn_from(models) -> None:
    session, drawn = Session(models, seed=1), []
    session.draw(5)
    expected = session.distribution()
    for seed in range(400):
        session.reseed(seed)
        session.draw()
        drawn.append(session.codes[5])
        session.undo()
    share = np.bincount(drawn, minlength=models.grid.codebook_size) / len(drawn)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(share - expected.numpy()).sum() / 2 < 0.13  # about 0.07 for 16 codes


def test_choices_are_ordered_and_follow_the_temperature(models) -> None:
    session = Session(models)
    flat = session.choices(8)
    session.set(temperature=0.2)
    sharp = session.choices(8)
    assert [one.code for one in flat] == [one.code for one in sharp]
    assert [one.probability for one in flat] == sorted((one.probability for one in flat), reverse=True)
    assert sharp[0].probability > flat[0].probability


def test_a_chosen_code_is_taken_and_undone(models) -> None:
    session = Session(models)
    session.draw(2)
    session.choose(9)
    assert session.codes[2] == 9 and session.drawn == 3
    session.undo()
    assert session.drawn == 2
    session.undo()
    assert session.drawn == 0 and not session.can_undo
    session.undo()


def test_joined_steps_are_taken_back_together(models) -> None:
    session = Session(models)
    session.draw()
    for _ in range(3):
        session.draw(joined=True)
    session.undo()
    assert session.drawn == 0


def test_the_score_is_the_environments_and_comes_at_the_end(models) -> None:
    session = Session(models)
    session.draw(3)
    assert session.score() is None
    session.draw(None)
    score = session.score()
    assert score is not None and score.value == pytest.approx(float(score.score_map.mean()))
    with pytest.raises(ConfigError, match="finished"):
        session.distribution()
    with pytest.raises(ConfigError, match="finished"):
        session.choose(0)
    before = session.codes
    session.draw()
    assert session.codes is before


def test_classes_reach_the_generator_and_the_lines(folders) -> None:
    models = load_models(str(folders["classes"]), "cpu")
    assert models.class_names == NAMES or models.class_names == ("0", "1", "2")
    session = Session(models)
    drawn = []
    for label in range(3):
        session.start(label)
        session.draw(None)
        drawn.append(session.codes.tolist())
    assert len({tuple(codes) for codes in drawn}) == 3
    assert '"label": 2' in python_lines(session)


def test_guidance_changes_the_distribution_where_there_are_classes(folders) -> None:
    session = Session(load_models(str(folders["classes"]), "cpu"))
    before = session.distribution()
    session.set(guidance=4.0)
    assert (session.distribution() - before).abs().sum() > 0.05
    plain = Session(load_models(str(folders["plain"]), "cpu"))
    with pytest.raises(ConfigError, match="cannot be guided"):
        plain.set(guidance=2.0)


# Beginnings -----------------------------------------------------------------------------------------------------------


def test_a_photo_is_completed_as_the_command_does(folders) -> None:
    models = load_models(str(folders["plain"]), "cpu")
    image = torch.from_numpy(np.random.default_rng(0).integers(256, size=(1, 32, 32)).astype(np.uint8))
    session = Session(models, seed=4)
    session.start_from_photo(image, 2)
    assert session.drawn == session.given.sum() == 8 and session.state.image is image
    done = complete(models.tokenizer, models.generators, image, 0.5, 1, seed=4)
    for name in ("MLE", "RAL"):
        session.set(generator=name)
        session.draw(None)
        picture = models.world.decode(torch.from_numpy(session.codes)[None])[0]
        assert torch.equal(picture, done.completed[name][0])
        session.undo()


def test_a_real_image_is_begun_with_its_own_rows_and_class(models) -> None:
    session = Session(models)
    session.start_from_real(4, 3)
    real = models.world.real_codes[4].astype(np.int64)
    assert (session.codes[session.given] == models.grid.without_labels(real)[session.given]).all()
    assert session.given.sum() == models.grid.codes_of(3) == session.drawn
    if models.grid.classes:
        assert session.state.label == 1  # 4 modulo 3
    for index, rows in ((4, 0), (4, 4), (99, 2), (-1, 2)):
        with pytest.raises(ConfigError):
            session.start_from_real(index, rows)


# A wrong code ---------------------------------------------------------------------------------------------------------


def test_a_wrong_code_opens_what_was_drawn_after_it(models) -> None:
    session = Session(models, seed=2)
    session.start_from_real(0, 1)
    session.draw(None)
    whole, position = session.codes.copy(), 6
    session.put_wrong(position)
    assert session.codes[position] != whole[position] and session.state.wrong == (position,)
    later = np.arange(len(whole)) > position
    assert (session.codes[later & session.given] == whole[later & session.given]).all()
    assert (session.codes[later & ~session.given] == models.grid.not_drawn).all()
    assert (session.codes[~later][:position] == whole[:position]).all()
    session.undo()
    assert (session.codes == whole).all() and session.state.wrong == ()


def test_the_wrong_code_is_an_unlikely_one_and_the_same_again(models) -> None:
    session = Session(models, seed=2, generator="MLE")
    session.draw(5)
    session.undo()
    session.draw(4)
    likely = session.distribution().argsort(descending=True)[: models.grid.codebook_size // 2].tolist()
    session.draw()
    session.put_wrong(4)
    first = session.codes[4]
    session.undo()
    session.put_wrong(4)
    assert session.codes[4] == first and first not in likely


def test_what_cannot_be_clicked_is_refused(models) -> None:
    session = Session(models)
    session.draw(2)
    for position in (-1, 2, 10**6):
        with pytest.raises(ConfigError, match="not drawn"):
            session.put_wrong(position)
    with pytest.raises(ConfigError, match="is not one of"):
        session.put_wrong(0, models.grid.codebook_size)


def test_the_effect_of_a_mistake(models) -> None:
    session = Session(models, seed=2)
    with pytest.raises(ConfigError, match="no wrong code"):
        last_mistake(session)
    session.draw(None)
    whole = session.codes.copy()
    session.put_wrong(3)
    open_, found = session.codes.copy(), last_mistake(session)
    assert (session.codes == open_).all(), "it changes nothing"
    assert (found.without.codes == whole).all() and found.right == whole[3]
    session.draw(None)
    assert (found.with_it.codes == session.codes).all() and found.wrong == session.codes[3]
    assert (found.changed == ((whole != session.codes) & (np.arange(len(whole)) > 3))).all()
    assert found.later == len(whole) - 4 and not found.ripple[:4].any()
    assert found.ripple.max() > 0.01 and found.ripple.max() <= 1 + 1e-6
    assert found.without.score.value == session.score_of(whole).value


def test_the_ripple_by_hand(folders) -> None:
    models = load_models(str(folders["plain"]), "cpu")
    session = Session(models, seed=2, generator="MLE")
    session.draw(None)
    whole = session.codes.copy()
    session.put_wrong(3, (int(whole[3]) + 1) % 16)
    swapped = torch.from_numpy(whole.copy())
    swapped[3] = session.codes[3]
    prior = models.generators["MLE"]
    p, q = (torch.softmax(prior(codes[None])[0], 1) for codes in (torch.from_numpy(whole), swapped))
    by_hand = [0.5 * float((p[t] - q[t]).abs().sum()) if t > 3 else 0.0 for t in range(16)]
    assert last_mistake(session).ripple == pytest.approx(by_hand, abs=1e-6)


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


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_run_without_stage_3_has_no_ral_and_no_score(tmp_path) -> None:
    run = make_tiny_run(tmp_path / "run")
    (run / "critic.safetensors").unlink()
    models = load_models(str(run), "cpu")
    session = Session(models)
    session.draw(None)
    assert list(models.generators) == ["MLE"] and session.score() is None
    repeat(session)
    assert finish_by_each(session, 1)["MLE"][0].score is None


def test_a_generator_of_another_run_is_refused(tmp_path, folders) -> None:
    run = make_tiny_run(tmp_path / "run")
    shutil.copy(folders["classes"] / "prior.safetensors", run / "policy_ema.safetensors")
    assert load_prior(run / "policy_ema.safetensors").grid.classes == 3
    with pytest.raises(RunError, match=r"policy_ema.safetensors draws"):
        load_models(str(run), "cpu")


def test_settings_out_of_range_are_refused(models) -> None:
    session = Session(models)
    for wrong in ({"generator": "GAN"}, {"temperature": 0.0}, {"temperature": float("nan")}, {"guidance": -1.0}):
        with pytest.raises(ConfigError):
            session.set(**wrong)
    for seed in (-1, 4_000_001):
        with pytest.raises(ConfigError, match="seed"):
            session.reseed(seed)


def test_the_run_folder_is_only_read(tmp_path) -> None:
    run = make_tiny_run(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.rglob("*")}
    session = Session(load_models(str(run), "cpu"))
    session.draw(None)
    assert {path.name: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert load_vqvae(Run(run, read_config(run))).grid == session.grid
