"""On a GPU as on the CPU: the same properties on every device.

A machine without a GPU runs every test on the CPU, and on a pretended CUDA device (`tests/pretend_device.py`), which
refuses what a real one would and counts what the host waits for. Float32 is meant here: cuDNN would round the inputs of
a full pass's convolutions to TF32, the sampler's products not.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from ral_gym.agents import (
    ALGORITHMS,
    CodeVecEnv,
    EpisodeRolloutBuffer,
    PixelCNNPolicy,
    algorithm_defaults,
    make_sb3_env,
    policy_for,
)
from ral_gym.agents.algorithm import trainable_algorithms
from ral_gym.envs.from_run import _load_once
from ral_gym.priors import kv_cache
from ral_gym.priors.gpt import GPT
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler, sample_naive
from ral_gym.priors.transformer import Transformer
from tests.pretend_device import pretend_cuda
from tests.tiny import make_tiny_run

E, T, K = 6, 16, 16
GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_every_device = pytest.mark.parametrize(
    "device", ["cpu", "pretended", pytest.param("cuda", marks=GPU)], indirect=True
)


@pytest.fixture
def device(request: pytest.FixtureRequest, run: str) -> Iterator[str]:
    """The device to name; `run` comes first, so that its files are made on the CPU."""
    if request.param != "pretended":
        yield request.param
        return
    with pretend_cuda():
        yield "cuda"
    _load_once.cache_clear()  # environments keep networks, which may not outlive the pretended device


@pytest.fixture(autouse=True)
def float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_run(tmp_path_factory.mktemp("runs") / "tiny"))


def make_env(run: str, device: str, reset_mode: str = "mixed", lockstep: bool = False) -> CodeVecEnv:
    arguments = {"reset_mode": reset_mode, "lockstep": lockstep, "paired": False, "seed": 0}
    return make_sb3_env("ral_gym/LatentCode-v0", E, run=run, device=device, **arguments)


def make(run: str, device: str, algo: str = "ppo", use_cache: bool = True, **env: Any) -> OnPolicyAlgorithm:
    venv = make_env(run, device, **env)
    policy = {"prior": run, "use_cache": use_cache}
    arguments = algorithm_defaults(algo, venv) | {"device": device, "seed": 0, "policy_kwargs": policy}
    return ALGORITHMS[algo](policy_for(algo), venv, **arguments)


def rollout(model: OnPolicyAlgorithm) -> EpisodeRolloutBuffer:
    _, callback = model._setup_learn(1, None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def tensors_of(policy: PixelCNNPolicy) -> list[Tensor]:
    packed = policy.cache.sampler().weights
    return [*policy.parameters(), packed.to_logits]


@on_every_device
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("algo", ["ppo", "maskable_ppo"])
def test_ratio_is_one_on_the_first_pass_with_the_cache(run: str, algo: str, lockstep: bool, device: str) -> None:
    model = make(run, device, algo, lockstep=lockstep)
    buffer = rollout(model)
    model.policy.set_training_mode(True)
    seen = 0
    for batch in buffer.get(2 * T):
        values, log_prob, entropy = model.policy.evaluate_actions(batch.observations, batch.actions)
        everything = (values, log_prob, entropy, batch.observations.codes, batch.actions, batch.old_log_prob)
        assert {tensor.device.type for tensor in everything} == {device}
        assert (log_prob - batch.old_log_prob).exp().sub(1).abs().max() <= 1e-5
        assert (values.flatten() - batch.old_values).abs().max() <= 1e-5
        seen += len(log_prob)
    assert seen == buffer.mask.sum() > 0
    assert {tensor.device.type for tensor in tensors_of(model.policy)} == {device}


@on_every_device
@pytest.mark.parametrize("lockstep", [False, True])
def test_cache_and_full_pass_draw_the_same_codes(run: str, lockstep: bool, device: str) -> None:
    cached, full = (rollout(make(run, device, use_cache=use, lockstep=lockstep)) for use in (True, False))
    np.testing.assert_array_equal(cached.codes, full.codes)
    np.testing.assert_allclose(cached.log_probs, full.log_probs, atol=1e-5)
    np.testing.assert_allclose(cached.values, full.values, atol=1e-5)
    np.testing.assert_allclose(cached.rewards, full.rewards, atol=1e-5)


@on_every_device
def test_the_fast_path_draws_what_stepping_draws(run: str, device: str) -> None:
    buffers = []
    for fast_path in (True, False):
        model = make(run, device, "reinforce", reset_mode="full", lockstep=True)
        model.fast_path = fast_path
        buffers.append(rollout(model))
    np.testing.assert_array_equal(buffers[0].codes, buffers[1].codes)
    np.testing.assert_allclose(buffers[0].log_probs, buffers[1].log_probs, atol=1e-5)
    np.testing.assert_allclose(buffers[0].rewards, buffers[1].rewards, atol=1e-5)


@on_every_device
@pytest.mark.parametrize("algo", trainable_algorithms())
def test_every_algorithm_trains_every_layer(run: str, algo: str, device: str) -> None:
    grouped = {"reset_mode": "full", "lockstep": True}
    model = make(run, device, algo, **grouped)
    before = {name: weights.clone() for name, weights in model.policy.named_parameters()}
    model.learn(2 * T * E)
    for name, weights in model.policy.named_parameters():
        assert weights.device.type == device and weights.isfinite().all()
        if not (name.startswith("value_net.") and algo in ("reinforce", "grpo")):
            assert not torch.equal(weights, before[name]), name


@on_every_device
@pytest.mark.parametrize(("algo", "algorithm"), [("ppo", PPO), ("maskable_ppo", MaskablePPO)])
def test_save_and_load_act_alike(run: str, tmp_path: Path, algo: str, algorithm: Any, device: str) -> None:
    model = make(run, device, algo)
    model.learn(T * E)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device=device)
    assert {tensor.device.type for tensor in tensors_of(loaded.policy)} == {device}
    obs = np.full((3, T), K, np.int16)
    obs[1, :5], obs[2, 8:] = [1, 2, 3, 4, 5], K + 1
    for deterministic in (True, False):
        actions = []
        for one in (model, loaded):
            torch.manual_seed(5)
            actions.append(one.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)


@on_every_device
def test_codes_are_decoded_and_scored_on_the_device(run: str, monkeypatch, device: str) -> None:
    env = make_env(run, device, reset_mode="full", lockstep=True)
    scorer: Any = env.world.scorer
    assert env.core.device.type == device
    for module in (scorer.vqvae, scorer.critic):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {device}
    seen: list[Tensor] = []
    for module in (scorer.vqvae.decoder, scorer.critic):
        monkeypatch.setattr(module, "forward", watched(module.forward, seen))
    codes = torch.randint(K, (E, T), generator=torch.Generator().manual_seed(0))
    env.reset()
    _, rewards, dones, infos = env.step_round(codes.to(device))
    assert len(seen) >= 4 and {tensor.device.type for tensor in seen} == {device}
    assert dones.all()
    reference = make_env(run, "cpu", reset_mode="full", lockstep=True)
    reference.reset()
    _, expected, _, expected_infos = reference.step_round(codes)
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    for info, other in zip(infos, expected_infos, strict=True):
        np.testing.assert_array_equal(info["codes"], other["codes"])
        np.testing.assert_allclose(info["score_map"], other["score_map"], atol=1e-3)


def watched(work: Any, seen: list[Tensor]) -> Any:
    def watch(*args: Tensor) -> Tensor:
        result = work(*args)
        seen.extend([*args, result])
        return result

    return watch


@on_every_device
@pytest.mark.parametrize("reset_mode", ["full", "mixed"])
def test_vector_environment_equals_that_of_the_cpu(run: str, reset_mode: str, device: str) -> None:
    arguments = {"num_envs": E, "run": run, "reset_mode": reset_mode, "render_mode": "rgb_array"}
    one, other = (gym.make_vec("ral_gym/LatentCode-v0", device=d, **arguments) for d in (device, "cpu"))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(one.reset(seed=0)[0], other.reset(seed=0)[0])
    for _ in range(T + 2):
        actions = rng.integers(K, size=E)
        result, expected = one.step(actions), other.step(actions)
        np.testing.assert_array_equal(result[0], expected[0])
        np.testing.assert_allclose(result[1], expected[1], atol=1e-4)
        np.testing.assert_array_equal(result[2], expected[2])
    pictures, expected_pictures = np.stack(one.render()), np.stack(other.render())
    assert np.abs(pictures.astype(int) - expected_pictures).max() <= 1


@pytest.fixture(params=["pixelcnn", "transformer", "gpt"])
def prior(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Weights of all sizes, so that no part can be left out unnoticed."""
    monkeypatch.setattr(kv_cache, "FEWEST_SLOTS", 4)  # graphs for 4, 8, 16 and 20 slots
    torch.manual_seed(0)
    sizes = {"hidden_units": 12, "layers": 3}
    if request.param == "pixelcnn":
        more = {"residual_units": 8, "conv_filter_size": 3, "output_stack_layers": 2}
        prior: Any = PixelCNN(11, 4, 5, position_embedding=True, **sizes, **more)
    elif request.param == "transformer":
        prior = Transformer(11, 4, 5, attention_heads=3, multiple_of=8, **sizes)
    else:
        prior = GPT(11, 4, 5, attention_heads=3, **sizes)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def samplers(prior: Any) -> list[CachedSampler]:
    """As they come, and with CUDA graphs off; on the CPU the two do the same."""
    made = [CachedSampler(prior), CachedSampler(prior)]
    assert made[0].use_cuda_graphs == next(prior.parameters()).is_cuda
    made[1].use_cuda_graphs = False
    return made


@on_every_device
def test_graphs_draw_whole_grids_as_plain_runs_do(prior: Any, device: str) -> None:
    """Also the second time, when graphs are replayed, and with new weights in the same places."""
    prior.to(device)
    uniforms = torch.rand(5, 20, device=device)
    given = torch.randint(11, (5, 20), device=device)
    graphs, plain = samplers(prior)
    for scale in (1.0, 1.0, 0.5):
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.mul_(scale)
        graphs.refresh()
        plain.refresh()
        for start in (0, 7):
            drawn = [sampler.sample(codes=given, start=start, uniforms=uniforms) for sampler in (graphs, plain)]
            expected = sample_naive(prior, codes=given, start=start, uniforms=uniforms)
            for codes, log_probs in drawn:
                assert torch.equal(codes, expected[0])
                torch.testing.assert_close(log_probs, expected[1], atol=1e-5, rtol=0)
            assert drawn[0][0].device.type == device


@on_every_device
def test_graphs_step_as_plain_runs_do_from_any_positions(prior: Any, device: str) -> None:
    """Rows at different positions, and one that starts anew half-way."""
    prior.to(device)
    codes = torch.randint(11, (4, 20), device=device)
    rows = torch.arange(4, device=device)
    for sampler in samplers(prior):
        position = torch.tensor([0, 3, 9, 12], device=device)
        sampler.begin(codes, position)
        for step in range(8):
            if step == 4:
                sampler.rebuild(rows[2:3], codes[2:3], 1)
                position[2] = 1
            with torch.no_grad():
                features = prior.features(codes)[rows, position]
                logits = prior.logits(features)
            torch.testing.assert_close(sampler.features(), features, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sampler.logits(), logits, atol=1e-4, rtol=1e-5)
            assert sampler.logits().device.type == device
            sampler.advance(codes[rows, position])
            position += 1
