"""`ral-gym play` before the server runs, its middleware, an upload that is not one, and the pieces of HTML."""

import asyncio
import html.parser
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ral_gym.commands import extras
from ral_gym.commands.cli import main
from ral_gym.errors import DataError
from ral_gym.play import fragments
from ral_gym.play.comparison import finish_by_each, last_mistake
from ral_gym.play.models import Models, load_models
from ral_gym.play.server import POLICY, Private, is_loopback
from ral_gym.play.session import Session
from ral_gym.play.upload import FOLDER, read_upload
from tests.class_runs import make_class_run
from tests.play_runs import add_policy
from tests.tiny import make_tiny_run

# The command ----------------------------------------------------------------------------------------------------------


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch, capsys) -> None:
    monkeypatch.setattr(extras, "_is_installed", lambda module: module != "gradio")
    assert main(["play", "/nowhere"]) == 2
    said = 'the page needs gradio, not installed: pip install "ral-gym[play]"'
    assert said in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys) -> None:
    assert main(["play", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    run = make_tiny_run(tmp_path / "run")
    (run / "prior.safetensors").unlink()
    assert main(["play", str(run)]) == 2
    assert "has no prior.safetensors: train stages 1 and 2" in capsys.readouterr().err


def test_an_address_that_is_taken_or_wrong_is_refused(tmp_path, capsys) -> None:
    run = str(make_tiny_run(tmp_path / "run"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["play", run, "--port", port, "--no-browser"]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
    assert main(["play", run, "--host", "192.0.2.7", "--no-browser"]) == 2
    assert "choose another --port or --host" in capsys.readouterr().err
    assert main(["play", run, "--port", "70000"]) == 2
    assert "--port is 70000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *[(name, True) for name in ("127.0.0.1", "127.8.8.8", "::1", "localhost")],
        *[(name, False) for name in ("0.0.0.0", "192.168.1.4", "localhost.example", "")],
    ],
)
def test_what_is_this_computer(host: str, local: bool) -> None:
    assert is_loopback(host) is local


# The middleware -------------------------------------------------------------------------------------------------------

OUTSIDE = (
    b'<head><script src="https://cdn.example/a.js" async></script><link rel="stylesheet" href="https://fonts.example/f">'
    b'<meta content="http://x.example/y"><script>var kept = "https://words.example";</script></head>'
)


def ask(path: str = "/", host: bytes = b"127.0.0.1:7860", served: str = "127.0.0.1", kind: bytes = b"text/html") -> Any:
    """Status, headers and body of an application that answers with `OUTSIDE` in two parts."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert b"accept-encoding" not in dict(scope["headers"])
        headers = [(b"content-type", kind), (b"content-length", str(len(OUTSIDE)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": OUTSIDE[:40], "more_body": True})
        await send({"type": "http.response.body", "body": OUTSIDE[40:]})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"host", host), (b"accept-encoding", b"br")]}
    asyncio.run(Private(app, served)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent[1:])


def test_references_to_other_hosts_are_taken_out_of_pages() -> None:
    status, headers, body = ask()
    assert status == 200 and body == b'<head><script>var kept = "https://words.example";</script></head>'
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"content-security-policy"] == POLICY.encode()


def test_other_files_pass_unchanged() -> None:
    _, headers, body = ask(kind=b"text/javascript")
    assert body == OUTSIDE and headers[b"content-security-policy"] == POLICY.encode()


@pytest.mark.parametrize("host", [b"evil.example", b"evil.example:7860", b"192.168.1.4", b""])
def test_a_page_for_this_computer_has_only_its_names(host: bytes) -> None:
    assert ask(host=host)[0] == 404
    assert ask(host=host, served="0.0.0.0")[0] == 200


@pytest.mark.parametrize("host", [b"localhost:7860", b"127.0.0.1", b"[::1]:7860"])
def test_its_own_names_are_let_in(host: bytes) -> None:
    assert ask(host=host)[0] == 200


def test_nothing_is_fetched_for_visitors() -> None:
    assert ask("/gradio_api/proxy=https://a.hf.space/b", served="0.0.0.0")[0] == 404


# Uploads --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return load_models(str(make_tiny_run(tmp_path_factory.mktemp("tiny"))), "cpu")


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "uploads"
    (folder / "hash").mkdir(parents=True)
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


def test_a_photo_is_read_and_deleted(tiny, uploads) -> None:
    file = uploads / "hash" / "photo.png"
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(file)
    image = read_upload({"size": file.stat().st_size, "path": str(file)}, tiny)
    assert image.shape == (1, 32, 32) and int(image.float().mean()) == 90
    assert list(uploads.iterdir()) == []


def test_what_is_no_image_is_deleted_too_and_its_folder_not_told(tiny, uploads) -> None:
    file = uploads / "hash" / "photo.png"
    file.write_text("no")
    with pytest.raises(DataError, match=r"^photo.png cannot be read"):
        read_upload({"size": 2, "path": str(file)}, tiny)
    assert list(uploads.iterdir()) == []


@pytest.mark.parametrize("path", ["{outside}", "{uploads}/hash/../../outside.png", "{uploads}", "a\0b", "", None, 3])
def test_only_uploads_are_read_and_deleted(tiny, uploads, path) -> None:
    outside = uploads.parent / "outside.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(outside)
    path = path.format(outside=outside, uploads=uploads) if isinstance(path, str) else path
    with pytest.raises(DataError, match="no photo arrived"):
        read_upload({"path": path}, tiny)
    assert outside.exists() and (uploads / "hash").exists()


def test_a_link_out_of_the_folder_is_not_followed(tiny, uploads) -> None:
    outside = uploads.parent / "outside.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(outside)
    (uploads / "hash" / "link.png").symlink_to(outside)
    with pytest.raises(DataError, match="no photo arrived"):
        read_upload({"path": str(uploads / "hash" / "link.png")}, tiny)
    assert outside.exists()


def test_a_large_photo_is_refused(tiny, uploads) -> None:
    with pytest.raises(DataError, match=r"has 13.0 MiB: give one of at most 12"):
        read_upload({"size": 13 * 2**20}, tiny)


# Pieces of HTML -------------------------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """The elements of a piece of HTML, which must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def having(self, name: str) -> list[str | None]:
        """The values of an attribute."""
        return [attributes[name] for _, attributes in self.found if name in attributes]


@pytest.fixture(scope="module", params=["plain", "two levels", "classes", "no critic"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("run")
    make = make_class_run if request.param == "classes" else make_tiny_run
    run = add_policy(make(folder, levels=2) if request.param == "two levels" else make(folder))
    if request.param == "no critic":
        (run / "critic.safetensors").unlink()
    return Session(load_models(str(run), "cpu"), seed=3)


def test_drawn_cells_can_be_clicked_and_the_next_one_is_marked(session) -> None:
    session.start()
    session.draw(5)
    elements = Elements(fragments.board(session))
    assert elements.having("data-cell") == ["0", "1", "2", "3", "4"]
    assert elements.having("class").count("next") == 1
    session.put_wrong(2)
    assert Elements(fragments.board(session)).having("class").count("wrong") == 1
    session.start_from_real(1, 2)
    given = Elements(fragments.board(session)).having("class").count("given")
    assert given == 8
    session.draw(None)
    level = session.grid.level_sizes[-1]
    assert len(Elements(fragments.board(session)).having("data-cell")) == level


def test_cells_that_are_not_drawn_are_grey(session) -> None:
    session.start()
    session.draw(6)
    session.codes.setflags(write=False)
    pixels = fragments.decoded(session, session.codes[None])[0]
    whole = session.models.world.decode(
        torch.from_numpy(np.where(session.codes == session.grid.not_drawn, 0, session.codes))[None]
    )
    side = pixels.shape[0] // 4
    assert (pixels[side:, 2 * side :] == 128).all() and (pixels[2 * side :] == 128).all()
    assert (pixels[:side, :, 0] == whole[0, 0, :side].numpy()).all()


def test_choices_carry_their_codes_and_chances(session) -> None:
    session.start()
    for _ in range(session.grid.n_codes):
        elements = Elements(fragments.choices(session))
        assert elements.having("data-code") == [str(one.code) for one in session.choices(fragments.SHOWN)]
        session.draw()
    assert "data-code" not in fragments.choices(session)


def test_scores_and_comparisons_are_shown(session) -> None:
    session.start()
    session.draw(None)
    critic = Elements(fragments.score_map(session))
    rated = session.models.world.scorer is not None
    assert len([one for one in critic.having("style") if one and "strength" in one]) == (16 if rated else 0)
    found = Elements(fragments.endings(session, finish_by_each(session, 6)))
    assert found.having("data-generator") == ["MLE", "RAL"] and len(found.having("src")) == 2 * fragments.ROW
    session.put_wrong(session.grid.n_codes - 6)
    shown = fragments.mistake(session, last_mistake(session))
    assert len(Elements(shown).having("src")) == 3 and "Of the 5 codes drawn after it" in shown


def test_the_mean_of_the_endings_by_hand(session) -> None:
    session.start()
    endings = finish_by_each(session, 6)
    shown = fragments.endings(session, endings)
    for images in endings.values():
        if session.models.world.scorer is None:
            assert "mean score" not in shown
            continue
        scores = np.array([one.score.value for one in images if one.score is not None])
        error = scores.std(ddof=1) / np.sqrt(6)
        assert f"mean score of 6 endings {fragments.signed(scores.mean())} ± {error:.2f}" in shown


def test_nothing_of_a_run_is_taken_for_html(tmp_path) -> None:
    run = make_tiny_run(tmp_path / "<b onclick=x>")
    session = Session(load_models(str(run), "cpu"))
    assert "<b onclick" not in fragments.lines(session) and "&lt;b onclick" in fragments.lines(session)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "under 0.01 %"), (0.00004, "under 0.01 %"), (0.004, "0.40 %"), (0.05, "5.0 %"), (0.5, "50 %")],
)
def test_shares_in_words(share: float, said: str) -> None:
    assert fragments.percent(share) == said
