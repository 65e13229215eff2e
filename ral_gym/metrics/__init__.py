"""Metrics of a run: image distances, likelihood of codes, distance from an oracle, exposure bias, diversity."""

from ral_gym.metrics.auc import auc, gap
from ral_gym.metrics.codes import (
    TemperatureMatch,
    code_counts,
    entropy,
    image_entropy,
    image_nll,
    match_temperature,
    nll,
    perplexity,
    unigram_nll,
    usage,
)
from ral_gym.metrics.distances import Distance, FeatureDistance, ImageDistance, floor
from ral_gym.metrics.diversity import hamming_distance
from ral_gym.metrics.exposure import Curve, ExposureBias, as_lists, divergences, exposure_bias
from ral_gym.metrics.features import (
    EncoderFeatures,
    Extractor,
    InceptionFeatures,
    Lite0Features,
    extract,
    make_extractor,
)
from ral_gym.metrics.intervals import Estimate, distance_estimates, mean_estimate, paired_estimate, repeated, subsampled
from ral_gym.metrics.memorisation import Memorisation
from ral_gym.metrics.neighbourhood import Neighbourhood, NeighbourhoodScores
from ral_gym.metrics.neighbours import nearest
from ral_gym.metrics.oracle import oracle_metrics, sequence_kl
from ral_gym.metrics.pyramid import PyramidFeatures
from ral_gym.metrics.recovery import (
    CorruptionResponse,
    PrefixCurve,
    corrupt,
    corruption_response,
    half_life,
    prefix_curve,
)
from ral_gym.metrics.seeds import SeedDifference

__all__ = [
    "CorruptionResponse",
    "Curve",
    "Distance",
    "EncoderFeatures",
    "Estimate",
    "ExposureBias",
    "Extractor",
    "FeatureDistance",
    "ImageDistance",
    "InceptionFeatures",
    "Lite0Features",
    "Memorisation",
    "Neighbourhood",
    "NeighbourhoodScores",
    "PrefixCurve",
    "PyramidFeatures",
    "SeedDifference",
    "TemperatureMatch",
    "as_lists",
    "auc",
    "code_counts",
    "corrupt",
    "corruption_response",
    "distance_estimates",
    "divergences",
    "entropy",
    "exposure_bias",
    "extract",
    "floor",
    "gap",
    "half_life",
    "hamming_distance",
    "image_entropy",
    "image_nll",
    "make_extractor",
    "match_temperature",
    "mean_estimate",
    "nearest",
    "nll",
    "oracle_metrics",
    "paired_estimate",
    "perplexity",
    "prefix_curve",
    "repeated",
    "sequence_kl",
    "subsampled",
    "unigram_nll",
    "usage",
]
