"""The page's logic without the page: an episode, a wrong code, two models side by side, what can be shared."""

import shutil

import numpy as np
import pytest
import torch

from ral_gym.errors import ConfigError, RunError
from ral_gym.play.comparison import last_mistake
from ral_gym.play.models import load_models
from ral_gym.play.session import Session
from ral_gym.play.sharing import python_lines
from ral_gym.priors.base import load_prior
from ral_gym.priors.sampler import make_sampler
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.completion import complete, seeded_uniforms
from ral_gym.stages.levels import load_vqvae
from tests.class_runs import NAMES
from tests.play_runs import faces, folders, models
from tests.tiny import make_tiny_run

__all__ = ["faces", "folders", "models"]  # fixtures


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


def test_a_photo_is_completed_as_the_command_does(faces) -> None:
    image = faces.world.decode(torch.from_numpy(faces.world.real_codes[7].astype(np.int64))[None])[0]
    session = Session(faces, seed=4)
    session.start_from_photo(image, 4)
    assert session.drawn == session.given.sum() == 32 and session.state.image is image
    assert len(set(session.codes[:32])) > 10, "else the order of the given codes would not matter"
    done = complete(faces.tokenizer, faces.generators, image, 0.5, 1, seed=4)
    for name in ("MLE", "RAL"):
        session.set(generator=name)
        session.draw(None)
        assert torch.equal(faces.world.decode(torch.from_numpy(session.codes)[None])[0], done.completed[name][0])
        session.undo()


def test_more_or_fewer_rows_of_the_same_photo(models) -> None:
    session = Session(models)
    session.change_rows(2)
    assert session.drawn == 0, "there is no photo"
    session.start_from_real(5, 2)
    first = session.codes
    session.change_rows(3)
    assert session.state.real == 5 and session.given.sum() == models.grid.codes_of(3)
    session.change_rows(2)
    assert (session.codes == first).all()
    size = models.tokenizer.image_size
    image = torch.from_numpy(np.random.default_rng(0).integers(256, size=(1, size, size)).astype(np.uint8))
    session.start_from_photo(image, 1)
    session.change_rows(3)
    assert session.state.image is image and session.state.rows == 3


def test_every_seed_has_its_real_image(models) -> None:
    session, found = Session(models), []
    for seed in range(len(models.world.real_codes)):
        session.reseed(seed)
        found.append(session.next_real())
    assert sorted(found) == list(range(len(found)))


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


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_run_without_stage_3_has_no_ral_and_no_score(tmp_path) -> None:
    run = make_tiny_run(tmp_path / "run")
    (run / "critic.safetensors").unlink()
    models = load_models(str(run), "cpu")
    session = Session(models)
    session.draw(None)
    assert list(models.generators) == ["MLE"] and session.score() is None


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
