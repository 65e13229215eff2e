"""Codes as features: with this extractor any SB3 algorithm for discrete actions runs on a code environment.

Such an algorithm sees one observation at a time, so it costs a pass per code where `PriorPolicy` costs one per image,
and it learns from scratch. It is meant for comparisons: ``DQN("MlpPolicy", env, policy_kwargs={
"features_extractor_class": CodeFeatures})``.
"""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from ral_gym.errors import ConfigError


class CodeFeatures(BaseFeaturesExtractor):
    """Embeds every code and the position that is drawn next, and mixes them in one layer.

    A Q-network or an LSTM on raw indices would read code 7 as seven times code 1.

    Args:
        observation_space: ``Box(0, K + 1, (T,), int16)``, with N classes ``Box(0, K + 1 + N, (T + 1,), int16)``.
        features_dim: width of the features.
        embedding_dim: width of one code's embedding.
        codebook_size: K, which an environment with classes requires; None: there are no classes.

    Raises:
        ConfigError: an observation space of another kind.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        features_dim: int = 128,
        embedding_dim: int = 16,
        codebook_size: int | None = None,
    ) -> None:
        if (
            not isinstance(observation_space, spaces.Box)
            or len(observation_space.shape) != 1
            or observation_space.dtype.kind != "i"
        ):
            raise ConfigError(
                f"CodeFeatures reads codes, Box(0, K + 1, (T,), int16), not {observation_space}: use an environment "
                "from make_sb3_env"
            )
        super().__init__(observation_space, features_dim)
        tokens = int(observation_space.high.max()) + 1  # K + 2, or K + 2 + N
        self.not_drawn = tokens - 2 if codebook_size is None else codebook_size
        classes = tokens - 2 - self.not_drawn
        if classes < 0:
            raise ConfigError(f"codebook_size={codebook_size} does not fit observations {observation_space}")
        self.n_codes = observation_space.shape[0] - (classes > 0)
        self.embedding = nn.Embedding(tokens, embedding_dim)
        self.position = nn.Embedding(self.n_codes, features_dim)
        self.window = nn.Linear(observation_space.shape[0] * embedding_dim, features_dim)

    def forward(self, observations: Tensor) -> Tensor:
        """Observations (B, T) or (B, T + 1), of any dtype SB3 makes of them, to features (B, features_dim)."""
        codes, label = observations.long().tensor_split([self.n_codes], 1)  # (B, T), (B, 0) or (B, 1)
        # Codes in the order of drawing, the newest last: the layer need not learn every rule once per position.
        position = (codes == self.not_drawn).int().argmax(1)  # (B,)
        columns = torch.arange(self.n_codes, device=codes.device)
        shifted = codes.gather(1, (columns + position[:, None]) % self.n_codes)  # (B, T)
        entries = torch.cat([shifted, label], 1)  # (B, T) or (B, T + 1)
        return torch.relu(self.window(self.embedding(entries).flatten(1)) + self.position(position))
