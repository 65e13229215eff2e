"""The page's server: bound to this computer, asking for nothing outside it, leaving nothing behind.

Gradio's page refers to fonts and pictures on the Internet and can send statistics. Here the theme has the system's
fonts, the statistics are off before Gradio is imported, references to other hosts are taken out of the page, and a
Content-Security-Policy makes the browser refuse what may be left.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ral_gym.errors import ConfigError
from ral_gym.play.models import Models
from ral_gym.play.upload import FOLDER, MOST_MB

OFF = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment variables that keep libraries from asking the Internet."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'"
)
"""What the browser may load: this server's own files, and data inside the page."""
ELSEWHERE = re.compile(rb"<(?:meta|link|script)\b[^>]*https?://[^>]*>(?:\s*</script>)?", re.IGNORECASE)
"""Elements of Gradio's page that name another host."""
REFUSED = ("/proxy=", "/gradio_api/proxy=")
"""Gradio's addresses that pass requests on to other hosts."""
STYLE = Path(__file__).with_name("style.css")


class Private:
    """ASGI middleware: the page without references to other hosts, with `POLICY`, and under its own name only.

    Args:
        app: the application.
        host: the address that it is served at. If that is this computer's own, requests that name another host are
            refused: a page from elsewhere could have led the browser here by a name that points to this computer.
    """

    def __init__(self, app: Callable[..., Any], host: str) -> None:
        self.app, self.local = app, is_loopback(host)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        foreign = self.local and not is_loopback(urlsplit(f"//{asked}").hostname or "")
        if foreign or scope["path"].startswith(REFUSED):
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        # Else the page might come compressed.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self.app(scope, receive, _Cleaned(send))


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this computer's own, which no other computer reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Cleaned:
    """Sends HTML in one piece, cleaned; everything else as it comes."""

    def __init__(self, send: Any) -> None:
        self.send, self.body = send, b""
        self.start: MutableMapping[str, Any] | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"content-security-policy"]
            message = {**message, "headers": [*headers, (b"content-security-policy", POLICY.encode())]}
            if any(name.lower() == b"content-type" and b"text/html" in value for name, value in headers):
                self.start = message
                return
        elif self.start is not None:
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = ELSEWHERE.sub(b"", self.body)
            headers = [pair for pair in self.start["headers"] if pair[0].lower() != b"content-length"]
            await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await self.send(message)


def make_app(models: Models, host: str, port: int) -> Any:
    """The ASGI application of a page."""
    os.environ |= OFF
    import fastapi
    import gradio as gr

    from ral_gym.play.page import Page

    fonts = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "Consolas", "monospace"]
    theme = gr.themes.Default(font=fonts[0], font_mono=fonts[1])
    page = Page(models).blocks
    page.queue(default_concurrency_limit=8, api_open=False)
    app = fastapi.FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        server_port=port,
        max_file_size=MOST_MB * 2**20,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme,
        css_paths=STYLE,
    )
    return Private(app, host)


def serve(models: Models, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; uploads go to a temporary folder that ends with the server.

    Args:
        models: what is drawn with.
        host: the address to listen at.
        port: the port; 0: any that is free.
        started: called with the page's address once the server is to answer.

    Raises:
        ConfigError: nothing can listen there.
    """
    listening = _listen(host, port)
    folder = tempfile.TemporaryDirectory(prefix="ral_gym_play_", ignore_cleanup_errors=True)
    with listening, folder, _ended_by_signals():
        os.environ[FOLDER] = folder.name
        port = listening.getsockname()[1]
        app = make_app(models, host, port)
        import uvicorn

        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C is how the server is meant to end; after SIGTERM, too, what it has written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        ConfigError: it is taken, not this computer's, or no address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen()  # a browser that comes early waits
        except BaseException:
            listening.close()
            raise
        return listening
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen at {host}:{port} ({reason}): choose another --port or --host") from error
