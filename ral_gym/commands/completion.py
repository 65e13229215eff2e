"""`ral-gym completion bash|zsh`: a script for the shell, made by tyro, with the names of presets and algorithms."""

from __future__ import annotations

import contextlib
import io
import re
import sys

from ral_gym.commands.look_arguments import CompletionArguments
from ral_gym.presets import PRESETS

ALGORITHMS = ("reinforce", "ppo", "a2c", "trpo", "grpo", "maskable_ppo")
"""The built-in ones that train a sequence model."""
NAMES = {"--preset": tuple(PRESETS.builtin), "--algo": ALGORITHMS, "--ral.algo": ALGORITHMS}
"""Flags whose values are texts for the parser, and names for a person."""


def print_completion(arguments: CompletionArguments) -> str:
    """Print the script; returns it."""
    script = completion_script(arguments.shell)
    sys.stdout.write(script)
    return script


def completion_script(shell: str) -> str:
    """The script of a shell; it needs that shell and python3, but not this package."""
    from ral_gym.commands.arguments import parse

    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        parse(["--tyro-print-completion", shell])
    script = written.getvalue()
    for flag, names in NAMES.items():
        # An option of tyro's script: {'flags': [..], 'description': .., 'type': 'path', ..}.
        option = rf"('flags': \['{re.escape(flag)}'\], 'description': (?:'[^']*'|\"[^\"]*\"), 'type': )'path'"
        script = re.sub(option, rf"\1'choice', 'choices': {list(names)!r}", script)
    return script
