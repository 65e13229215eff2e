"""Make the models of the package (ral_gym/assets): a run of the preset `demo-patchgan`, then `make assets`.

`ral_gym/Faces-v0`: the demo run's VQ-VAE, codes and PixelCNN, a critic trained to tell real codes from that
PixelCNN's samples, and for `ral-gym play` the run's averaged RAL policy. `ral_gym/Oracle-v0`: an oracle PixelCNN
fitted to the same codes, a lighter PixelCNN fitted to 20,000 samples of the oracle, and 1,280 of those samples. All
weights are stored as float16, 4 MB together; what is fitted to a network is fitted to its rounded weights. About 8
minutes on two cores.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from ral_gym.agents import CoTrainedCritic
from ral_gym.assets import FOLDER
from ral_gym.config import Config
from ral_gym.metrics import nll
from ral_gym.presets import DEMO_PATCHGAN
from ral_gym.priors.base import maximum_likelihood_loss
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler
from ral_gym.rewards.critic import PatchCritic
from ral_gym.runs.progress import progress_bar
from ral_gym.runs.run import read_config, seed_everything
from ral_gym.runs.storage import load_module, save_tensors, write_text
from ral_gym.tokenizers.code_set import CodeSet
from ral_gym.tokenizers.vqvae import VQVAE


@dataclass
class Arguments:
    """Make the package's models from a finished demo run."""

    run: str = "runs/demo-patchgan"
    """The run folder of `ral-gym train --preset demo-patchgan`."""
    output: str = str(FOLDER)
    """Where the files go."""
    oracle_steps: int = 1500
    """Training steps of the oracle."""
    light_steps: int = 1500
    """Training steps of the light PixelCNN."""
    critic_steps: int = 1200
    """Training steps of the critic."""
    n_oracle_samples: int = 20_000
    """Samples of the oracle that the light PixelCNN is fitted to."""


def round_weights(module: nn.Module) -> nn.Module:
    """A copy whose weights are those that its float16 file holds."""
    rounded = copy.deepcopy(module)
    for tensor in rounded.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().float())
    return rounded


def save_half(path: Path, module: nn.Module, **facts: Any) -> None:
    """As `save_module`, in float16."""
    weights = {name: x.half() if x.is_floating_point() else x for name, x in module.state_dict().items()}
    save_tensors(path, weights, {"class": type(module).__name__, "config": module.config, **facts})


def fit(prior: PixelCNN, train: Tensor, test: Tensor, steps: int, name: str) -> tuple[PixelCNN, float]:
    """Maximum likelihood with a learning rate that falls to zero; the rounded network and its held-out NLL."""
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    prior.train()
    for _ in progress_bar(range(steps), desc=name, unit="step"):
        loss = maximum_likelihood_loss(prior, train[torch.randint(len(train), (64,))].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    rounded: PixelCNN = round_weights(prior.eval())  # type: ignore[assignment]
    return rounded, nll(rounded, test)


def samples(prior: PixelCNN, n: int, seed: int) -> Tensor:
    """Codes (n, T) int16 drawn from a network."""
    sampler, generator = CachedSampler(prior), torch.Generator().manual_seed(seed)
    batches = [sampler.sample(min(500, n - i), generator=generator)[0] for i in range(0, n, 500)]
    return torch.cat(batches).to(torch.int16)


def make_critic(
    vqvae: VQVAE, prior: PixelCNN, codes: CodeSet, config: Config, steps: int
) -> tuple[CoTrainedCritic, dict[str, float]]:
    """A critic that tells real codes from the prior's samples, and its metrics on held-out ones."""
    settings = dataclasses.replace(DEMO_PATCHGAN.critic, loss="hinge")
    network = PatchCritic(vqvae.image_size, vqvae.channels, hidden_units=settings.hidden_units, layers=settings.layers)
    critic = CoTrainedCritic(vqvae, network, codes.train, codes.test, settings, seed=config.seed)
    fakes = samples(prior, 6000, seed=1).long()
    for _ in progress_bar(range(steps // 20), desc="critic", unit="step"):
        critic.train(critic.finished(fakes), 20)
    critic.critic = round_weights(critic.critic)
    held_out = samples(prior, 500, seed=2).long()
    _, metrics = critic.rewards(critic.finished(held_out))
    return critic, metrics


def main(arguments: Arguments) -> None:
    """All files, in the order in which they depend on each other."""
    run, output = Path(arguments.run), Path(arguments.output)
    config = read_config(run)
    seed_everything(config.seed)
    vqvae: VQVAE = round_weights(load_module(run / "vqvae.safetensors", VQVAE))  # type: ignore[assignment]
    prior: PixelCNN = round_weights(load_module(run / "prior.safetensors", PixelCNN))  # type: ignore[assignment]
    codes = CodeSet.load(run / "codes.safetensors")
    test = torch.from_numpy(codes.test)

    critic, metrics = make_critic(vqvae, prior, codes, config, arguments.critic_steps)
    facts = {"normalization": critic.normalization, "shift": critic.normalizer.shift, "scale": critic.normalizer.scale}
    write_text(output / "faces/config.json", config.to_json())
    save_half(output / "faces/vqvae.safetensors", vqvae)
    dataclasses.replace(codes, train=codes.train[: codes.clean]).save(output / "faces/codes.safetensors")
    save_half(output / "faces/prior.safetensors", prior, nll_test=nll(prior, test))
    policy = round_weights(load_module(run / "policy_ema.safetensors", PixelCNN))
    save_half(output / "faces/policy_ema.safetensors", policy, nll_test=nll(policy, test))
    save_half(output / "faces/critic.safetensors", critic.critic, **facts, heldout_auc=metrics["heldout_auc"])

    shape = {key: prior.config[key] for key in ("codebook_size", "height", "width")}
    oracle, oracle_nll = fit(
        PixelCNN(**prior.config), torch.from_numpy(codes.train), test, arguments.oracle_steps, "oracle"
    )
    drawn = samples(oracle, arguments.n_oracle_samples + 256, seed=3)
    light, light_nll = fit(
        PixelCNN(**shape, hidden_units=32, residual_units=32, layers=2, dropout=0.0, output_stack_layers=1),
        drawn[256:],
        drawn[:256].long(),
        arguments.light_steps,
        "light prior",
    )
    save_half(output / "oracle/oracle.safetensors", oracle, nll_test=oracle_nll)
    save_half(output / "oracle/prior.safetensors", light, nll_test=light_nll)
    CodeSet(drawn[256:1280].numpy(), drawn[:256].numpy(), None, clean=1024).save(output / "oracle/codes.safetensors")

    total = sum(file.stat().st_size for file in output.rglob("*/*.*"))
    entropy = nll(oracle, drawn[:256].long())  # of its own samples
    print(f"prior: held-out NLL {nll(prior, test):.3f} nats per code")
    print(f"critic: held-out AUC {metrics['heldout_auc']:.2f}")
    print(f"oracle: held-out NLL {oracle_nll:.3f}, entropy {entropy:.3f}; light prior on its samples: {light_nll:.3f}")
    print(f"{total / 2**20:.1f} MiB in {output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
