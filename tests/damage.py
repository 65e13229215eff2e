"""Damaged and hostile run folders from a seed: every file, every kind of damage; for the fast tests and `faults`."""

import copy
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HOSTILE: list[Any] = [
    *(None, True, -1, 0, 3.5, 10**9, 10**30, 10**39, float("nan"), float("inf"), -1e308),
    *("", "abc", "16", "\0", "x" * 5000, "../../x", "\x1b[31m\n", "\udc80", "<script>alert(1)</script>"),
    *([], ["ppo"], [None], [[[]]], {}, {"a": "b"}, {"critic": "x"}, {"__class__": "os.system"}),
]
"""Values that take the place of any other one."""


class Executed:
    """Unpickling this makes a file, whose name the test looks for."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.flag}'",)


@dataclass(frozen=True)
class Damage:
    """One file of a run folder, and what happens to it."""

    file: str
    kind: str
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}"


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def mutated(tree: Any, rng: random.Random) -> Any:
    """The tree with a value replaced, left out or added somewhere."""
    changed = copy.deepcopy(tree)
    found = list(places(changed))
    if not found:
        return rng.choice(HOSTILE)
    path = rng.choice(found)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    action = rng.random()
    if action < 0.7:
        parent[path[-1]] = rng.choice(HOSTILE)
    elif action < 0.85:
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[rng.choice(["extra", "\x1b[2J", "", "x" * 300])] = rng.choice(HOSTILE)
    else:
        parent.append(rng.choice(HOSTILE))
    return changed


def edit_tensors(path: Path, tensors: Callable[[dict[str, torch.Tensor]], Any], facts: Callable[[Any], Any]) -> None:
    """Write a safetensors file again with other tensors and other metadata."""
    with safe_open(path, "pt") as file:
        header, there = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["ral_gym"] = json.dumps(facts(json.loads(header["ral_gym"])))
    save_file({name: tensor.contiguous() for name, tensor in tensors(there).items()}, path, header)


def same(value: Any) -> Any:
    return value


def _bytes_damage(rng: random.Random, flag: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What can happen to any file."""
    share, flips = rng.random(), rng.randrange(1, 40)
    seed = rng.randrange(2**30)

    def flip(path: Path) -> None:
        own, data = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(flips):
            data[own.randrange(len(data))] = own.randrange(256)
        path.write_bytes(bytes(data))

    def replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def act(path: Path) -> None:
            path.unlink()
            make(path)

        return act

    yield f"{flips} bytes changed", flip
    yield "truncated", lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])  # type: ignore[func-returns-value]
    yield "empty", lambda path: path.write_bytes(b"")
    yield "random bytes", lambda path: path.write_bytes(random.Random(seed).randbytes(3000))
    yield "a pickle", lambda path: path.write_bytes(pickle.dumps(Executed(flag)))
    yield "a torch file", lambda path: torch.save({"a": Executed(flag)}, path)
    yield "a folder", replace(Path.mkdir)
    yield "a pipe", replace(os.mkfifo)
    yield "a link to an endless device", replace(lambda path: path.symlink_to("/dev/zero"))
    yield "a link to nothing", replace(lambda path: path.symlink_to("nowhere"))
    yield "huge", replace(lambda path: _sparse(path, 2**41))


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _json_damage(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    seed = rng.randrange(2**30)
    texts = [
        "null",
        "[]",
        '"x"',
        "{",
        "[" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "\ufeff{}",
        "1" * 5000,
        "{} {}",
    ]
    text = rng.choice(texts)

    def mutate(path: Path) -> None:
        own, tree = random.Random(seed), json.loads(path.read_text())
        for _ in range(own.randrange(1, 4)):
            tree = mutated(tree, own) if isinstance(tree, dict | list) else tree
        path.write_text(json.dumps(tree))

    def duplicate(path: Path) -> None:
        path.write_text(path.read_text().replace("{", '{"seed": 1, "seed": 2, ', 1))

    yield "a value replaced", mutate
    yield "another value replaced", lambda path: (mutate(path), mutate(path))[0]  # type: ignore[func-returns-value]
    yield f"text {text[:12]!r}", lambda path: path.write_text(text)
    yield "a name twice", duplicate


def _lines_damage(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    lines = [json.dumps({"stage": rng.choice(["ral", "vqvae", 3, None, ["a"]]), "step": value}) for value in HOSTILE]
    yield "lines that are none", lambda path: path.write_text("\n".join([*lines, "null", "[1]", '{"stage":"ral"', ""]))


def _tensor_damage(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    seed, number = rng.randrange(2**30), rng.choice([float("nan"), float("inf"), -float("inf")])

    def one(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def change_one(there: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            name = random.Random(seed).choice([name for name, tensor in there.items() if tensor.numel()])
            return {**there, name: change(there[name])}

        return lambda path: edit_tensors(path, change_one, same)

    def poke(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[seed % changed.numel()] = number if changed.is_floating_point() else 32_000
        return changed

    def facts(path: Path) -> None:
        edit_tensors(path, same, lambda there: mutated(there, random.Random(seed)))

    def enlarge(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: enlarge(inner) for name, inner in value.items()}
        return 10**6 if isinstance(value, int) and not isinstance(value, bool) else value

    def header(length: int, text: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(struct.pack("<Q", length) + text)

    terabyte = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    yield "a number that is none", one(poke)
    yield "another shape", one(lambda tensor: torch.cat([tensor.reshape(-1), tensor.reshape(-1)]))
    yield "no dimensions", one(lambda tensor: tensor.reshape(-1)[0].clone())
    yield "another type", one(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.long())
    yield "a tensor missing", lambda path: edit_tensors(path, lambda t: dict(list(t.items())[1:]), same)
    yield "a tensor more", lambda path: edit_tensors(path, lambda t: {**t, "zzz": torch.zeros(3)}, same)
    yield "no rows", lambda path: edit_tensors(path, lambda t: {n: v[:0] if v.ndim else v for n, v in t.items()}, same)
    yield "metadata changed", facts
    yield "metadata empty", lambda path: edit_tensors(path, same, lambda there: {})
    yield "metadata a list", lambda path: edit_tensors(path, same, lambda there: [1, 2])
    yield "metadata of a giant", lambda path: edit_tensors(path, same, enlarge)
    yield "a header without end", header(2**62, b"{}")  # type: ignore[misc]
    yield "a terabyte declared", header(len(terabyte), terabyte)  # type: ignore[misc]


JSON = ("config.json", "results.json", "seconds.json", "checkpoints/evaluation.json")
WEIGHTS = (
    "vqvae",
    "codes",
    "prior",
    "prior_ema",
    "prior_continued",
    "policy",
    "policy_ema",
    "critic",
    "checkpoints/ral",
)


def damages(seed: int, flag: Path, rounds: int = 1) -> list[Damage]:
    """Every kind of damage to every file of a finished run of one level, `rounds` times with other details."""
    rng, found = random.Random(seed), []
    for _ in range(rounds):
        for file in (*JSON, "metrics.jsonl", *(f"{name}.safetensors" for name in WEIGHTS)):
            kinds = [*_bytes_damage(rng, flag)]
            if file in JSON:
                kinds += _json_damage(rng)
            elif file == "metrics.jsonl":
                kinds += _lines_damage(rng)
            else:
                kinds += _tensor_damage(rng)
            found += [Damage(file, kind, apply) for kind, apply in kinds]
    return found
