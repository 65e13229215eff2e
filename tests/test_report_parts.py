"""Parts of the report: score maps of runs with classes, curves of stage 1's losses."""

import dataclasses

import numpy as np
import pytest
import torch

from ral_gym.commands.generate import open_run
from ral_gym.data.images import Labels
from ral_gym.data.subsets import subset
from ral_gym.presets import SMOKE
from ral_gym.report.report import N_SCORED, N_SHOWN, Report
from ral_gym.report.text import learning_curves
from ral_gym.rewards.critic import PatchCritic
from ral_gym.rewards.making import save_critic
from ral_gym.rewards.scorer import CriticScorer
from ral_gym.runs.run import Run
from ral_gym.stages.levels import load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.class_runs import NAMES, make_class_run
from tests.test_report import Page


@pytest.mark.parametrize(("labelled", "photos"), [(True, True), (True, False), (False, True)])
def test_score_maps_of_a_run_with_classes_are_those_of_the_labels(tmp_path, labelled, photos) -> None:
    path = make_class_run(tmp_path / "run", classes=3 if labelled else 0)
    vqvae, critic = load_vqvae(open_run(str(path))), PatchCritic(32, 1, hidden_units=4, layers=3, classes=3)
    assert critic.class_embedding is not None
    torch.nn.init.normal_(critic.class_embedding.weight)
    save_critic(path / "critic.safetensors", CriticScorer(vqvae, critic, "single"), "patch")
    material = Report(open_run(str(path)), torch.device("cpu"), progress=False)
    labels = torch.arange(len(material.images.test)) % 3  # shown in a seeded order, and so should their labels be
    material.images = dataclasses.replace(material.images, labels=Labels(np.zeros(0), labels.numpy(), NAMES))
    if not photos:
        material.images, material.held_out = "gone", None
    codes = CodeSet.load(path / "codes.safetensors")
    seen = []
    original = material._scores
    material._scores = lambda *given: seen.append(original(*given)) or seen[-1]
    assert {"fig-scores-real", "fig-scores-mle"} <= set(Page(str(material.score_maps())).figures)
    order = material._shown(len(labels)) if photos else subset(len(codes.test), N_SHOWN, material.seed)
    real = labels[order] if photos else torch.from_numpy(codes.labels.test[order])
    asked = {"Real": real[:N_SCORED], "MLE": torch.arange(N_SCORED) % 3}
    scored = {"Real": torch.from_numpy(material.reconstructed_codes).long(), "MLE": material.drawn["MLE"]}
    for (label, classes), found in zip(asked.items(), seen, strict=True):
        expected, _ = material.scorer(scored[label][:N_SCORED], classes if labelled else None)
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)  # pictures have whole grey values
        others, _ = material.scorer(scored[label][:N_SCORED], (classes + 1) % 3)
        assert (others - expected).abs().max() > 0.1


def test_losses_of_a_vqgan_are_curves_with_captions(tmp_path) -> None:
    run = Run(tmp_path / "run", SMOKE)
    for step in (10, 20):
        more = {} if step == 10 else {"adversarial": 0.5, "discriminator_loss": 0.75}
        run.log("vqvae", step, {"perceptual": 4.0 / step, **more})
    for step in (30, 40):
        scores = {"discriminator_real": step / 100, "discriminator_fake": -step / 100}
        run.log("vqvae", step, {"adversarial": 15 / step, "discriminator_loss": 30 / step, **scores})
    page = Page(str(learning_curves(run)))
    captions = {name: found.caption for name, found in page.figures.items()}
    assert list(captions) == [f"fig-curve-{number}-vqvae" for number in (2, 3, 4, 5)]
    assert "perceptual 0.4 to 0.2" in captions["fig-curve-2-vqvae"]
    assert "adversarial 0.5 to 0.375" in captions["fig-curve-3-vqvae"]
    assert "discriminator's loss 0.75 to 0.75" in captions["fig-curve-4-vqvae"]
    assert "images 0.3 to 0.4; reconstructions -0.3 to -0.4" in captions["fig-curve-5-vqvae"]
