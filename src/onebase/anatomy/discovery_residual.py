"""The residual stream through one layer: what is added to it, in which order, and where it can be caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from onebase.anatomy.discovery_trace import PASSING, Call, Key, Trace, factor
from onebase.core.site import NormInfo, Ref, standardize
from onebase.errors import UnsupportedError


@dataclass(frozen=True)
class Norm:
    """A norm that the stream itself passes through (post-norm models)."""

    path: str


@dataclass(frozen=True)
class Scale:
    """A number that the whole stream is multiplied by."""

    number: float


@dataclass
class Branch:
    """One thing that is added to the stream.

    Attributes:
        key: the value that is added.
        exit: module whose output it is; '' where there is none.
        factor: number that the output is multiplied by before it is added.
        norm, post: norms before and after the branch.
        refused: why the exit is no site; '' if it is one.
    """

    key: Key
    residual_key: Key
    exit: str = ""
    factor: float = 1.0
    norm: str = ""
    post: str = ""
    refused: str = ""
    role: str = ""


@dataclass
class Sum:
    """The stream becomes ``residual + sum of branches``, then passes through norms and scales."""

    key: Key
    residual: Ref | None
    branches: list[Branch]
    after: list[Norm | Scale] = field(default_factory=list)


@dataclass
class Layer:
    """What happens to the stream in one layer."""

    path: str
    call: Call
    start: list[Norm | Scale]
    sums: list[Sum]
    norms: dict[Key, tuple[str, Key]]  # output of every norm -> its path, its input

    @property
    def branches(self) -> list[Branch]:
        """Branches in the order they run."""
        return [branch for total in self.sums for branch in total.branches]


def read_norm(module: nn.Module) -> NormInfo | None:
    """Return how a module normalises, going by its attributes; None where it has no weight vector or no epsilon."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, int | float):
        return None
    layer = isinstance(module, nn.LayerNorm) or getattr(module, "bias", None) is not None  # DeBERTa has its own class
    return NormInfo("layer" if layer else "rms", float(eps), getattr(module, "bias", None) is not None)


def is_norm(module: nn.Module, x: Tensor, out: Tensor, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether ``out = g * n(x) + bias`` with g the weight, or 1 + the weight."""
    norm = read_norm(module)
    if norm is None or x.shape != out.shape or module.weight.shape != x.shape[-1:]:  # type: ignore[union-attr]
        return False
    weight, n = module.weight.detach(), standardize(x, norm)  # type: ignore[union-attr]
    bias = module.bias.detach() if norm.has_bias else 0.0  # type: ignore[union-attr]
    return any(equal((n * gain + bias).to(out.dtype), out) for gain in (weight, 1.0 + weight))


class LayerReader:
    """Follows the stream backwards through one layer of a trace.

    Args:
        trace: the recorded pass.
        call: the layer's call.
        equal: whether two tensors are the same up to rounding.
    """

    def __init__(self, trace: Trace, call: Call, equal: Callable[[Tensor, Tensor], bool]):
        self.trace, self.call = trace, call
        self.calls = list(trace.below(call.path))
        self.calls = [c for c in self.calls if call.start <= c.start and c.end <= call.end]
        self.entry = call.inputs[0][1]
        self.norms: dict[Key, tuple[str, Key]] = {}  # output -> path, input
        for inner in self.calls:
            if inner.output is None or not inner.inputs:
                continue
            x, out = trace.tensors[inner.inputs[0][1]], trace.tensors[inner.output]
            if is_norm(inner.module, x, out, equal):
                self.norms[inner.output] = (inner.path, inner.inputs[0][1])
        self._seen: dict[Key, list[Norm | Scale | Sum] | None] = {}

    def read(self) -> Layer:
        """Return the layer.

        Raises:
            UnsupportedError: the output cannot be followed back to the input by additions, norms and scales.
        """
        assert self.call.output is not None
        steps = self._walk(self.call.output)
        if steps is None or not any(isinstance(step, Sum) for step in steps):
            raise UnsupportedError(
                f"{self.call.path}: the output is no sum of the input and what its branches add, so there is no "
                "residual to work on"
            )
        layer = Layer(self.call.path, self.call, [], [], self.norms)
        for step in steps:
            if isinstance(step, Sum):
                layer.sums.append(step)
            else:
                (layer.sums[-1].after if layer.sums else layer.start).append(step)
        for total in layer.sums:
            for branch in total.branches:
                self._norms_of(branch, total)
        return layer

    def _walk(self, key: Key) -> list[Norm | Scale | Sum] | None:
        """Return the steps from the layer's input to `key`, or None where no such path exists."""
        if key == self.entry:
            return []
        if key not in self._seen:
            self._seen[key] = None
            self._seen[key] = self._step(key)
        return self._seen[key]

    def _step(self, key: Key) -> list[Norm | Scale | Sum] | None:
        if key in self.norms:
            path, source = self.norms[key]
            before = self._walk(source)
            return None if before is None else [*before, Norm(path)]
        op = self.trace.ops.get(key)
        if op is None:
            return None
        if op.name in PASSING and len(op.inputs) == 1:
            return self._walk(op.inputs[0])
        scaled = factor(self.trace, op)
        if scaled is not None:
            before = self._walk(scaled[0])
            return None if before is None else [*before, Scale(scaled[1])]
        if op.name == "add" and len(op.inputs) == 2 and not any(r not in (1, 1.0) for r in op.rest):
            for residual, added in (op.inputs, op.inputs[::-1]):
                before = self._walk(residual)
                if before is not None:
                    return self._sum(key, residual, added, before)
        return None

    def _sum(self, key: Key, residual: Key, added: Key, before: list[Norm | Scale | Sum]) -> list[Norm | Scale | Sum]:
        """Return the steps up to ``key = residual + added``."""
        last = before[-1] if before else None
        if isinstance(last, Sum) and residual not in self.trace.ancestors(added, {last.branches[0].residual_key}):
            source = last.branches[0].residual_key  # x + attention + mlp: one residual, two branches
            total = Sum(key, None, [*last.branches, *self._branches(added, source)])
            before, residual = before[:-1], source
        else:
            total = Sum(key, None, self._branches(added, residual))
        ends = {c.path: c.end for c in self.calls}
        total.branches.sort(key=lambda b: ends.get(b.exit, self.call.end))  # in the order they run
        total.residual = self._catch(residual, min(ends.get(b.exit, self.call.end) for b in total.branches))
        return [*before, total]

    def _branches(self, key: Key, residual: Key) -> list[Branch]:
        """Return what is added: the output of one module, or a sum of such outputs."""
        path = self._leaves(key)
        if path is not None:
            return [Branch(key, residual, path)]
        op = self.trace.ops.get(self.trace.origin(key))
        if op is not None and op.name == "add" and len(op.inputs) == 2:
            parts = [branch for part in op.inputs for branch in self._branches(part, residual)]
            if all(branch.exit for branch in parts):
                return parts
        scaled = factor(self.trace, op) if op is not None else None
        if scaled is not None and (inner := self._leaves(scaled[0])) is not None:
            reason = f"the output of {inner} is multiplied by {scaled[1]:.4g} before it is added to the residual"
            return [Branch(key, residual, inner, scaled[1], refused=reason)]
        name = op.name if op is not None else "nothing that was seen"
        reason = f"what is added to the residual is no module's output; it comes from the operation {name!r}"
        return [Branch(key, residual, refused=reason)]

    def _leaves(self, key: Key) -> str | None:
        """Return the module inside the layer whose output is `key`; the one that ends last where several are."""
        for value in self.trace.chain(key):
            found = [c for c in self.calls if c.output == value and c is not self.call]
            if found:
                path = max(found, key=lambda c: c.end).path
                return path if len(self.trace.by_path[path]) == 1 else None
        return None

    def _catch(self, key: Key, limit: int) -> Ref | None:
        """Return where a hook inside the layer sees `key` before `limit`; inputs of inner modules come first."""
        once = [c for c in self.calls if len(self.trace.by_path[c.path]) == 1]
        for call in [*(c for c in once if c is not self.call), self.call]:
            for index, value in call.inputs:
                if value == key and index < 2 and call.start <= limit and call.path.startswith(self.call.path):
                    return Ref(call.path, index)
        for call in once:
            if call.output == key and call.end <= limit and call is not self.call:
                return Ref(call.path, None)
        return None

    def _norms_of(self, branch: Branch, total: Sum) -> None:
        """Find the norms of a branch: of the residual before it, of its output, or of the sum (post-norm models)."""
        inside = self.trace.ancestors(branch.key, {branch.residual_key, self.entry})
        residual = self.trace.origin(branch.residual_key)
        for output, (path, source) in self.norms.items():
            if self.trace.origin(source) == residual and output in inside and path != branch.exit:
                branch.norm = branch.norm or path
        for value in self.trace.chain(branch.key):
            if value in self.norms:
                branch.post = self.norms[value][0]
        after = [step for step in total.after if isinstance(step, Norm)]
        if after and not branch.norm and len(total.branches) == 1:
            branch.norm = after[0].path
