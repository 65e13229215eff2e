"""Environment pages from the environments' docstrings, as Gymnasium and Minigrid make theirs.

A page holds a line ``<!-- environment: ral_gym/Toy-v0 -->``. Everything after it is replaced by a table of the id's
spaces and the docstring of its class, which is Markdown. `environment_page` is the text; tests read it too.
"""

import importlib
import inspect
import re

import gymnasium
from sphinx.application import Sphinx

import ral_gym

MARK = re.compile(r"<!-- environment: (\S+) -->.*", re.DOTALL)
SECTIONS = [
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Information",
    "Arguments",
    "Version History",
]
"""The headings that a docstring must have, in this order."""
PAGES = {
    "ToyEnv": "toy.md",
    "ToyClassesEnv": "toy_classes.md",
    "FacesEnv": "faces.md",
    "OracleEnv": "oracle.md",
    "LatentCodeEnv": "latent_code.md",
    "GenerationVectorEnv": "../api/envs.md",
    "CriticCallback": "../api/agents.md",
}
"""What a docstring may name in backticks, and its page as seen from docs/environments/."""


def registered_ids() -> list[str]:
    """The ids that ral_gym registers."""
    return [name for name in gymnasium.registry if name.startswith(f"{ral_gym.__name__}/")]


def environment_class(name: str) -> type:
    """The class behind an id."""
    module, _, attribute = str(gymnasium.spec(name).entry_point).partition(":")
    return getattr(importlib.import_module(module), attribute)


def fence_examples(text: str) -> str:
    """Doctests (``>>>`` to the next blank line) as fenced blocks: in Markdown ``>`` is a quotation."""
    return re.sub(r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", text, flags=re.MULTILINE)


def link_names(text: str, own: str) -> str:
    """Other environments' names in backticks become links to their pages."""
    for name, page in PAGES.items():
        if name != own:
            text = text.replace(f"`{name}`", f"[`{name}`]({page})")
    return text


def summary_table(name: str, environment: type) -> str:
    """Id, spaces, threshold and how to make it. An environment that needs a run has no spaces before it is made."""
    rows = {"Id": f"`{name}`", "Class": f"`{environment.__module__}.{environment.__qualname__}`"}
    if name != "ral_gym/LatentCode-v0":
        made = gymnasium.make(name)
        rows |= {"Action space": f"`{made.action_space}`", "Observation space": f"`{made.observation_space}`"}
        made.close()
    argument = ', run="runs/demo"' if name == "ral_gym/LatentCode-v0" else ""
    rows["One episode at a time"] = f'`gymnasium.make("{name}"{argument})`'
    rows["Many at once"] = f'`gymnasium.make_vec("{name}", num_envs=64{argument})`'
    threshold = gymnasium.spec(name).reward_threshold
    if threshold is not None:
        rows["Solved from"] = f'a mean return of {threshold} (`reward="single"`)'
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def environment_page(name: str) -> str:
    """The Markdown of an environment's page, without its title.

    Raises:
        ValueError: the docstring lacks a section, or has them in another order.
    """
    environment = environment_class(name)
    text = inspect.getdoc(environment) or ""
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if found != SECTIONS:
        raise ValueError(f"the docstring of {environment.__qualname__} has the sections {found}, not {SECTIONS}")
    first, _, rest = text.partition("\n\n")
    return f"{first}\n\n{summary_table(name, environment)}\n\n" + link_names(
        fence_examples(rest), environment.__qualname__
    )


def fill_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the mark of a page by its environment."""
    source[0] = MARK.sub(lambda match: environment_page(match[1]), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill pages as they are read."""
    app.connect("source-read", fill_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
