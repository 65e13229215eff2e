"""What `examples/ablation.py` varies: the paper's Table 3, and baselines and discounts beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ral_gym.config import Config

Group = Literal["generation", "maps", "baseline", "gamma", "levels"]
GROUPS: tuple[Group, ...] = get_args(Group)
PAPER_MAPS = {
    ("single", 8): "53.15 (18.28)",
    ("single", 4): "49.24 (16.54)",
    ("single", 2): "49.78 (17.68)",
    ("intermediate", 8): "50.22 (18.65)",
    ("intermediate", 4): "54.835 (19.47)",
    ("intermediate", 2): "55.37 (20.99)",
}
"""Reward and side of the score map -> FID of Table 3b."""


@dataclass(frozen=True)
class Variant:
    """One row of the table: what it changes of the reference, by section of the settings."""

    name: str
    group: str
    label: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paper: str = "-"
    """FID in the paper's Table 3: to real images (to reconstructed ones)."""
    also: tuple[str, ...] = ()
    """The reference: names of the variants that it is."""

    def applied(self, config: Config) -> Config:
        """The reference's settings with the changes."""
        changed: Any = config
        for section, values in self.changes.items():
            changed = _changed(changed, section, values)
        return changed


def _changed(settings: Any, section: str, values: Mapping[str, Any]) -> Any:
    """Settings with other values in a section, such as ``ral`` or ``ral.reinforce``."""
    first, _, rest = section.partition(".")
    inner = getattr(settings, first)
    return replace(settings, **{first: _changed(inner, rest, values) if rest else replace(inner, **values)})


def reference_config(config: Config, updates: int | None) -> Config:
    """The settings that everything is compared with: the preset's, whole images."""
    return replace(config, ral=replace(config.ral, reset_mode="full", n_updates=updates or config.ral.n_updates))


def variants_of(config: Config, groups: Sequence[str]) -> list[Variant]:
    """The variants of these groups; some of them may be the reference `config` itself."""
    ral, side = config.ral, config.data.image_size
    found: list[Variant] = []
    if "generation" in groups:
        partial = {"ral": {"reset_mode": "mixed"}}
        found += [
            Variant("partial_equal_updates", "generation", "partial, equal updates", partial),
            Variant("partial_equal_time", "generation", "partial, equal time", partial, "49.24 (16.54)"),
        ]
    if "maps" in groups:
        for (reward, cells), paper in PAPER_MAPS.items():
            gamma = 1.0 if reward == "single" else ral.gamma
            changes: dict[str, dict[str, Any]] = {
                "ral": {"reward": reward, "gamma": gamma},
                "critic": {"layers": (side // cells).bit_length() - 1},
            }
            found.append(Variant(f"{reward}_{cells}x{cells}", "maps", f"{reward}, {cells}x{cells}", changes, paper))
        discounted = f"single, gamma {ral.gamma:g}"
        found.append(Variant("single_discounted", "maps", discounted, {"ral": {"reward": "single"}}))
    if "baseline" in groups:
        labels = {"none": "none", "mean": "mean", "leave_one_out": "leave-one-out"}
        found += [
            Variant(f"baseline_{b}", "baseline", label, {"ral.reinforce": {"baseline": b}})
            for b, label in labels.items()
        ]
    if "gamma" in groups:
        found += [Variant(f"gamma_{g:g}", "gamma", f"gamma {g:g}", {"ral": {"gamma": g}}) for g in (0.9, 0.99, 1.0)]
    return found


def reference_of(config: Config) -> Variant:
    """The reference, with the names of the variants that have its settings, and the paper's figure for them."""
    if config.vqvae.levels == 2:
        return Variant("reference", "reference", "both levels", paper="49.24 (16.54)")
    same = [variant for variant in variants_of(config, GROUPS) if variant.applied(config) == config]
    paper = next((variant.paper for variant in same if variant.paper != "-"), "-")
    return Variant("reference", "reference", "reference", paper=paper, also=tuple(variant.name for variant in same))


def described(config: Config) -> str:
    """The reference in words."""
    ral, cells = config.ral, config.data.image_size // 2**config.critic.layers
    baseline = ral.reinforce.baseline.replace("_", "-")
    return (
        f"full generation, {ral.reward} reward, {cells}x{cells} score map, baseline {baseline}, gamma {ral.gamma:g}, "
        f"{ral.n_updates} updates of {ral.n_envs} images"
    )


LEVELS = [
    Variant("top", "levels", "top level only", {"ral": {"train_levels": "top"}}, "54.82 (19.20)"),
    Variant("bottom", "levels", "bottom level only", {"ral": {"train_levels": "bottom"}}, "55.02 (19.80)"),
]
