"""The examples of parts from outside stay short; the tests of each part run them (test_own_*.py)."""

import ast
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "extending").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_one_short_file_that_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    words = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= 40 and "ral-gym" in words


def test_there_is_one_for_every_door_of_the_evaluation() -> None:
    assert {"own_metric", "own_prior", "own_reward"} <= {path.stem for path in EXAMPLES}
