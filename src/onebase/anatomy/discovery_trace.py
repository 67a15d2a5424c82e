"""A recorded pass: every operation on tensors with its inputs, and what went in and out of every module."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onebase.anatomy.discovery_probe import Probe, first
from onebase.errors import UnsupportedError

# A value in the pass: a tensor, and how often its storage had been written when it was seen.
Key = tuple[int, int]

# Operations that hand their first input on, perhaps in another shape or dtype.
PASSING = {"view", "_unsafe_view", "alias", "detach", "clone", "_to_copy", "squeeze", "unsqueeze", "expand", "slice"}


@dataclass(frozen=True)
class Op:
    """One operation: its name, tensor inputs, and other positional arguments."""

    name: str
    inputs: tuple[Key, ...]
    rest: tuple[Any, ...] = ()


@dataclass
class Call:
    """One call of a module. `args` and `kwargs` hold the keys of tensors; times count operations and calls."""

    path: str
    module: nn.Module
    start: int
    args: tuple[Key | None, ...]
    kwargs: dict[str, Key]
    end: int = -1
    output: Key | None = None
    shape: tuple[int, ...] = ()
    shapes: dict[Key, tuple[int, ...]] = field(default_factory=dict)

    @property
    def inputs(self) -> list[tuple[int, Key]]:
        """(index, key) of the inputs that a hook can catch by index."""
        found = [(i, key) for i, key in enumerate(self.args) if key is not None]
        for index, word in ((0, "hidden_states"), (1, "input_tensor")):
            if word in self.kwargs and index >= len(self.args):
                found.append((index, self.kwargs[word]))
        return found


class Trace(TorchDispatchMode):
    """Records one pass of a probe."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[Key, Op] = {}
        self.calls: list[Call] = []
        self.by_path: dict[str, list[Call]] = defaultdict(list)
        self.tensors: dict[Key, Tensor] = {}
        self._writes: Counter[int] = Counter()
        self._keep: list[Tensor] = []  # an id names one tensor only while the tensor lives
        self._known: set[int] = set()
        self._time = 0

    def key(self, tensor: Tensor) -> Key:
        """Return the key of a tensor as it is now."""
        if id(tensor) not in self._known:
            self._known.add(id(tensor))
            self._keep.append(tensor)
        key = (id(tensor), self._writes[_storage(tensor)])
        self.tensors.setdefault(key, tensor)
        return key

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        inputs = tuple(self.key(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor))
        out = func(*args, **(kwargs or {}))
        self._time += 1
        written = [
            a for s, a in zip(func._schema.arguments, args) if s.alias_info is not None and s.alias_info.is_write
        ]
        for tensor in written:
            if isinstance(tensor, Tensor):
                self._writes[_storage(tensor)] += 1
        name = func._schema.name.split("::")[-1]
        rest = tuple(a for a in args if not isinstance(a, Tensor))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = self.key(tensor)
                if key not in inputs and key not in self.ops:
                    self.ops[key] = Op(name.removesuffix("_") if written else name, inputs, rest)
        return out

    def record(self, probe: Probe) -> Trace:
        """Run a plain pass under the recorder."""
        handles = []
        open_calls: list[Call] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._time += 1
            keys = tuple(self.key(a) if isinstance(a, Tensor) else None for a in args)
            words = {k: self.key(v) for k, v in kwargs.items() if isinstance(v, Tensor)}
            call = Call(probe.paths[module], module, self._time, keys, words)
            call.shapes = {self.key(t): tuple(t.shape) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
            open_calls.append(call)
            self.calls.append(call)
            self.by_path[call.path].append(call)

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            call = open_calls.pop()
            self._time += 1  # so that of two modules with one output, the one that ended last is known
            call.end = self._time
            value = first(output)
            if not isinstance(value, Tensor) and hasattr(value, "last_hidden_state"):
                value = value.last_hidden_state
            if isinstance(value, Tensor):
                call.output, call.shape = self.key(value), tuple(value.shape)

        for module in probe.model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            with torch.no_grad(), self:
                probe.call()
        finally:
            for handle in handles:
                handle.remove()
        return self

    # -- questions -----------------------------------------------------------------------------------------------

    def below(self, path: str) -> Iterator[Call]:
        """Yield the calls of a module and of everything inside it, in the order they began."""
        for call in self.calls:
            if call.path == path or call.path.startswith(f"{path}.") or not path:
                yield call

    def only(self, path: str) -> Call:
        """Return the single call of a module.

        Raises:
            UnsupportedError: it ran never or several times in one pass.
        """
        calls = self.by_path[path]
        if len(calls) != 1:
            raise UnsupportedError(f"{path} runs {len(calls)} times in one pass: expected once")
        return calls[0]

    def origin(self, key: Key, more: Iterable[str] = ()) -> Key:
        """Return the value that `key` hands on, back through views and copies, and the operations in `more`."""
        passing = PASSING | set(more)
        while (op := self.ops.get(key)) is not None and op.name in passing and len(op.inputs) == 1:
            key = op.inputs[0]
        return key

    def chain(self, key: Key) -> list[Key]:
        """Return `key` and the values it hands on, back through views and copies."""
        found = [key]
        while (op := self.ops.get(found[-1])) is not None and op.name in PASSING and len(op.inputs) == 1:
            found.append(op.inputs[0])
        return found

    def ancestors(self, key: Key, stop: Iterable[Key] = ()) -> set[Key]:
        """Return every value that `key` is computed from, going no further than the values in `stop`."""
        ends, found, todo = set(stop), {key}, [key]
        while todo:
            op = self.ops.get(todo.pop())
            for parent in op.inputs if op is not None else ():
                if parent not in found:
                    found.add(parent)
                    if parent not in ends:
                        todo.append(parent)
        return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def factor(trace: Trace, op: Op) -> tuple[Key, float] | None:
    """Return (value, number) where an operation multiplies a value by one number, else None."""
    if op.name not in ("mul", "div"):
        return None
    number: Any = None
    value = op.inputs[0]
    if len(op.inputs) == 2:
        sizes = [trace.tensors[key].numel() for key in op.inputs]
        if sizes[1] != 1 and sizes[0] == 1 and op.name == "mul":
            value, other = op.inputs[1], op.inputs[0]
        elif sizes[1] == 1:
            other = op.inputs[1]
        else:
            return None
        number = float(trace.tensors[other])
    else:
        number = next((r for r in op.rest if isinstance(r, int | float)), None)
    if not number:
        return None
    return value, float(number) if op.name == "mul" else 1.0 / float(number)


def tensors_of(call: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among the inputs of a call."""
    return [value for value in call.values() if isinstance(value, Tensor)]
