"""`ral-gym play`: the page of `ral_gym.play`, for a run or the bundled faces."""

from __future__ import annotations

import os
import sys
import webbrowser

from rich.console import Console

from ral_gym.commands.draw_arguments import PlayArguments
from ral_gym.commands.extras import PAGE, check_installed
from ral_gym.commands.generate import need, open_run
from ral_gym.errors import ConfigError, printable

HIGHEST_PORT = 65_535


def play(arguments: PlayArguments, console: Console) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: Gradio is not installed, or nothing can listen at this address.
        RunError: not a run folder, or stage 1 or 2 has not run.
    """
    check_installed({"the page": PAGE})
    if not 0 <= arguments.port <= HIGHEST_PORT:
        raise ConfigError(f"--port is {arguments.port}: give 0 to {HIGHEST_PORT}; 0 takes any that is free")
    if arguments.run is not None:
        files = ["vqvae.safetensors", "prior.safetensors"]
        need(open_run(arguments.run), files, "train stages 1 and 2 with ral-gym train --stages vqvae prior")
    from ral_gym.play.models import load_models
    from ral_gym.play.server import is_loopback, serve

    console.print("Loading the models and the page ..", highlight=False)
    models = load_models(arguments.run, arguments.device, arguments.plugins)

    def started(address: str) -> None:
        what = "the bundled faces" if arguments.run is None else printable(arguments.run)
        console.print(f"Play with {what} at {address} (Ctrl-C ends it)", highlight=False, soft_wrap=True, markup=False)
        if not is_loopback(arguments.host):
            console.print("Everyone who can reach this address may use it.", highlight=False)
        if arguments.browser and _has_screen():
            webbrowser.open(address)

    serve(models, arguments.host, arguments.port, started)


def _has_screen() -> bool:
    """Whether a browser would have a window, rather than take over the terminal."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
