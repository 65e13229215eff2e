"""Figures of a run: image distances, likelihood and entropy of codes, critic quality, nearest neighbours."""

from ral_gym.metrics.auc import auc, gap
from ral_gym.metrics.codes import (
    TemperatureMatch,
    code_counts,
    entropy,
    match_temperature,
    nll,
    perplexity,
    unigram_nll,
    usage,
)
from ral_gym.metrics.distances import Distance, FeatureDistance, ImageDistance, floor
from ral_gym.metrics.features import (
    EncoderFeatures,
    Extractor,
    InceptionFeatures,
    Lite0Features,
    extract,
    make_extractor,
)
from ral_gym.metrics.neighbours import nearest
from ral_gym.metrics.oracle import sequence_kl

__all__ = [
    "Distance",
    "EncoderFeatures",
    "Extractor",
    "FeatureDistance",
    "ImageDistance",
    "InceptionFeatures",
    "Lite0Features",
    "TemperatureMatch",
    "auc",
    "code_counts",
    "entropy",
    "extract",
    "floor",
    "gap",
    "make_extractor",
    "match_temperature",
    "nearest",
    "nll",
    "perplexity",
    "sequence_kl",
    "unigram_nll",
    "usage",
]
