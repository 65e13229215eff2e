"""A CUDA device that is not there: tensors stay in host memory, but are only let do what CUDA tensors may.

    with pretend_cuda() as device:                      # torch.cuda.is_available() is True in here
        sampler = CachedSampler(prior.to("cuda"))       # `.device`, `.is_cuda` say cuda:0
        sampler.sample(16)
    print(device.counts)                                # kernels, nodes, captures, replays, syncs, h2d, d2h

What is raised as a real device would: tensors of both devices in one call, a generator of the other device, `numpy()`
of a CUDA tensor. Whatever waits for the device is counted as `syncs`, and a copy to the device that is not
`non_blocking`, for which PyTorch waits too, as `blocking`. `torch.cuda.graph` records operations on the
tensors they were called with, leaves memory as it was, and refuses what cannot be captured: anything that waits, copies
between the devices, boolean masks, other generators. `replay` does the recorded operations again, on the same memory
and with the same numbers: a result that follows a Python variable, or a tensor put in another's place, shows.

Not pretended: several devices and streams, memory, rounding (but TF32's, on demand) and the order of sums, bf16
autocast (the CPU's stands in), kernels that CUDA lacks, and what C++ does unseen between two Python calls. A device is
a mark on a storage, so views, `.data` and `nn.Module.to` carry it along; results of marked tensors are marked below
autograd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIXED = "Expected all tensors to be on the same device, but found cuda:0 and cpu"
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "_linalg_eigh", "linalg_eigh", "_linalg_svd", "linalg_cholesky_ex", "repeat_interleave", "is_nonzero",
}  # fmt: skip
"""Operators whose result the host has to see; `repeat_interleave` only by a tensor of counts."""
FREE = {"detach", "alias", "_unsafe_view", "lift_fresh", "set", "empty", "empty_strided", "empty_like", "new_empty"}
"""Operators that start no kernel, apart from views."""
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"}
SHARED = {
    "copy_", "__getitem__", "__setitem__", "index_put_", "__get__", "__set__", "__repr__", "__format__",
    "_has_compatible_shallow_copy_type", "is_same_size", "is_set_to",
}  # fmt: skip
"""Calls that may see tensors of both devices, or look at them only."""


def on_device(x: Any) -> bool:
    """Whether a tensor's memory is the pretended device's."""
    return isinstance(x, Tensor) and x.layout == torch.strided and getattr(x.untyped_storage(), "pretend", False)


def mark(x: Any, there: bool = True) -> Any:
    """Say where a tensor's memory is."""
    if isinstance(x, Tensor) and x.layout == torch.strided:
        x.untyped_storage().pretend = there
    return x


def tensors(*values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def _with_tf32(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution that rounds what it multiplies to TF32's 10 bits, as cuDNN does where it is let."""

    def rounded(x: Tensor) -> Tensor:
        bits = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
        return torch.empty_like(x).copy_(bits.view(torch.float32))  # strides as they were

    return lambda x, weight, *others: convolution(rounded(x), rounded(weight), *others)


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    device: Device

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> all of it, and what was in it
        self.own: dict[int, Any] = {}  # storages made while recording

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def reset(self) -> None:
        self.calls = []

    def keep(self, x: Tensor) -> None:
        """Remember what is in a tensor's memory before it is first written to."""
        storage = x.untyped_storage()
        if storage._cdata not in self.own and storage._cdata not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.before[storage._cdata] = (whole, whole.clone())

    def replay(self) -> None:
        counts = self.device.counts
        counts["replays"] += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for func, args, kwargs, out in self.calls:
                counts["nodes"] += 1
                again = func(*args, **kwargs)
                for old, new in zip(tensors(out), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Kernels(TorchDispatchMode):
    """Below autograd: marks results, counts, records."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        inputs = tensors(args, kwargs)
        there = device.making or any(map(on_device, inputs))
        if not there:
            return func(*args, **kwargs)
        name, graph = func._schema.name.split("::")[1].removesuffix("_"), device.recording
        masks = name in ("index", "index_put") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1]))
        waits = (name in WAITS and (name != "repeat_interleave" or len(inputs) > 1)) or masks
        crosses = name in ("copy", "_to_copy") and len({on_device(x) for x in inputs}) > 1
        if waits and not device.unlooked:
            device.wait(name)
        if graph is not None and crosses:
            device.refuse("a copy between the devices")
        if graph is not None:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for x in tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
                        graph.keep(x)
        call = func
        if name == "convolution" and device.tf32 and torch.backends.cudnn.allow_tf32 and args[0].dtype == torch.float32:
            call = _with_tf32(func)
        out = call(*args, **kwargs)
        known = {x.untyped_storage()._cdata for x in inputs if x.layout == torch.strided}
        for x in tensors(out):
            if x.layout == torch.strided and x.untyped_storage()._cdata not in known:
                mark(x)
                if graph is not None:
                    graph.own[x.untyped_storage()._cdata] = x.untyped_storage()
        if not func.is_view and name not in FREE:
            if graph is not None:
                graph.calls.append((call, args, kwargs, out))
            else:
                device.counts["kernels"] += 1
                device.operators[func._schema.name] += 1
        return out


class Python(TorchFunctionMode):
    """Above autograd: what a call may do with tensors of which device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, device = dict(kwargs or {}), self.device
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._get(func, args)
        found = tensors(args, kwargs)
        if name == "pin_memory":
            return args[0].clone()
        if name in ("to", "cpu", "cuda") and found:
            return self._move(name, *args, **kwargs)
        here, there = ([x for x in found if on_device(x) == side] for side in (False, True))
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if there and name in READS:
            if name == "tolist":  # C++ reads all of it at once
                device.cross(to_device=False)
            return func(*args, **kwargs)  # others are counted below, by their operator
        if there and [x for x in here if x.dim()] and name not in SHARED:
            raise RuntimeError(f"{name}: {MIXED}")
        if name in ("__getitem__", "__setitem__") and found:
            self._index(name, args)
        if name == "copy_" and len(found) == 2 and on_device(found[0]) != on_device(found[1]):
            device.cross(to_device=on_device(found[0]), blocking=not (kwargs.get("non_blocking") or True in args[2:]))
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if target is None or target.type not in ("cuda", "cpu"):
            target = CUDA if there and target is None else target
        else:
            kwargs["device"] = CPU
        if kwargs.get("generator") is not None and kwargs["generator"].device.type != (target or CPU).type:
            raise RuntimeError(f"{name}: Expected a '{(target or CPU).type}' device type for generator")
        making = target is not None and target.type == "cuda"
        if making and name in ("tensor", "as_tensor", "asarray") and not there:
            device.cross(to_device=True)
        if making and kwargs.get("generator") is not None and device.recording is not None:
            device.refuse("a generator of one's own")
        # The CPU looks whether classes are in range; on CUDA kernels do, and only their number has to be looked for.
        device.unlooked = name == "one_hot" and making
        if device.unlooked and (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) == -1:
            device.wait(name)
        before, device.making = device.making, making or device.making
        try:
            out = func(*args, **kwargs)
        finally:
            device.making, device.unlooked = before, False
        if making and not there:
            if name in ("as_tensor", "asarray"):  # may be a view of the host's memory
                out = out.clone()
            pytree.tree_map_only(Tensor, mark, out)
        return out

    def _get(self, func: Any, args: tuple) -> Any:
        name = getattr(func.__self__, "__name__", "")
        if name in ("device", "is_cuda") and on_device(args[0]):
            return CUDA if name == "device" else True
        out = func(*args)
        if name == "grad" and out is not None and on_device(args[0]):
            mark(out)
        return out

    def _move(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = tensors(args, kwargs)
        copies = bool(kwargs.pop("copy", False))
        if name == "to":
            target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            target = target if not other else CUDA if on_device(other[0]) else CPU
        else:
            target, dtype, non_blocking = (CPU if name == "cpu" else CUDA), None, bool(kwargs.get("non_blocking"))
        there = on_device(x)
        goes = there if target is None else target.type == "cuda"
        if target is not None and target.type not in ("cpu", "cuda"):
            return x.to(*args, **kwargs)
        if goes != there:
            self.device.cross(to_device=goes, blocking=not non_blocking)
            self.device.sent[x.dtype] += x.numel() if goes else 0
        out = x if dtype is None else x.to(dtype)
        if goes != there or kwargs.get("memory_format") is not None or copies:
            if out is x:
                out = x.clone()
            mark(out, goes)
        return out

    def _index(self, name: str, args: tuple) -> None:
        indices = tensors(args[1])
        if not on_device(args[0]) and any(map(on_device, indices)):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if on_device(args[0]):
            for x in indices:
                if not on_device(x) and x.dim():
                    self.device.cross(to_device=True)
        values = tensors(args[2]) if name == "__setitem__" else []
        if values and on_device(values[0]) != on_device(args[0]) and values[0].dim():
            if indices:
                raise RuntimeError(f"index_put_: {MIXED}")
            self.device.cross(to_device=on_device(args[0]))


class Generator(torch.Generator):
    """A generator that says it is on the device; its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self.place.type == "cuda" else self.place


class Device:
    """The pretended device.

    Attributes:
        counts: `kernels` started one by one, `nodes` and `replays` of graphs, `captures`, `syncs`, the copies `h2d` and
            `d2h`, and `blocking`, those of `h2d` for which the host waits.
        operators: the kernels by operator.
        sent: how many numbers of a type `Tensor.to` and `Tensor.cuda` have copied to the device.
    """

    def __init__(self, tf32: bool = False) -> None:
        self.tf32 = tf32
        self.counts: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.sent: Counter[torch.dtype] = Counter()
        self.recording: Graph | None = None
        self.making = False
        self.unlooked = False  # the operators of this call are the CPU's only
        self.current = 0  # how many `torch.cuda.device` are entered

    def refuse(self, what: str) -> None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def wait(self, what: str) -> None:
        if self.recording is not None:
            self.refuse(what)
        self.counts["syncs"] += 1

    def cross(self, to_device: bool, blocking: bool = True) -> None:
        """A copy between the devices; the host waits, except for a copy to the device that is not `blocking`."""
        if self.recording is not None:
            self.refuse("a copy between the devices")
        if not to_device:
            self.wait("a copy to the host")
        self.counts["h2d" if to_device else "d2h"] += 1
        self.counts["blocking"] += to_device and blocking

    @contextmanager
    def entered(self, device: Any) -> Iterator[None]:
        """Stands in for `torch.cuda.device`."""
        self.current += 1
        try:
            yield
        finally:
            self.current -= 1

    @contextmanager
    def graph(self, graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Stands in for `torch.cuda.graph`, which records on the current device, whatever that is."""
        if not self.current:
            raise RuntimeError("a graph is recorded on whatever device is current: enter torch.cuda.device(...)")
        self.counts["captures"] += 1
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                for whole, content in graph.before.values():
                    whole.copy_(content)
            graph.before = {}


@contextmanager
def pretend_cuda(tf32: bool = False) -> Iterator[Device]:
    """Let there be one CUDA device, whatever the machine has.

    Args:
        tf32: round in convolutions as cuDNN does while `torch.backends.cudnn.allow_tf32` is set, forward only.
    """
    device = Device(tf32)
    graph_type = type("CUDAGraph", (Graph,), {"device": device})
    autocast = torch.autocast
    patches: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": device.entered,
        "get_device_name": lambda device=None: "pretended",
        "synchronize": lambda of=None: device.wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed": lambda seed: None,  # the CPU's generator stands in, and is seeded already
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: None,
        "CUDAGraph": graph_type,
        "graph": device.graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: device.recording is not None,
    }
    load = torch.load

    def load_there(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        loaded = load(*args, map_location="cpu", **kwargs)
        there = map_location is not None and torch.device(map_location).type == "cuda"
        return pytree.tree_map_only(Tensor, mark, loaded) if there else loaded

    group = torch._C._group_tensors_by_device_and_dtype

    def group_there(lists: Any, *others: Any) -> Any:  # it asks in C++ where tensors are
        return {
            (CUDA if any(map(on_device, tensors(value))) else place, dtype): value
            for (place, dtype), value in group(lists, *others).items()
        }

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    with (
        mock.patch.multiple(torch.cuda, create=True, **patches),
        mock.patch.multiple(torch, autocast=Autocast, load=load_there, Generator=Generator),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group_there),
        Kernels(device),
        Python(device),
    ):
        yield device
