"""Which linear maps are q, k, v, o, gate, up and down: read off gradients between one linear's output and the next.

Every linear's output is made a leaf, so a gradient says what a value is computed from directly, feature by feature:
the query that reaches the attention function depends on exactly the features that are q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onebase.anatomy.discovery_probe import ROWS, Attended, Probe, first
from onebase.anatomy.discovery_residual import Branch, Layer
from onebase.anatomy.discovery_stack import is_matrix
from onebase.anatomy.discovery_trace import Trace

HEADS = {"transpose", "permute"}  # what puts heads before tokens
ATTENTION, MLP = ("q", "k", "v"), ("gate", "up")
MATMULS = {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm}
SOFTMAXES = {torch.softmax, nn.functional.softmax, Tensor.softmax}


@dataclass(frozen=True)
class Linear:
    """One linear map as it ran: `leaf` is its output, cut off from what made it; `source` its input."""

    path: str
    module: nn.Module
    leaf: Tensor
    source: Tensor


@dataclass
class Part:
    """A projection: a module, and which of its output features (None: all)."""

    path: str
    features: tuple[int, ...] | None = None


@dataclass
class Branches:
    """What a branch consists of.

    Attributes:
        parts: name -> projection.
        refused: role (q, up, kv ...) -> why nothing plays it.
        untapped: name -> (module path, why no hook reaches its matrices).
        linears, others: (path, features) of the linears of the branch, and paths of other modules with matrices.
        core: the module that calls the attention function, '' if there is none.
        heads: (key/value heads, head dim) that reach the attention function.
        norms: q_norm and k_norm.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    untapped: dict[str, tuple[str, str]] = field(default_factory=dict)
    linears: list[tuple[str, int]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    core: str = ""
    heads: tuple[int, int] = (0, 0)
    norms: dict[str, str] = field(default_factory=dict)


class Products(TorchFunctionMode):
    """Collects matrix products and softmaxes, for attention that is computed without the attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[Tensor, ...], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = "matmul" if func in MATMULS else "softmax" if func in SOFTMAXES else ""
        if kind and isinstance(out, Tensor):
            self.steps.append((kind, tuple(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)), out))
        return out


@dataclass
class Leaves:
    """A pass in which every linear's output, and everything that is added to the residual, is a leaf."""

    linears: dict[str, Linear]
    exits: dict[str, Tensor]  # the value before it was cut
    attended: dict[str, list[Attended]]
    products: Products


def cut_pass(probe: Probe, trace: Trace, layers: Sequence[Layer]) -> Leaves:
    """Run one pass with every linear and exit of the layers cut."""
    linears: dict[str, Linear] = {}
    exits: dict[str, Tensor] = {}
    handles = []

    def cut(value: Any, leaf: Tensor) -> Any:
        return (leaf, *value[1:]) if isinstance(value, tuple) else leaf

    def linear(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None  # a router that is a Linear by descent
            leaf = output.detach().clone().requires_grad_()
            source = args[0] if args else next(iter(kwargs.values()))
            linears[path] = Linear(path, module, leaf, source)
            return leaf.clone()  # a layer may write into what it gets, and nobody may write into a leaf

        return hook

    def exit(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            exits[path] = first(output)
            return cut(output, exits[path].detach().requires_grad_().clone())

        return hook

    modules = dict(probe.model.named_modules())
    for layer in layers:
        for call in trace.below(layer.path):
            if is_matrix(call.module) and len(trace.by_path[call.path]) == 1:
                handles.append(call.module.register_forward_hook(linear(call.path), with_kwargs=True))
        for branch in layer.branches:
            if branch.exit:
                handles.append(modules[branch.exit].register_forward_hook(exit(branch.exit)))
    products = Products()
    try:
        with torch.enable_grad(), products:
            probe.call()
    finally:
        for handle in handles:
            handle.remove()
    attended: dict[str, list[Attended]] = {}
    for seen in probe.attended:
        attended.setdefault(probe.paths[seen.module], []).append(seen)
    return Leaves(linears, exits, attended, products)


def depends(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Return per leaf which of its features (last dimension) `value` is computed from directly; None: none of them."""
    if not value.requires_grad:
        return [None] * len(leaves)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
    found = torch.autograd.grad((value * weights).sum(), list(leaves), retain_graph=True, allow_unused=True)
    masks = [None if g is None else (g != 0).reshape(-1, g.shape[-1]).any(0) for g in found]
    return [None if mask is None or not bool(mask.any()) else mask for mask in masks]


class PartFinder:
    """Names the linears of one layer's branches."""

    def __init__(self, probe: Probe, trace: Trace, leaves: Leaves, layer: Layer):
        self.probe, self.trace, self.leaves, self.layer = probe, trace, leaves, layer

    def inside(self, branch: Branch) -> tuple[list[Linear], list[str]]:
        """Return the linears that `branch` is computed with, and other modules there that own matrices."""
        keys = self.trace.ancestors(branch.key, {branch.residual_key, self.layer.call.inputs[0][1]})
        linears, others = [], []
        for call in self.trace.below(self.layer.path):
            if call.output is None or not self._within(call.output, keys):
                continue
            if call.path in self.leaves.linears:
                linears.append(self.leaves.linears[call.path])
            elif (is_matrix(call.module) or owns_matrix(call.module)) and call.path not in others:
                others.append(call.path)
        return linears, others + self._unused(branch)

    def _unused(self, branch: Branch) -> list[str]:
        """Return the linears that the pass did not call, next to what this branch leaves."""
        found = []
        for name, module in self.probe.model.get_submodule(self.layer.path).named_modules():
            path = f"{self.layer.path}.{name}"
            if is_matrix(module) and not self.trace.by_path.get(path):
                nearest = max(self.layer.branches, key=lambda b: _shared(b.exit, path))
                found += [path] if nearest is branch else []
        return found

    def _within(self, key: Any, keys: set[Any]) -> bool:
        return key in keys or self.trace.origin(key) in keys

    def sources(self, value: Tensor, linears: Sequence[Linear]) -> list[tuple[Linear, Tensor]]:
        """Return (linear, mask of features) of every linear that `value` is computed from directly."""
        masks = depends(value, [linear.leaf for linear in linears]) if linears else []
        return [(linear, mask) for linear, mask in zip(linears, masks) if mask is not None]

    def attention(self, branch: Branch) -> Branches:
        """Name q, k, v and o of an attention branch."""
        found = Branches()
        linears, others = self.inside(branch)
        seen = [(path, a) for path, many in self.leaves.attended.items() for a in many if self._ours(path, linears, a)]
        values: dict[str, Tensor] = {}
        if len(seen) == 1:
            found.core, attended = seen[0]
            values = {"q": attended.query, "k": attended.key, "v": attended.value}
            found.heads = (attended.key.shape[1], attended.key.shape[3])
            if attended.key.shape[0] != ROWS or attended.key.shape[3] != attended.value.shape[3]:
                found.refused["kv"] = "its keys and values differ in shape, so that no prefix fits both"
        else:
            found.refused["kv"] = (
                f"{len(seen)} calls of the attention function belong to this branch" if seen else _outside(branch)
            )
            values = self._by_products(linears)
        self._output(found, branch, linears, others, "o")
        for part in ATTENTION:
            self._projection(found, part, values.get(part), linears)
        self._norms(found, branch)
        shared = _overlap(found)
        for part in shared:
            del found.parts[part]
            found.refused[part] = f"{' and '.join(shared)} are the same features of one linear map"
        found.linears, found.others = [(lin.path, lin.leaf.shape[-1]) for lin in linears], others
        return found

    def _norms(self, found: Branches, branch: Branch) -> None:
        """Find norms of q and k, of whole vectors or of each head."""
        for part in ("q", "k"):
            whole = found.parts.get(part)
            if whole is None or whole.features is not None:
                continue
            call = self.trace.only(whole.path)
            made = () if call.output is None else (self.trace.origin(call.output, HEADS),)
            for path, source in self.layer.norms.values():
                if self.trace.origin(source, HEADS) in made and len(self.trace.by_path[path]) == 1:
                    found.norms[f"{part}_norm"] = path

    def _ours(self, path: str, linears: Sequence[Linear], attended: Attended) -> bool:
        return bool(self.sources(attended.query, linears) or self.sources(attended.value, linears))

    def _by_products(self, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """Return the factors of scores = q k' and context = softmax(scores) v, where there is one softmax."""
        steps = self.leaves.products.steps
        mine = [i for i, (kind, _, out) in enumerate(steps) if kind == "softmax" and self.sources(out, linears)]
        if len(mine) != 1:
            return {}
        before = [s for s in steps[: mine[0]] if s[0] == "matmul" and self.sources(s[2], linears)]
        after = [s for s in steps[mine[0] :] if s[0] == "matmul" and self.sources(s[2], linears)]
        found = dict(zip("qk", before[0][1][-2:])) if before else {}
        return {**found, "v": after[0][1][-1]} if after else found

    def _output(
        self, found: Branches, branch: Branch, linears: Sequence[Linear], others: Sequence[str], part: str
    ) -> None:
        """Name the linear that the branch's exit is computed from directly."""
        value = self.leaves.exits.get(branch.exit)
        last = [linear for linear, _ in self.sources(value, linears)] if value is not None else []
        if value is not None and not last:  # the linear is the exit itself, and so its own leaf
            last = [linear for linear in linears if linear.path == branch.exit]
        if len(last) == 1 and last[0].leaf.shape[-1] == self.layer.call.shape[-1]:
            found.parts[part] = Part(last[0].path)
        elif value is None:
            found.refused[part] = branch.refused or "the end of the branch is no module's output"
        elif others:
            found.refused[part] = self._why(max(others, key=self._size))
        else:
            found.refused[part] = f"the branch ends in {len(last)} linear maps, not in one"

    def _projection(self, found: Branches, part: str, value: Tensor | None, linears: Sequence[Linear]) -> None:
        if value is None:
            found.refused[part] = "attention is not computed as softmax(q k') v in a way that can be followed"
            return
        sources = self.sources(value, linears)
        if len(sources) != 1:
            names = " and ".join(_leaf_name(linear.path) for linear, _ in sources) or "no linear map"
            found.refused[part] = f"{part} is computed from {names}"
            return
        linear, mask = sources[0]
        found.parts[part] = Part(linear.path, None if bool(mask.all()) else tuple(mask.nonzero().flatten().tolist()))

    def mlp(self, branch: Branch) -> Branches:
        """Name down and its sources; `gate` and `up` are told apart by `settle_gates`."""
        found = Branches()
        linears, others = self.inside(branch)
        self._output(found, branch, linears, others, "down")
        down = found.parts.get("down")
        if down is not None:
            rest = [linear for linear in linears if linear.path != down.path]
            sources = self.sources(self.leaves.linears[down.path].source, rest)
            if len(sources) == 1:  # features that ReLU switched off in this pass have no gradient
                found.parts["up"] = Part(sources[0][0].path)
            elif len(sources) == 2:
                found.parts["up"], found.parts["gate"] = (Part(linear.path) for linear, _ in sources)
            else:
                names = " and ".join(_leaf_name(linear.path) for linear, _ in sources) or "no linear map"
                found.refused["up"] = f"the input of down is computed from {names}"
        else:
            found.refused["up"] = found.refused["down"]
        found.linears, found.others = [(lin.path, lin.leaf.shape[-1]) for lin in linears], others
        return found

    def complete(self, found: Branches) -> None:
        """Make sites of the linears that play no role, under their own names; refuse matrices outside of linears."""
        used: dict[str, list[int] | None] = {}
        for part in found.parts.values():
            known = used.get(part.path, [])
            used[part.path] = None if part.features is None or known is None else [*known, *part.features]
        for path, width in found.linears:
            have = used.get(path, [])
            if have is None or len(have) == width:
                continue
            left = tuple(i for i in range(width) if i not in set(have))
            found.parts[self._free(found, f"{path}_rest" if have else path)] = Part(path, left if have else None)
        for path in found.others:
            found.untapped[self._free(found, path)] = path, self._why(path)

    def _why(self, path: str) -> str:
        """Say why a module with a matrix is no site."""
        module = self.probe.model.get_submodule(path)
        if is_matrix(module) and len(self.trace.by_path.get(path, [])) == 1:
            return f"{type(module).__name__} gives more than its linear map"
        if is_matrix(module):
            return f"{path} runs {len(self.trace.by_path.get(path, []))} times in one pass: expected once"
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in module.named_parameters(recurse=False) if p.dim() > 1)
        return f"{type(module).__name__} computes with tensors of its own ({shapes}), which no module hook reaches"

    def _size(self, path: str) -> int:
        return sum(p.numel() for p in self.probe.model.get_submodule(path).parameters())

    def _free(self, found: Branches, path: str) -> str:
        """Return a name for a module that plays no part: its own, with its parents' where that is taken."""
        names = path[len(self.layer.path) + 1 :].split(".")
        taken = {
            *found.parts,
            *found.refused,
            *found.untapped,
            *ATTENTION,
            *MLP,
            "o",
            "down",
            "norm",
            "post_norm",
            "kv",
            "exit",
        }
        tails = ("_".join(names[-count:]) for count in range(1, len(names) + 1))
        return next((tail for tail in tails if tail not in taken), "_".join([*names, str(len(taken))]))


def owns_matrix(module: nn.Module) -> bool:
    """Whether a module computes with matrices of its own (fused experts, routers) instead of linear modules."""
    if is_matrix(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d):
        return False
    return any(p.dim() in (2, 3) and min(p.shape) > 1 for p in module.parameters(recurse=False))


def _shared(one: str, other: str) -> int:
    """Return how many names two paths share from the root on."""
    pairs = zip(one.split("."), other.split("."))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _outside(branch: Branch) -> str:
    return "computes attention outside of transformers' attention interface, where no prefix can reach it"


def _leaf_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _overlap(found: Branches) -> list[str]:
    """Return the parts among q, k, v that share features of one module."""
    shared: set[str] = set()
    parts = [(name, found.parts[name]) for name in ATTENTION if name in found.parts]
    for i, (one, a) in enumerate(parts):
        for other, b in parts[i + 1 :]:
            if a.path == b.path and (a.features is None or b.features is None or set(a.features) & set(b.features)):
                shared |= {one, other}
    return [name for name in ATTENTION if name in shared]


def settle_gates(probe: Probe, found: Sequence[Branches], hold: dict) -> None:
    """Tell `up` from `gate` in every gated MLP: the input of down is linear in up, and is not in gate.

    Args:
        probe: the model.
        found: the MLPs of all layers.
        hold: edits that keep layer inputs and exits as they were, so that layers do not disturb each other.
    """
    from onebase.core.site import Ref

    gated = [b for b in found if "down" in b.parts and "up" in b.parts]
    inputs = {id(b): Ref(b.parts["down"].path, 0) for b in gated}
    plain = probe.run([*inputs.values()], hold)
    for b in gated:
        if "gate" not in b.parts:
            width, source = _width(probe, b.parts["down"].path, 0), _width(probe, b.parts["up"].path, 1)
            if source == 2 * width:  # one fused linear
                path = b.parts.pop("up").path
                b.parts["gate"], b.parts["up"] = (
                    Part(path, tuple(range(width))),
                    Part(path, tuple(range(width, 2 * width))),
                )
                b.refused["fused"] = ""
            elif source != width:
                b.refused["up"] = f"{source} features of up become {width} of down's input"
                del b.parts["up"]
    linear: dict[tuple[int, str], bool] = {}
    pairs = [b for b in gated if "gate" in b.parts]
    orders: dict[int, list[tuple[Part, Part]]] = {id(b): _splits(b) for b in pairs}
    for number in range(max((len(o) for o in orders.values()), default=0)):
        for side in (0, 1):
            edits, tested = dict(hold), []
            for b in pairs:
                if number < len(orders[id(b)]):
                    part = orders[id(b)][number][side]
                    edits[Ref(part.path, None)] = _scaled(part)
                    tested.append(b)
            out = probe.run([*inputs.values()], edits)
            for b in tested:
                ref = inputs[id(b)]
                linear[id(b), f"{number}{side}"] = probe.equal(out[ref], -2.0 * plain[ref])
    for b in pairs:
        _choose(b, orders[id(b)], linear)


def _splits(b: Branches) -> list[tuple[Part, Part]]:
    """Return the ways in which gate and up can be told apart: two modules, or halves, or every other feature."""
    one, other = b.parts["gate"], b.parts["up"]
    if b.refused.pop("fused", None) is None:
        return [(one, other)]
    assert one.features is not None and other.features is not None
    width = len(one.features)
    even = Part(one.path, tuple(range(0, 2 * width, 2))), Part(one.path, tuple(range(1, 2 * width, 2)))
    return [(one, other), even]


def _scaled(part: Part) -> Any:
    """Return an edit that multiplies a part by -2: linear for no activation in use, ReLU and tanh included."""

    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        index = slice(None) if part.features is None else list(part.features)
        new[..., index] = new[..., index] * -2.0
        return new

    return edit


def _choose(b: Branches, orders: list[tuple[Part, Part]], linear: dict[tuple[int, str], bool]) -> None:
    for number, (one, other) in enumerate(orders):
        first_linear, second_linear = linear[id(b), f"{number}0"], linear[id(b), f"{number}1"]
        if first_linear != second_linear:
            b.parts["up"], b.parts["gate"] = (one, other) if first_linear else (other, one)
            return
    paths = {part.path for pair in orders for part in pair}
    del b.parts["up"], b.parts["gate"]
    b.refused["up"] = f"gate and up cannot be told apart in {' and '.join(sorted(paths))}: no one of them acts linearly"


def _width(probe: Probe, path: str, side: int) -> int:
    module: Any = probe.model.get_submodule(path)
    sizes = (module.in_features, module.out_features) if hasattr(module, "in_features") else (module.nx, module.nf)
    return int(sizes[side])
