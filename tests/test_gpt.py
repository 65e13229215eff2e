"""taming's GPT as a prior: its cache against full passes, its labels, and as a run's prior.

`tests/test_parity_gpt.py` compares its logits with another implementation's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_gym.agents import ALGORITHMS, algorithm_defaults, make_sb3_env, policy_for
from ral_gym.commands.cli import main
from ral_gym.errors import ConfigError
from ral_gym.priors.base import build_prior, config_of, load_prior, save_prior
from ral_gym.priors.gpt import GPT
from ral_gym.priors.kv_cache import KVCache
from ral_gym.priors.sampler import CachedSampler, sample_naive
from ral_gym.runs.run import Run, read_config
from ral_gym.stages.levels import load_generator
from tests.sampling import B, Episodes, H, K, T, W, assert_same_draws, some_codes, some_uniforms

N = 3
SMALL: dict[str, Any] = {"hidden_units": 12, "layers": 3, "attention_heads": 2}
LABELS = torch.tensor([0, 1, 2, 0, 1])


def gpt(**settings: Any) -> GPT:
    """In float64, with weights of all sizes."""
    torch.manual_seed(0)
    prior = GPT(K, H, W, **{**SMALL, **settings}).double()
    for name, weight in prior.named_parameters():
        torch.nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.3)
    return prior.eval()


def labelled(codes: Tensor, labels: Tensor = LABELS) -> Tensor:
    return torch.cat([codes, K + 2 + labels[:, None]], 1)


def test_a_code_sees_those_before_it_its_own_place_and_the_label() -> None:
    prior, codes = gpt(classes=N), some_codes()
    before = prior(labelled(codes))
    for position in range(T):
        other = codes.clone()
        other[:, position] = (other[:, position] + 1) % K
        changed = (prior(labelled(other)) - before).abs().amax((0, 2)) > 1e-9
        assert not changed[: position + 1].any() and changed[position + 1 :].all()
    assert ((prior(labelled(codes, (LABELS + 1) % N)) - before).abs() > 1e-9).any(2).all()
    same = torch.zeros_like(codes)
    assert (prior(labelled(same))[:, 2:] - prior(labelled(same))[:, 1:-1]).abs().amax() > 1e-3, "no learned positions"


def test_an_untrained_network_draws_uniformly_and_starts_without_biases() -> None:
    prior = GPT(K, H, W, **SMALL)
    assert torch.equal(prior(some_codes()), torch.zeros(B, T, K))
    biases = [weight for name, weight in prior.named_parameters() if name.endswith("bias")]
    assert len(biases) == 6 * 3 + 1 and not any(bias.any() for bias in biases)
    assert prior.cls_embedding.embedding_table.weight.shape == (1, 12)


def test_the_sampler_draws_through_the_cache() -> None:
    assert isinstance(CachedSampler(gpt()).weights.make_cache(2), KVCache)


@pytest.mark.parametrize("start", [0, 1, W, W + 2, T - 1, T])
def test_codes_and_log_probs_are_those_of_full_passes(start: int) -> None:
    codes, uniforms = some_codes(), some_uniforms()
    assert_same_draws(gpt(), codes=codes, start=start, uniforms=uniforms)
    positions = torch.tensor([0, T, W - 1, 2 * W, start])
    assert_same_draws(gpt(), codes=codes, start=positions, uniforms=uniforms)
    assert_same_draws(gpt(classes=N), codes=labelled(codes), start=positions, uniforms=uniforms)


def test_rows_at_positions_of_their_own_and_rebuilt_ones() -> None:
    Episodes(gpt(), some_codes(), torch.tensor([0, T, W - 1, 2 * W, 1])).run_with_rebuilt_rows()


def test_without_a_row_for_no_class_labels_must_be_given() -> None:
    prior, codes = gpt(classes=N), some_codes()
    assert prior.cls_embedding.embedding_table.weight.shape == (N, 12)
    with pytest.raises(ConfigError, match=f"is its label, {K + 2}..{K + 1 + N}: found {K + 2}..{K + 2 + N}"):
        prior(labelled(codes, torch.tensor([0, 1, 2, 0, N])))
    with pytest.raises(ConfigError, match=r"this GPT draws images of a class, and has no row for no class"):
        CachedSampler(prior).sample(B)
    naive = sample_naive(prior, codes=labelled(codes), uniforms=some_uniforms())[0]
    assert torch.equal(naive, CachedSampler(prior).sample(codes=labelled(codes), uniforms=some_uniforms())[0])


def test_a_file_gives_back_the_same_network(tmp_path: Path) -> None:
    prior, codes = gpt(classes=N, attention="fused").float(), some_codes()
    assert config_of(prior)["kind"] == "gpt" and config_of(build_prior(config_of(prior))) == config_of(prior)
    save_prior(tmp_path / "prior.safetensors", prior)
    again = load_prior(tmp_path / "prior.safetensors", config=config_of(prior))
    assert torch.equal(again(labelled(codes)), prior(labelled(codes)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_heads": 5}, "hidden_units=12 does not fit attention_heads=5: give a multiple of it"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"attention": "flash"}, "choose math or fused"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GPT(K, H, W, **{**SMALL, **settings})


@pytest.mark.parametrize("algo", ["grpo", "ppo", "trpo"])
def test_algorithms_train_it(algo: str) -> None:
    prior = GPT(8, 4, 4, hidden_units=16, layers=2, attention_heads=2)
    torch.nn.init.normal_(prior.output.weight, std=0.3)
    env = make_sb3_env("ral_gym/Toy-v0", 8, seed=0)
    model = ALGORITHMS[algo](policy_for(algo), env, **algorithm_defaults(algo, env, prior=prior), seed=0)
    before = {name: weight.clone() for name, weight in model.policy.named_parameters()}
    model.learn(8 * 16)
    assert all(
        not torch.equal(weight, before[name]) for name, weight in model.policy.named_parameters() if "prior" in name
    )


@pytest.mark.commands
def test_a_whole_run(tmp_path: Path, smoke_options: list[str]) -> None:
    argv = ["train", *smoke_options, "--runs", str(tmp_path), "--prior.kind", "gpt", "--prior.attention-heads", "2"]
    assert main(argv) == 0
    run = Run(tmp_path / "smoke", read_config(tmp_path / "smoke"))
    assert isinstance(load_generator(run, "policy_ema"), GPT)
