"""What generators of classes are measured by, and how classes are named in commands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ral_gym.commands.results import guidance_verdict
from ral_gym.errors import ConfigError
from ral_gym.metrics import image_nll
from ral_gym.stages import class_metrics
from ral_gym.stages.class_metrics import ClassJudge, accuracy, class_distance, train_judge
from ral_gym.stages.labels import labels_asked

NAMES = ("cat", "wild cat", "dog", "Dogfish", "tench")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(["cat"], [0, 0, 0]), (["3", "TENCH"], [3, 4, 3]), (["wild"], [1, 1, 1]), (["fish"], [3, 3, 3]), ([], None)],
)
def test_classes_by_name_or_number_in_turn(asked: list[str], expected: list[int] | None) -> None:
    labels = labels_asked(asked, NAMES, 3)
    assert labels is None if expected is None else labels is not None and labels.tolist() == expected


@pytest.mark.parametrize(
    ("asked", "names", "message"),
    [
        ("og", NAMES, r"fits 2 classes \(dog, Dogfish\): give one in full, or its number \(2, 3\)"),
        ("tensh", NAMES, r"is no class \(did you mean tench\?\): choose one of cat, wild cat, dog, Dogfish, tench"),
        ("5", NAMES, "is no class"),
        ("", NAMES, "is no class"),
        ("cat", (), "this run has no classes, leave --label out"),
    ],
)
def test_a_class_that_is_not_there_is_refused(asked: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels_asked([asked], names, 2)


class Coloured:
    """A tokenizer whose only code is the image's grey value."""

    channels = 1

    def __init__(self) -> None:
        self.weight = torch.zeros(1)


def test_a_judge_learns_classes_and_leaves_random_numbers_alone(monkeypatch: Any) -> None:
    def decode(vqvae: Any, codes: Any) -> torch.Tensor:
        grey = torch.as_tensor(codes)[:, :1, None, None].to(torch.uint8) * 60
        return grey.expand(-1, 1, 32, 32).contiguous()

    monkeypatch.setattr(class_metrics, "decode_codes", decode)
    monkeypatch.setattr(class_metrics, "device_of", lambda vqvae: torch.device("cpu"))
    monkeypatch.setattr(class_metrics, "JUDGE_STEPS", 40)
    labels = np.arange(90) % 3
    state = torch.get_rng_state()
    judges = [train_judge(Coloured(), labels[:, None], labels, 3, seed=1) for _ in range(2)]  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(judges[0].parameters(), judges[1].parameters(), strict=True):
        assert torch.equal(one, other)
    known = torch.from_numpy(labels)
    right = accuracy(judges[0], decode(None, labels[:, None]), known)
    assert right.value == 1.0
    assert accuracy(judges[0], decode(None, labels[:, None]), (known + 1) % 3).value == 0.0
    assert ClassJudge(3, 5)(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 5)


def test_distances_by_class_see_swapped_classes() -> None:
    torch.manual_seed(0)
    known = torch.arange(120) % 2
    reference = torch.randn(120, 4) + 5 * known[:, None]
    features = torch.randn(120, 4) + 5 * known[:, None]
    right = class_distance(features, known, reference, known, 2)
    swapped = class_distance(features, 1 - known, reference, known, 2)
    assert set(right) == {"class_kid"} and swapped["class_kid"] > 100 * abs(right["class_kid"])
    assert class_distance(features[:4], known[:4], reference, known, 2) == {}


def test_many_images_of_each_class_give_fd(monkeypatch: Any) -> None:
    monkeypatch.setattr(class_metrics, "SMALLEST_FD", 50)
    known = torch.arange(120) % 2
    features = torch.randn(120, 4)
    assert set(class_distance(features, known, features, known, 2)) == {"class_fd"}


def test_a_label_at_the_end_is_given_and_not_predicted() -> None:
    def logits(sequences: torch.Tensor) -> torch.Tensor:
        codes = sequences[:, :-1]
        return torch.nn.functional.one_hot((codes + sequences[:, -1:]) % 4, 4).double() * 50

    codes = torch.randint(4, (6, 5))
    right = torch.cat([codes, torch.full((6, 1), 4)], 1)
    assert image_nll(logits, right).max() < 1e-6 and image_nll(logits, right - torch.eye(6)[5].long()).min() > 10


@pytest.mark.parametrize(
    ("tuned", "start", "said"),
    [
        (9.0, 10.0, "No guidance needed: FD 9 at s = 1 after RAL, 10 at s = 2, the best one, before."),
        (11.0, 10.0, "Guidance still helps: FD 11 at s = 1 after RAL, 10 at s = 2, the best one, before."),
    ],
)
def test_the_verdict_on_guidance_is_a_comparison(tuned: float, start: float, said: str) -> None:
    rows: dict[str, Any] = {"ral": {"fd": tuned}, "mle_best_guidance": {"fd": start, "guidance": 2.0}}
    assert guidance_verdict({"rows": rows}) == said
    assert guidance_verdict({"rows": {"ral": {"fd": tuned}}}) == ""


def test_the_verdict_needs_the_judge_too() -> None:
    rows: dict[str, Any] = {"ral": {"fd": 9.0, "accuracy": 0.3}}
    rows["mle_best_guidance"] = {"fd": 10.0, "guidance": 1.5, "accuracy": 0.4}
    assert guidance_verdict({"rows": rows}).startswith("Guidance still helps: FD 9 at s = 1 after RAL, 10 at s = 1.5")
    assert guidance_verdict({"rows": rows}).endswith("before; accuracy 0.300 and 0.400.")
    rows["mle_best_guidance"]["guidance"] = 1.0
    assert guidance_verdict({"rows": rows}).startswith("RAL is not better than its start: FD 9 at s = 1 after RAL")
    rows["ral"]["accuracy"] = 0.4
    assert guidance_verdict({"rows": rows}).startswith("No guidance needed")
