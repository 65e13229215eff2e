"""What stage 1 adds to a tokenizer's own loss: a perceptual distance, and the judgement of a discriminator.

The loss of a VQGAN ("Taming Transformers for High-Resolution Image Synthesis", Esser et al., 2021, eq. 4 to 7) with the
parts and weights of LlamaGen (Sun et al., 2024, section 3.1): the tokenizer's own loss (squared error, codebook,
commitment) + `perceptual_weight` x the perceptual distance (`ral_gym.stages.perceptual`) + `adversarial_weight` x the
negative mean score that a PatchGAN gives the reconstruction. That PatchGAN learns by the hinge loss from the same
images and reconstructions, one step per step of the tokenizer, and both begin after `adversarial_start` steps. Taming
chooses the weight anew at every step, from norms of gradients; LlamaGen's fixed one gives the same step however a batch
is shared out over processes and parts. For the same reason the discriminator has no batch norm, unlike theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ral_gym.config import VQVAEConfig
from ral_gym.errors import ConfigError
from ral_gym.rewards.critic import PatchCritic
from ral_gym.stages.common import UnseenLosses, check_finite, check_weights, make_adam, restore_optimizer
from ral_gym.stages.perceptual import Perceptual, make_perceptual, network_facts
from ral_gym.stages.processes import JointBatches

STAGE = "vqvae"
REMEDY = "lower vqvae.discriminator_learning_rate"
LOOK_EVERY = 10
"""On CUDA, how many of the discriminator's losses are looked at together."""


class ImageLosses:
    """The perceptual and the adversarial loss of stage 1, and the discriminator's training.

    Made before a stage draws its first batch; draws random numbers (the discriminator's weights) only if the
    adversarial loss has a weight.

    Args:
        config: the section `vqvae` of a run's settings.
        tokenizer: what is trained.
        accelerator: of the stage.

    Raises:
        ConfigError: the perceptual network's packages or files are missing, damaged or something else.
    """

    def __init__(self, config: VQVAEConfig, tokenizer: Any, accelerator: Accelerator) -> None:
        self.config, self.kind, self.accelerator = config, type(tokenizer).__name__, accelerator
        self.perceptual: Perceptual | None = None
        self.discriminator: PatchCritic | None = None
        self.unseen = UnseenLosses(LOOK_EVERY)
        if config.perceptual_weight:
            self.perceptual = make_perceptual(config.perceptual_network).to(accelerator.device)
        if config.adversarial_weight:
            self.discriminator = make_discriminator(config, tokenizer)
            rate = config.discriminator_learning_rate or config.learning_rate
            betas = (config.adam_beta1, config.adam_beta2)
            self.optimizer = make_adam(self.discriminator, rate, betas)
            self.model = accelerator.prepare(self.discriminator)

    def begun(self, step: int) -> bool:
        """Whether the adversarial loss counts at a step, the first of which is 1."""
        return self.discriminator is not None and step > self.config.adversarial_start

    def __call__(self, painted: Tensor | None, images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the tokenizer's loss, and the figures to log.

        Args:
            painted: the reconstruction (B, C, S, S) with its gradients; None: the tokenizer hands none over.
            images: (B, C, S, S) in [-1, 1].
            step: the stage's step, from 1.

        Raises:
            ConfigError: a weight is above 0, and there is no reconstruction of the images' shape.
        """
        total, logged = images.new_zeros(()), dict[str, Tensor]()
        if self.perceptual is None and self.discriminator is None:
            return total, logged
        if not isinstance(painted, Tensor) or painted.shape != images.shape:
            name = "perceptual_weight" if self.perceptual is not None else "adversarial_weight"
            raise ConfigError(
                f"vqvae.{name} is {getattr(self.config, name)}, but the training_loss of {self.kind} hands over no "
                f"reconstruction {tuple(images.shape)} in its dict: add it, or give vqvae.{name} 0"
            )
        if self.perceptual is not None:
            logged["perceptual"] = self.perceptual(painted, images)
            total = total + self.config.perceptual_weight * logged["perceptual"]
        if self.discriminator is not None and self.begun(step):
            fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
            logged["adversarial"] = -functional_call(self.discriminator, fixed, (painted,)).float().mean()
            total = total + self.config.adversarial_weight * logged["adversarial"]
        return total, {name: value.detach() for name, value in logged.items()}

    def learn(
        self, images: Tensor, painted: Tensor | None, step: int, batches: JointBatches, number: int
    ) -> dict[str, Tensor]:
        """The discriminator's gradients of one part of a batch.

        Args:
            images: (B, C, S, S) in [-1, 1].
            painted: their reconstructions.
            step: the stage's step, from 1.
            batches: of the stage.
            number: of the part.

        Returns:
            the figures to log: the loss, and the mean scores of images and of reconstructions.

        Raises:
            DivergedError: the loss is NaN or infinite.
        """
        if not self.begun(step) or painted is None:
            return {}
        with batches.part(self.model, number):
            scores = self.model(torch.cat([images, painted.detach()])).float()  # (2 B, h, w)
            real, fake = scores.chunk(2)
            loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            for value, at in self.unseen.add(loss, step, last=step == self.config.training_steps):
                check_finite(value, STAGE, at, REMEDY)
            self.accelerator.backward(loss / batches.parts)
        figures = {"loss": loss, "real": real.mean(), "fake": fake.mean()}
        return {f"discriminator_{name}": value.detach() for name, value in figures.items()}

    def update(self, step: int) -> None:
        """The discriminator's optimizer step, by the gradients of all parts."""
        if self.begun(step):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_dict(self, step: int) -> dict[str, Any]:
        """For a checkpoint; {} without these losses.

        Raises:
            DivergedError: a weight of the discriminator is NaN or infinite.
        """
        state: dict[str, Any] = {}
        if self.discriminator is not None:
            check_weights(self.discriminator, STAGE, step, REMEDY)
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.optimizer.state_dict()
        if self.perceptual is not None:
            state["perceptual_files"] = network_facts(self.config.perceptual_network)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint.

        Raises:
            ValueError: it is another discriminator's, or the perceptual network's files are others now.
        """
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            restore_optimizer(self.optimizer, state["discriminator_optimizer"])
        if self.perceptual is not None and state["perceptual_files"] != network_facts(self.config.perceptual_network):
            raise ValueError("it began with other files as vqvae.perceptual_network")


def make_discriminator(config: VQVAEConfig, tokenizer: Any) -> PatchCritic:
    """The untrained discriminator of a tokenizer's images."""
    units, layers = config.discriminator_units, config.discriminator_layers
    return PatchCritic(tokenizer.image_size, tokenizer.channels, hidden_units=units, layers=layers)


class TrainingStep(nn.Module):
    """A tokenizer whose forward pass is its training loss and what is added, as data parallelism needs it.

    Args:
        tokenizer: has `training_loss`.
        losses: what is added.
    """

    def __init__(self, tokenizer: Any, losses: ImageLosses) -> None:
        super().__init__()
        self.tokenizer, self.losses = tokenizer, losses

    def forward(self, images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Images (B, C, S, S) in [-1, 1] -> loss, metrics to log, and the reconstruction without gradients."""
        found = self.tokenizer.training_loss(images)
        loss, logged = found if isinstance(found, tuple) else (found, {})
        logged = dict(logged)
        painted = logged.pop("reconstruction", None)
        more, figures = self.losses(painted, images, step)
        figures = {name: torch.as_tensor(value, device=images.device) for name, value in logged.items()} | figures
        return loss + more, figures, painted.detach() if isinstance(painted, Tensor) else None
