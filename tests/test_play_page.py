"""The page of `ral-gym play`, end to end: the command as a process, its page in Chromium.

An audit hook in the process writes down every address that it asks for, and the browser every request of the page.
"""

import contextlib
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.class_runs import make_class_run
from tests.play_runs import add_policy

pytestmark = pytest.mark.browser

LISTENED = """
import json, sys
log = open(sys.argv.pop(1), "a", buffering=1)
ASKS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
        "socket.gethostbyaddr", "subprocess.Popen"}
def hook(event, arguments):
    if event in ASKS:  # a socket comes before the address
        about = arguments if isinstance(arguments[0], (str, bytes)) else arguments[1:]
        log.write(json.dumps([event, repr(about)]) + "\\n")
sys.addaudithook(hook)
from ral_gym.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Server:
    """A running `ral-gym play`."""

    process: subprocess.Popen[str]
    address: str
    folder: Path
    """Where its temporary files go."""
    log: Path
    """What it asked the network for, one JSON list a line."""

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def asked(self) -> list[tuple[str, str]]:
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]


@contextlib.contextmanager
def serving(root: Path, *arguments: str) -> Iterator[Server]:
    """The command on a free port; ended by Ctrl-C, and judged by how it ends."""
    folder, log = root / "temporary", root / "asked.jsonl"
    folder.mkdir()
    log.touch()
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", LISTENED, str(log), "play", *arguments, "--port", "0", "--no-browser"]
    with (root / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail((root / "errors").read_text())
        yield Server(process, found[0], folder, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, "Ctrl-C is how it is meant to end"
        assert (root / "errors").read_text() == ""
        assert list(folder.iterdir()) == [], "nothing stays behind"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("faces")) as server:
        yield server


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@contextlib.contextmanager
def visiting(browser: Any, server: Server, **options: Any) -> Iterator[Any]:
    """A page, opened; complaints of the browser, and requests to other places, fail."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    context.on("request", lambda request: requests.append(request.url))
    page.goto(server.address)
    page.wait_for_selector(".board img")
    page.wait_for_selector("#choices [data-code]")
    yield page
    context.close()
    assert complaints == []
    assert len(requests) > 10
    assert {url for url in requests if not url.startswith((server.address + "/", "data:", "blob:"))} == set()


def drawn(page: Any) -> int:
    return int(page.get_attribute(".board", "data-drawn"))


def wait_drawn(page: Any, n: int) -> None:
    page.wait_for_function(f"document.querySelector('.board').dataset.drawn == {n}", timeout=60_000)


def wait_finished(page: Any) -> None:
    page.wait_for_selector(".where:has-text('Finished')", timeout=60_000)


def codes(page: Any) -> list[int]:
    """The codes of the drawn cells, as their titles say."""
    titles = page.eval_on_selector_all("[data-cell]", "cells => cells.map(cell => cell.title)")
    return [int(re.search(r"code (\d+)", title)[1]) for title in titles]  # type: ignore[index]


# The episode ----------------------------------------------------------------------------------------------------------


def test_draw_choose_undo_and_finish(faces, browser) -> None:
    with visiting(browser, faces) as page:
        begun = drawn(page)
        assert begun == 36
        page.click("#step")
        wait_drawn(page, begun + 1)
        third = page.locator("#choices [data-code]").nth(2)
        wanted = int(third.get_attribute("data-code"))
        third.click()
        wait_drawn(page, begun + 2)
        assert codes(page)[-1] == wanted
        page.click("#undo")
        wait_drawn(page, begun + 1)
        page.click("#finish")
        wait_finished(page)
        assert drawn(page) == 64 and page.locator("#critic .map > span").count() == 16
        assert page.locator("#finish").is_disabled() and page.locator("#step").is_disabled()
        page.click("#undo")
        wait_drawn(page, begun + 1)


def test_an_image_appears_code_by_code_and_stops_at_another_click(faces, browser) -> None:
    with visiting(browser, faces) as page:
        page.evaluate(
            "seen = new Set(); new MutationObserver(() => seen.add(document.querySelector('.board')?.dataset.drawn))"
            ".observe(document.querySelector('#board'), {childList: true, subtree: true, attributes: true})"
        )
        page.click("#new")
        wait_drawn(page, 0)
        page.click("#finish")
        wait_finished(page)
        assert len(page.evaluate("[...seen]")) > 20
        page.click("#new")
        wait_drawn(page, 0)
        page.click("#finish")
        page.wait_for_function("document.querySelector('.board').dataset.drawn > 8")
        page.click("#step")
        page.wait_for_selector("#choices [data-code]")
        page.wait_for_timeout(1000)
        stopped = drawn(page)
        page.wait_for_timeout(1500)
        assert drawn(page) == stopped < 64


def test_the_seed_and_the_model_decide_the_image(faces, browser) -> None:
    def image(page: Any, seed: int, model: str) -> list[int]:
        page.locator(f"#generator input[value={model}]").check()
        page.fill("#seed input", str(seed - 1))
        page.wait_for_timeout(500)
        page.click("#new")
        wait_drawn(page, 0)
        assert page.input_value("#seed input") == str(seed)
        page.click("#finish")
        wait_finished(page)
        return codes(page)

    with visiting(browser, faces) as page:
        first = image(page, 5, "RAL")
        assert image(page, 6, "RAL") != first != image(page, 5, "MLE")
        assert image(page, 5, "RAL") == first


def test_a_wrong_code_and_what_it_did(faces, browser) -> None:
    with visiting(browser, faces) as page:
        page.click("#finish")
        wait_finished(page)
        before = codes(page)
        page.click('[data-cell="19"]')
        page.wait_for_selector(".cells > .wrong")
        page.wait_for_selector("#mistake figure")
        wait_finished(page)
        after = codes(page)
        assert after[:19] == before[:19] and after[19] != before[19]
        changed = sum(a != b for a, b in zip(after[20:], before[20:], strict=True))
        assert f"{changed} are others than without it" in " ".join(page.inner_text("#mistake").split())
        assert page.locator("#mistake figure").count() == 3 and page.locator("#mistake .ripple").count() == 63
        page.click("#undo")
        page.wait_for_selector("#mistake", state="hidden")
        assert codes(page) == before


def test_both_models_finish_the_same_beginning(faces, browser) -> None:
    with visiting(browser, faces) as page:
        page.click("#compare")
        page.wait_for_selector("#endings figure", timeout=60_000)
        assert page.locator("#endings section").count() == 2 and page.locator("#endings figure").count() == 8
        assert re.search(r"mean score of 64 endings .\d\.\d\d ± \d\.\d\d", page.inner_text("#endings"))
        page.click("#step")
        page.wait_for_selector("#endings figure", state="detached")


def test_the_animation_and_the_lines_repeat_the_episode(faces, browser) -> None:
    with visiting(browser, faces, accept_downloads=True) as page:
        page.click("#finish")
        wait_finished(page)
        shown = codes(page)
        page.click("#make-gif")
        page.wait_for_selector("#animation img", timeout=60_000)
        with page.expect_download() as download:
            page.click("#animation a")
        with Image.open(download.value.path()) as picture:
            assert picture.format == "GIF" and picture.n_frames == 65
        lines = page.inner_text("#lines pre")
        assert len(lines.splitlines()) == 5
        found: dict[str, Any] = {}
        exec(lines, found)
        assert found["observation"].tolist() == shown and found["terminated"]
        said = re.search(r"scores it (.\d\.\d\d)", page.inner_text(".where"))
        assert said is not None and float(said[1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            found["reward"], abs=0.005
        )


# Photos ---------------------------------------------------------------------------------------------------------------


def test_a_photo_is_completed_and_its_file_deleted(faces, browser, tmp_path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(300, 200, 3)).astype(np.uint8)).save(tmp_path / "photo.png")
    with visiting(browser, faces) as page:
        page.set_input_files("#photo input", str(tmp_path / "photo.png"))
        wait_drawn(page, 32)
        assert page.locator(".cells > .given").count() == 32 and page.locator(".original img").count() == 1
        assert faces.files() == []
        page.click("#finish")
        wait_finished(page)
        page.click("#real")
        wait_drawn(page, 32)


def test_a_large_photo_and_another_file_are_refused_and_deleted(faces, browser, tmp_path) -> None:
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(13_000_000))
    (tmp_path / "no.png").write_bytes(b"this is no image")
    context = browser.new_context()
    page = context.new_page()
    page.goto(faces.address)
    page.wait_for_selector("#choices [data-code]")
    for name, said in (
        ("no.png", "cannot be read as an image"),
        ("large.png", "the photo has 12.4 MiB: give one of at most 12"),
    ):
        page.set_input_files("#photo input", str(tmp_path / name))
        page.wait_for_selector(f"text={said}", timeout=30_000)
        page.wait_for_timeout(500)
        assert faces.files() == [] and drawn(page) == 36
    context.close()


# Classes --------------------------------------------------------------------------------------------------------------


def test_classes_and_guidance_where_the_run_has_them(browser, faces, tmp_path) -> None:
    with visiting(browser, faces) as page:
        assert not page.locator("#label").is_visible() and not page.get_by_text("Guidance", exact=True).is_visible()
    run = add_policy(make_class_run(tmp_path / "run"))
    with serving(tmp_path, str(run)) as server, visiting(browser, server) as page:
        assert page.locator("#label").is_visible() and page.get_by_text("Guidance", exact=True).is_visible()
        page.click("#label input")
        page.locator("[role=option]").nth(2).click()
        wait_drawn(page, 0)
        page.wait_for_selector("#lines pre:has-text('\"label\": 2')")
        page.click("#finish")
        wait_finished(page)
        found: dict[str, Any] = {}
        exec(page.inner_text("#lines pre"), found)
        assert found["observation"][:-1].tolist() == codes(page) and found["info"]["label"] == 2


# The outside ----------------------------------------------------------------------------------------------------------


def test_the_server_asks_for_nothing_but_loopback(faces, browser) -> None:
    with visiting(browser, faces) as page:
        page.click("#step")
        page.wait_for_timeout(300)
    asked = faces.asked()
    assert not [about for event, about in asked if event == "subprocess.Popen"]
    named = [re.findall(r"(?<=')[^']*(?=')", about)[0] for _, about in asked if "'" in about]
    outside = [name for name in named if name != "localhost" and not ipaddress.ip_address(name).is_loopback]
    assert outside == [] and len(named) > 0


def test_the_hook_would_have_seen_it(tmp_path) -> None:
    """The test above can fail: a look-up of another host is written down."""
    code = (
        LISTENED.partition("from ral_gym")[0]
        + "import socket\ntry: socket.getaddrinfo('192.0.2.1', 80)\nexcept OSError: pass"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=True, timeout=60)
    assert "192.0.2.1" in (tmp_path / "log").read_text()


def test_the_page_names_no_other_host_and_forbids_them(faces) -> None:
    with urllib.request.urlopen(faces.address) as answer:
        html, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert not re.findall(r"<(?:link|script|meta|img)\b[^>]*https?://(?!127\.0\.0\.1)[^>]*>", html)
    assert "default-src 'self'" in policy and "http" not in policy
    for path in ("/theme.css", "/config"):
        with urllib.request.urlopen(faces.address + path) as answer:
            assert "fonts.googleapis" not in answer.read().decode()


def test_other_names_of_this_computer_are_refused(faces) -> None:
    request = urllib.request.Request(faces.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 404
    refused.value.close()


# How it looks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1280, "light"), (400, "dark"), (1280, "dark")])
def test_the_page_fits_a_phone_and_a_dark_room(faces, browser, width, scheme, tmp_path) -> None:
    options = {"viewport": {"width": width, "height": 850}, "color_scheme": scheme}
    with visiting(browser, faces, **options) as page:
        page.click("#finish")
        wait_finished(page)
        page.click('[data-cell="10"]')
        page.wait_for_selector("#mistake figure")
        wait_finished(page)
        page.click("#compare")
        page.wait_for_selector("#endings figure", timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        look = "e => { const b = e.getBoundingClientRect(); return [b.left, b.right, b.width] }"
        for figure in page.locator("figure, .board").all():
            left, right, wide = figure.evaluate(look)
            assert left >= 0 and right <= width and wide >= 130
        assert page.locator(".board").evaluate(look)[2] >= min(300, 0.75 * width)
        colours = page.evaluate(
            "(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.card')))"
        )
        text, background = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (text > background) == (scheme == "dark") and abs(text - background) > 500
