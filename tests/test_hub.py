"""Runs on a hub, against a stand-in on loopback: what leaves, what comes back, what is refused."""

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ral_gym.agents import load_run
from ral_gym.agents.train_ral import train_ral
from ral_gym.commands.cli import main
from ral_gym.config import Config
from ral_gym.metrics.table import columns_of
from ral_gym.presets import SMOKE
from ral_gym.report.card import model_card
from ral_gym.runs.hub import Address, parse_address
from ral_gym.runs.run import Run, read_config
from ral_gym.runs.shared_files import MOST_FILES, Portable
from ral_gym.runs.storage import load_metadata, load_tensors
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.stages.pictures import sample_codes
from ral_gym.tokenizers.code_set import CodeSet
from tests.hub_stand_in import Hub, point_the_client_at, serving
from tests.tiny import make_tiny_run

pytestmark = pytest.mark.commands

SECRET = "of my family"
MEASURED = Path(__file__).parent / "fixtures" / "before_registry" / "one_level" / "results.json"
STAYS = ("metrics.jsonl", "model.zip", "replay.pkl", "tensorboard/events.out.tfevents.1", "samples/complete_me.png")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tiny models with a checkpoint of stage 3, from photos in a private folder, and files that must stay."""
    folder = tmp_path_factory.mktemp("home") / "run"
    make_tiny_run(folder)
    (folder / "critic.safetensors").unlink()
    ral = replace(SMOKE.ral, n_envs=4, n_updates=2, checkpoint_every=1)
    config = read_config(folder)
    source = f"folder:{folder.parent}/photos {SECRET}"
    data = replace(config.data, source=source, cache_dir=str(folder.parent / "cache"))
    (folder / "config.json").write_text(replace(config, ral=ral, data=data).to_json())
    run = Run(folder, read_config(folder))
    codes = CodeSet.load(run.file("codes.safetensors"))
    train_ral(run, load_vqvae(run), load_generator(run, "prior"), codes, torch.device("cpu"), progress=False)
    shutil.copy(MEASURED, folder / "results.json")
    for name in (*STAYS, "samples/real_mle_ral.png", "samples/classes.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    home = tmp_path / "home"
    home.mkdir()
    with serving() as served:
        point_the_client_at(served.url, monkeypatch, home)
        yield served
        assert served.wrong == []


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_run_goes_to_the_hub_and_comes_back(trained, hub, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pickle, "load", None)
    assert main(["push", str(trained), "me/tiny", "--yes"]) == 0
    said = capsys.readouterr().out
    pushed = hub.files("me/tiny")
    assert hub.repositories["me/tiny"].private and len(hub.repositories["me/tiny"].commits) == 2
    # What leaves is said, and nothing else leaves.
    assert all(re.search(rf"  {re.escape(name)}$", said, re.MULTILINE) for name in pushed)
    assert {"config.json", "vqvae.safetensors", "policy.safetensors", "checkpoints/ral.safetensors"} < pushed.keys()
    assert not pushed.keys() & set(STAYS) and all(name in said for name in STAYS)
    assert {Path(name).suffix for name in pushed} == {".json", ".safetensors", ".png", ".md"}
    for name, data in pushed.items():
        assert str(trained.parent).encode() not in data and b"/photos" not in data, name
    assert b"![samples](samples/real_mle_ral.png)" in pushed["README.md"]
    assert f"folder:photos {SECRET}" in said and json.loads(pushed["config.json"])["data"]["cache_dir"] is None

    folder = tmp_path / "pulled"
    assert main(["pull", "me/tiny", str(folder)]) == 0
    assert f"folder:photos {SECRET}: look at that" in capsys.readouterr().out
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == pushed.keys()
    here = load_run(trained)
    monkeypatch.setattr(pickle, "loads", None)
    for there in (load_run(folder), load_run(f"hf://me/tiny@{hub.repositories['me/tiny'].commits[-1][0]}")):
        states = (one.model.policy.state_dict() for one in (here, there))
        for (name, weight), other in zip(next(states).items(), next(states).values(), strict=True):
            assert torch.equal(weight, other), name
        codes = [sample_codes(one.model.policy.prior, 8, seed=1, temperature=1.0) for one in (here, there)]
        assert torch.equal(*codes)
    assert torch.equal(*(load_tensors(one / "codes.safetensors")[0]["train"] for one in (trained, folder)))


def test_a_loaded_commit_is_kept_and_needs_no_hub(trained, hub, monkeypatch, tmp_path) -> None:
    assert main(["push", str(trained), "me/tiny", "--yes"]) == 0
    load_run("hf://me/tiny")
    (kept,) = (tmp_path / "home/.cache/ral_gym/hub/me--tiny").iterdir()
    asked = len(hub.asked)
    load_run(f"hf://me/tiny@{kept.name}")
    assert len(hub.asked) == asked
    load_run(Path("hf://me/tiny"))
    assert len(hub.asked) == asked + 1


def test_without_images_nothing_shows_one(trained, hub, tmp_path, capsys) -> None:
    assert main(["push", str(trained), "me/tiny", "--yes"]) == 0
    assert "has 13 file(s) already" in error(capsys, "push", str(trained), "me/tiny", "--yes", "--no-images")
    assert main(["push", str(trained), "me/tiny", "--yes", "--no-images", "--update"]) == 0
    names = hub.files("me/tiny").keys()
    gone = {"codes.safetensors", "checkpoints/ral.safetensors", "samples/real_mle_ral.png"}
    assert not gone & names and {"policy_ema.safetensors", "samples/classes.png"} < names
    card = hub.files("me/tiny")["README.md"].decode()
    assert "load_run" not in card and "ral-gym pull me/tiny" in card
    folder = tmp_path / "pulled"
    assert main(["pull", "me/tiny", str(folder)]) == 0
    assert main(["sample", str(folder), "--n", "4"]) == 0
    assert main(["pull", f"me/tiny@{hub.repositories['me/tiny'].commits[1][0]}", str(tmp_path / "first")]) == 0
    assert (tmp_path / "first" / "codes.safetensors").exists()


def test_nothing_is_pushed_unasked(trained, hub, capsys, monkeypatch) -> None:
    assert "nobody can be asked here; --yes" in error(capsys, "push", str(trained), "me/tiny")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["push", str(trained), "me/tiny"]) == 0 and "Nothing was pushed" in capsys.readouterr().out
    hub.add("me/open", {}, private=False)
    assert "me/open is public" in error(capsys, "push", str(trained), "me/open", "--yes")
    assert hub.repositories.keys() == {"me/open"} and hub.files("me/open") == {}
    assert main(["push", str(trained), "me/new", "--yes", "--public"]) == 0
    assert not hub.repositories["me/new"].private
    assert "leave @" in error(capsys, "push", str(trained), "me/tiny@main", "--yes")
    assert "is no run on the hub" in error(capsys, "push", str(trained), "tiny", "--yes")


def test_a_link_is_not_pushed(trained, hub, capsys, tmp_path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "private.json").write_text("{}")
    (folder / "seconds.json").unlink(missing_ok=True)
    (folder / "seconds.json").symlink_to(tmp_path / "private.json")
    assert "seconds.json is a link" in error(capsys, "push", str(folder), "me/tiny", "--yes")
    assert hub.repositories == {}


def test_without_permission_or_a_hub_it_is_one_line(trained, hub, capsys, monkeypatch, tmp_path) -> None:
    from huggingface_hub import constants

    folder = str(tmp_path / "pulled")
    hub.add("me/secret", {"config.json": b"{}"}, private=True)
    push, pull = ["push", str(trained), "me/tiny", "--yes"], ["pull", "me/secret", folder]
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert re.search(
        r"cannot push to me/tiny: http://127.* does not permit it \(403\); hf auth login", error(capsys, *push)
    )
    assert "has no such repository, or it is private" in error(capsys, *pull)
    monkeypatch.delenv("HF_TOKEN")
    assert "does not permit it (401)" in error(capsys, *push)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    assert "no such revision" in error(capsys, "pull", "me/secret@v9", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub import close_session

    close_session()
    assert "HF_HUB_OFFLINE is set" in error(capsys, *pull)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached; check the network" in error(capsys, *pull)
    assert "cannot be reached" in error(capsys, *push)
    assert not Path(folder).exists() and hub.repositories.keys() == {"me/secret"}


def test_without_the_client_its_extra_is_named_first(trained, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for argv in (["push", "nothing", "me/tiny"], ["pull", "me/tiny", str(tmp_path / "x")]):
        assert error(capsys, *argv).endswith('not installed: pip install "ral-gym[hub]"')
    with pytest.raises(Exception, match=r"ral-gym\[hub\]"):
        load_run("hf://me/tiny")
    assert list(tmp_path.iterdir()) == []


# Strangers' repositories --------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it would end the test."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (pytest.exit, ("something was unpickled",))


NAMES = {
    "a pickle": "policy.pkl",
    "torch's": "policy.pt",
    "a zip of SB3's": "model.zip",
    "code": "plugin.py",
    "out of the folder": "../x.json",
    "out of it again": "samples/../../x.json",
    "from the root": "/tmp/x.json",
    "another system's": "samples\\..\\x.json",
    "a drive": "C:x.json",
    "a hidden one": ".ssh.json",
    "a hidden folder": ".git/config.json",
    "a home": "~/x.json",
    "no suffix": "link",
    "a line end": "x.json\n",
    "deeper": "samples/a/b.png",
    "an escape": "\x1b[2J.json",
    "only the case": "CONFIG.json",
    "a log": "metrics.jsonl",
}
SIZES: dict[str, tuple[str, int | None]] = {
    "huge weights": ("prior.safetensors", 2**50),
    "huge JSON": ("results.json", 2**26),
    "a huge picture": ("samples/x.png", 2**26),
    "no size": ("prior.safetensors", None),
    "less than nothing": ("prior.safetensors", -1),
}


def plain_run() -> dict[str, bytes]:
    return {"config.json": SMOKE.to_json().encode()}


def test_a_foreign_listing_is_refused_before_anything_is_fetched(hub, tmp_path, capsys) -> None:
    held = hub.add("stranger/run", plain_run())
    for case, (name, size) in ({case: (name, 4) for case, name in NAMES.items()} | SIZES).items():
        held.listed = {name: size}
        line = error(capsys, "pull", "stranger/run", str(tmp_path / "pulled"))
        assert "stranger/run" in line and "nothing was fetched" in line and "\x1b" not in line, case
    assert not any("resolve" in asked for asked in hub.asked)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_too_many_or_too_much_is_refused(hub, tmp_path, capsys) -> None:
    held = hub.add("stranger/run", plain_run())
    held.listed = {f"samples/{number}.png": 1 for number in range(MOST_FILES)}
    assert f"holds {MOST_FILES + 1} files" in error(capsys, "pull", "stranger/run", str(tmp_path / "pulled"))
    held.listed = {"prior.safetensors": 600_000, "policy.safetensors": 600_000}
    limit = ["--max-gib", "0.001"]
    assert "raise --max-gib" in error(capsys, "pull", "stranger/run", str(tmp_path / "pulled"), *limit)
    hub.add("stranger/other", {"prior.safetensors": b"x"})
    assert "no config.json" in error(capsys, "pull", "stranger/other", str(tmp_path / "pulled"))


def config_with(**data: object) -> bytes:
    return replace(SMOKE, data=replace(SMOKE.data, **data)).to_json().encode()  # type: ignore[arg-type]


CONTENTS = {
    "a pickle in weights": ("not a safetensors file", {"prior.safetensors": pickle.dumps(Evil())}),
    "other weights": ("not written by ral_gym", {"prior.safetensors": (8).to_bytes(8, "little") + b"{}      "}),
    "a link as git has it": ("not a safetensors file", {"prior.safetensors": b"../../.ssh/id_rsa"}),
    "no picture": ("samples/a.png is not a PNG file; nothing was kept", {"samples/a.png": b"GIF89a"}),
    "no JSON": ("results.json cannot be read", {"results.json": b"{"}),
    "no results": ("results.json is not a results file", {"results.json": b"{}"}),
    "deep JSON": ("more than 100 levels", {"rewards.json": b"[" * 5000 + b"]" * 5000}),
    "other settings": ("does not fit this version", {"config.json": b'{"preset": "x"}'}),
    "a size out of range": ("image_size", {"config.json": config_with(image_size=10**9)}),
    "a cache elsewhere": ("cache folder /etc/cron.d", {"config.json": config_with(cache_dir="/etc/cron.d")}),
}


def test_foreign_content_is_refused_and_not_kept(hub, tmp_path, capsys) -> None:
    for case, (said, files) in CONTENTS.items():
        hub.add("stranger/run", plain_run() | files)
        line = error(capsys, "pull", "stranger/run", str(tmp_path / "pulled"))
        assert said in line and str(tmp_path) not in line, (case, line)
        assert [path.name for path in tmp_path.iterdir()] == ["home"], case


def test_another_size_than_listed_is_refused(hub, tmp_path, capsys) -> None:
    hub.add("stranger/run", plain_run() | {"seconds.json": b"{}"}).listed["seconds.json"] = 9
    assert "seconds.json has 2 bytes, and 9" in error(capsys, "pull", "stranger/run", str(tmp_path / "pulled"))
    hub.add("stranger/run", plain_run() | {"seconds.json": b"{}       "}).listed["seconds.json"] = 2
    assert "has 9 bytes: at most 2" in error(capsys, "pull", "stranger/run", str(tmp_path / "pulled"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_is_there_stays(hub, tmp_path, capsys) -> None:
    hub.add("stranger/run", plain_run() | {"README.md": b"# mine"})
    folder = tmp_path / "pulled"
    folder.mkdir()
    assert f"{folder} exists: nothing was fetched" in error(capsys, "pull", "stranger/run", str(folder))
    assert list(folder.iterdir()) == [] and hub.asked == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists" in error(capsys, "pull", "stranger/run", str(tmp_path / "link"))
    assert main(["pull", "stranger/run", str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "README.md"}


# The card, addresses, paths -----------------------------------------------------------------------------------------


def test_the_card_has_the_file_s_figures_and_no_others() -> None:
    results = json.loads(MEASURED.read_text())
    card = model_card("me/tiny", SMOKE, results, "400 photos of [x](y)", continues=True)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "ral-gym" and "reinforce" in front["tags"]
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None and 'load_run("hf://me/tiny")' in code[1] and len(code[1].split("\n")) <= 5
    for fact in (f"* Features: {results['extractor']}", f"* n: {results['n_samples']} samples", "Preset: smoke", "ORL"):
        assert fact in card
    assert f"seed {results['seed']}" in card and r"\[x\](y)" in card
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", card, re.MULTILINE))
    assert rows.keys() == results["rows"].keys()
    for name, cells in rows.items():
        for key, cell in zip(columns_of(results), cells.split("|"), strict=True):
            value, (low, high) = results["rows"][name].get(key), results["rows"][name]["intervals"].get(key, (0, 0))
            known = [value, max(value - low, high - value)] if "±" in cell else [value]
            for shown, number in zip(cell.split("±"), known, strict=True):
                near = number is None if shown.strip() == "-" else float(shown) == pytest.approx(number, 0.006, 0.006)
                assert near, (name, key, cell)
    empty = model_card(
        "me/tiny", replace(SMOKE, data=replace(SMOKE.data, source="folder:x")), None, "", continues=False
    )
    assert "Not measured" in empty and "terms are not recorded" in empty and "load_run" not in empty


def test_addresses() -> None:
    assert parse_address("hf://a/b") == parse_address("a/b") == Address("a/b")
    assert parse_address("hf:/a/b@v1.0/x") == Address("a/b", "v1.0/x")
    for bad in (
        "a",
        "a/b/c",
        "../b",
        "a/..",
        "hf://a/b@",
        "a/b@../c",
        "http://a/b",
        "a/b c",
        "-a/b",
        ".a/b",
        "a/b-",
        "a/b.git",
    ):
        with pytest.raises(Exception, match="is no run on the hub"):
            parse_address(bad)


def config_of(source: str) -> Config:
    return replace(SMOKE, data=replace(SMOKE.data, source=source, test=None))


@pytest.mark.parametrize(
    ("source", "text", "left"),
    [
        ("folder:../me/my pics", "folder:../me/my pics", "folder:my pics"),
        ("folder:C:\\Users\\me\\pics", "12 images of C:\\Users\\me\\pics, cut", "12 images of pics, cut"),
        ("hf:user/name", "hf:user/name", "hf:user/name"),
        ("hf:/data/set", "hf:/data/set", "hf:set"),
        ("faces", "see https://example.org/a/b", "see https://example.org/a/b"),
        ("faces", "from /home/me/x.npz and ~/y", "from x.npz and y"),
        ("faces", "\\\\server\\share\\me", "me"),
        ("faces", "nats / code and/or a/b", "nats / code and/or a/b"),
        ("lsun:/data/me/bed", "lsun:/data/me/bed", "lsun:bed"),
    ],
)
def test_paths_of_this_computer_are_cut_to_their_last_name(source, text, left) -> None:
    portable = Portable(config_of(source))
    assert portable.values({"a": [text], "b": 1}) == {"a": [left], "b": 1}
    assert portable.changes == ({} if text == left else {text: left})


def test_a_file_with_no_path_is_pushed_as_it_is(trained, tmp_path) -> None:
    portable = Portable(read_config(trained))
    policy, checkpoint = trained / "policy.safetensors", trained / "checkpoints/ral.safetensors"
    assert portable.write(policy, tmp_path / "a") == policy and not (tmp_path / "a").exists()
    copy = portable.write(checkpoint, tmp_path / "b.safetensors")
    assert copy != checkpoint and load_metadata(copy)["config"]["data"]["source"] == f"folder:photos {SECRET}"
    (before, _), (after, _) = load_tensors(checkpoint), load_tensors(copy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
