"""A large codebook's distances in pieces: the same codes, the same training, bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from ral_gym.tokenizers import quantiser
from ral_gym.tokenizers.quantiser import Quantiser, nearest


def make(threshold: int = 0) -> Quantiser:
    torch.manual_seed(3)
    return Quantiser(4, 16, decay=0.9, commitment_weight=0.25, threshold_ema_dead_code=threshold)


def train(model: Quantiser, steps: int, parts: int = 1) -> list[Tensor]:
    """Codes, losses and gradients of some training steps, and the state at the end."""
    torch.manual_seed(5)
    seen: list[Tensor] = []
    for _ in range(steps):
        for part in range(parts):
            x = torch.randn(6, 20, 4, requires_grad=True)
            vectors, codes, loss = model(x, accum_ema_update=part < parts - 1)
            (vectors.square().sum() + loss.sum()).backward()
            seen += [codes, loss.detach().flatten(), x.grad, vectors.detach()]
    return [*seen, *model.state_dict().values()]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("threshold", [0, 2])
def test_training_in_pieces_is_the_librarys(monkeypatch: pytest.MonkeyPatch, parts: int, threshold: int) -> None:
    whole = train(make(threshold), 5, parts)
    monkeypatch.setattr(quantiser, "PIECE", 16 * 7 * 4)  # 7 positions at a time; the last piece has one
    for one, other in zip(whole, train(make(threshold), 5, parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_pieces_are_used_above_the_limit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: calls.append(a.shape[0] * b.shape[0]) or real(a, b))
    model, x = make().eval(), torch.randn(6, 20, 4)
    model._codebook.initted.fill_(True)
    for limit, used in ((6 * 20 * 16, 0), (6 * 20 * 16 - 1, 4)):
        monkeypatch.setattr(quantiser, "PIECE", limit)
        calls.clear()
        model(x)
        assert len(calls) >= used and all(size <= limit // 4 for size in calls) and bool(calls) == bool(used)


def test_codes_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, vectors = torch.randn(5, 8, 6, 6), torch.randn(64, 8)
    whole = nearest(features, vectors)
    distances = (features.flatten(2).transpose(1, 2)[:, :, None] - vectors).norm(dim=-1)  # (B, h w, K)
    assert torch.equal(whole, distances.argmin(-1))
    monkeypatch.setattr(quantiser, "PIECE", 64 * 11 * 4)
    assert torch.equal(nearest(features, vectors), whole)


def test_evaluation_in_pieces_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), torch.randn(6, 20, 4)
    model(x)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    monkeypatch.setattr(quantiser, "PIECE", 16 * 4)
    for one, other in zip(expected, model(x), strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("features", [3, 40])
def test_dead_codes_restart_at_distinct_features_without_asking_which(features: int) -> None:
    """As the library does it, which waits for the device: with fewer features than dead codes, some codes wait."""
    book, x = make(threshold=2)._codebook, torch.randn(features, 4)
    book.embed.normal_()
    book.cluster_size[0] = torch.tensor([0.0, 5.0] * 8)
    before, dead = book.embed[0].clone(), book.cluster_size[0] < 2
    book._restart(x)
    moved = (book.embed[0] != before).any(1)
    assert not moved[~dead].any() and moved.sum() == min(8, features)
    taken = torch.cdist(book.embed[0][moved], x).argmin(1)
    torch.testing.assert_close(book.embed[0][moved], x[taken])
    assert len(set(taken.tolist())) == min(8, features)
    assert (book.cluster_size[0][moved] == 2).all() and torch.equal(book.embed_avg[0][moved], 2 * x[taken])


def test_a_loaded_codebook_is_asked_again_whether_it_has_started() -> None:
    model, fresh = make(), make()
    model(torch.randn(6, 20, 4))
    assert model._codebook.started and bool(model._codebook.initted)
    model.load_state_dict(fresh.state_dict())
    model(torch.randn(6, 20, 4))
    assert bool(model._codebook.initted) and model.codebook.any()


def test_it_is_the_librarys_class_with_its_weights() -> None:
    model = make()
    assert isinstance(model, nn.Module) and type(model).__mro__[1].__name__ == "VectorQuantize"
    assert {"_codebook.initted", "_codebook.cluster_size", "_codebook.embed_avg", "_codebook.embed"} <= set(
        model.state_dict()
    )


MEASURE = """
import resource, sys, numpy as np, torch
from ral_gym.tokenizers.code_set import encode_images
from ral_gym.tokenizers.vqvae import VQVAE
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = VQVAE(32, 1, codebook_size=16_384, codebook_dim=8, hidden_units=8, residual_units=4, layers=1)
model(torch.rand(1, 1, 32, 32) * 2 - 1)
before = peak()
encode_images(model.eval(), np.zeros((32, 1, 32, 32), np.uint8), progress=False)
encoding = peak() - before
reconstruction, _, loss = model.train()(torch.rand(16, 1, 32, 32) * 2 - 1)
(reconstruction.square().mean() + loss).backward()
print(encoding, peak() - before)
"""


def test_a_codebook_of_16384_takes_some_hundred_megabytes() -> None:
    """At once, 32 images of 256 positions would take 0.5 GB of distances, and training some copies of half of that."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    encoding, training = map(float, done.stdout.split())
    assert encoding < 250 and training < 400
