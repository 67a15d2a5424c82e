"""The contract as functions of a base: what must hold for every method, family and attention implementation."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from families import FIRST, PAD, VOCABULARY
from torch import Tensor, nn

from onebase.base import Base
from onebase.core.anchor import CACHES
from onebase.errors import UnsupportedError
from onebase.methods.method import Method

LOGITS = 1e-5  # largest difference of an output, float32; of outputs beyond 1, relative to the largest
GRADIENTS = 1e-4  # largest difference of a gradient, relative to the adapter's largest
VISIBLE = 2e-4  # an adapter that changes outputs by less does not count as tested
LACKS = "lacks"  # stands for a part that a base does not have at all
DECODED = 3  # decoder tokens of an encoder-decoder's row: the first ones of its text

Names = Sequence[str | None]


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword that hands a KV cache to a model: transformers 5.24 gave it another name."""
    return {next(name for name in CACHES if name in inspect.signature(model.forward).parameters): cache}


# -- adapters and rows ---------------------------------------------------------------------------------------------


def disturb(module: nn.Module, seed: int, size: float = 0.1) -> None:
    """Move every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def refused_at(base: Base, method: Method) -> str | None:
    """Return the first part that the method needs and the base refuses, or lacks (`LACKS`).

    Which parts it may refuse is a test's own.
    """
    try:
        chosen = method.needs(list(base.anatomy.sites.values()))
    except UnsupportedError as error:
        refused = (site for site in base.anatomy.sites.values() if site.unsupported)
        return next((site.part for site in refused if site.unsupported in str(error)), LACKS)
    return next((site.part for site in chosen if site.unsupported), None)


def carried(base: Base, methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return the methods that use no part which this family refuses."""
    return {name: method for name, method in methods.items() if refused_at(base, method) is None}


def attach(base: Base, methods: Mapping[str, Method], task: dict[str, Any] | None = None) -> list[str]:
    """Add one disturbed adapter per method that the base carries; return their names."""
    methods = carried(base, methods)
    for number, (name, method) in enumerate(methods.items()):
        disturb(base.add(name, method, task=task, seed=number).module, seed=100 + number)
    return list(methods)


@dataclass(frozen=True)
class Rows:
    """Token rows with the adapter of each."""

    tokens: tuple[Tensor, ...]
    names: tuple[str | None, ...]

    def order(self, places: Iterable[int]) -> Rows:
        """Return the rows in another order."""
        places = list(places)
        return Rows(tuple(self.tokens[i] for i in places), tuple(self.names[i] for i in places))

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """Return ids and mask, (B, T), with the padding on one side."""
        width = max(len(row) for row in self.tokens)
        ids = torch.full((len(self.tokens), width), PAD)
        mask = torch.zeros(ids.shape, dtype=torch.long)
        for i, row in enumerate(self.tokens):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, place], mask[i, place] = row, 1
        return ids, mask


def draw(names: Names, seed: int = 0, shortest: int = DECODED, longest: int = 10) -> Rows:
    """Draw a text of its own length for every row; row 0 is one of the shortest, so that something is padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (len(names),), generator=generator).tolist()
    lengths[0], lengths[-1] = shortest, longest
    tokens = tuple(torch.randint(FIRST, VOCABULARY, (length,), generator=generator) for length in lengths)
    return Rows(tokens, tuple(names))


def inputs(base: Base, ids: Tensor, mask: Tensor | None = None, first: Tensor | None = None) -> dict[str, Any]:
    """Return a call's inputs; `first` are the decoder tokens of an encoder-decoder."""
    call: dict[str, Any] = {"input_ids": ids}
    if mask is not None:
        call["attention_mask"] = mask
    if base.is_encoder_decoder:
        call["decoder_input_ids"] = ids[:, :DECODED] if first is None else first
    if base.anatomy.stacks[-1].causal:
        call["use_cache"] = False
    return {key: v.to(base.device) if isinstance(v, Tensor) else v for key, v in call.items()}


def values(output: Any) -> Tensor:
    """Return logits, or the last hidden state of a model without an LM head."""
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def call_rows(base: Base, rows: Rows, side: str, by_ids: bool = False, uniform: bool = False) -> list[Tensor]:
    """Run rows as one batch, under a list of names, `adapter_ids` or one name; return values at each row's tokens."""
    ids, mask = rows.padded(side)
    call = inputs(base, ids, mask, torch.stack([row[:DECODED] for row in rows.tokens]))
    if by_ids:
        out = values(base.model(**call, adapter_ids=base.ids(rows.names)))
    else:
        with base.use(rows.names[0] if uniform else rows.names):
            out = values(base.model(**call))
    return list(out) if base.is_encoder_decoder else [out[i, mask[i].bool()] for i in range(len(rows.tokens))]


def call_alone(base: Base, row: Tensor, name: str | None) -> Tensor:
    """Run one row by itself, unpadded and without a mask."""
    with base.use(name):
        return values(base.model(**inputs(base, row[None])))[0]


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference; infinite where a value is not finite or shapes differ."""
    if one.shape != other.shape or not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    return float((one.detach().double() - other.detach().double()).abs().max())


def size(values: Tensor) -> float:
    """Largest value, at least 1: what rounding is relative to."""
    return max(1.0, float(values.detach().abs().max()))


# -- contracts -----------------------------------------------------------------------------------------------------


def adapters_are_visible(base: Base, names: Names, seed: int = 5) -> None:
    """Every adapter changes the output, each in its own way."""
    row = draw([None, None], seed).tokens[1]
    with torch.no_grad():
        out = {name: call_alone(base, row, name) for name in (*names, None)}
    keys = list(out)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            assert gap(out[one], out[other]) > VISIBLE, f"{one} and {other} answer alike"


def orders(count: int, seed: int = 1) -> dict[str, list[int]]:
    """Return row orders: as drawn (equal names side by side) and shuffled (equal names apart)."""
    generator = torch.Generator().manual_seed(seed)
    return {"contiguous": list(range(count)), "shuffled": torch.randperm(count, generator=generator).tolist()}


def weights_like(out: Tensor, number: int) -> Tensor:
    """Return fixed weights that make a scalar loss of one row's values."""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(1000 + number))
    return drawn.to(out.device) / out.numel() ** 0.5


def gradients(base: Base, loss: Tensor, names: Iterable[str]) -> dict[str, list[Tensor]]:
    """Return the gradient of every parameter of the adapters' modules; zeros where it was not used."""
    own = {name: list(base.adapters[name].module.parameters()) for name in names}
    flat = [p for parameters in own.values() for p in parameters]
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    return {
        name: [torch.zeros_like(p) if (g := next(found)) is None else g for p in parameters]
        for name, parameters in own.items()
    }


def close_gradients(one: Sequence[Tensor], other: Sequence[Tensor], allowed: float, where: str) -> None:
    """Compare the gradients of one adapter, relative to its largest value."""
    largest = max(float(g.abs().max()) for g in other)
    assert largest > 0, f"{where}: no gradient at all"
    worst = max(gap(a, b) for a, b in zip(one, other, strict=True))
    assert worst <= allowed * largest, f"{where}: gradients differ by {worst:.3g}, largest {largest:.3g}"


def mixed_equals_alone(base: Base, names: Names, allowed: float = LOGITS, with_gradients: bool = True) -> None:
    """Every row of a mixed batch equals that row alone: outputs, and gradients of its adapter.

    Two rows per adapter and two plain rows, padded right and left, contiguous and shuffled; by route and by ids.
    """
    doubled = [name for name in (*names, None) for _ in range(2)]
    rows = draw(doubled)
    alone = [call_alone(base, row, name) for row, name in zip(rows.tokens, rows.names)]
    expected: dict[str, list[Tensor]] = {}
    if with_gradients:
        for i, name in enumerate(rows.names):
            if name is None:
                continue
            mine = gradients(base, (alone[i] * weights_like(alone[i], i)).sum(), [name])[name]
            expected[name] = [a + b for a, b in zip(expected[name], mine)] if name in expected else mine
    for name in (*names, None):  # one adapter for all rows takes another path than a mixture
        whole = Rows(rows.tokens[:3], (name,) * 3)
        for side in ("right", "left"):
            with torch.no_grad():
                for token, out in zip(whole.tokens, call_rows(base, whole, side, uniform=True)):
                    one = call_alone(base, token, name)
                    worst = gap(out, one)
                    assert worst <= allowed * size(one), f"a batch of {name} only, {side}: differs by {worst:.3g}"
    for how, places in orders(len(rows.names)).items():
        for side in ("right", "left"):
            mixed = call_rows(base, rows.order(places), side, by_ids=side == "left" and how == "shuffled")
            for place, out in zip(places, mixed):
                worst = gap(out, alone[place])
                where = f"row {place} of {rows.names[place]}, {side}, {how}"
                assert worst <= allowed * size(alone[place]), f"{where}: differs by {worst:.3g}"
            if with_gradients:
                loss = sum((out * weights_like(out, i)).sum() for i, out in zip(places, mixed))
                for name, found in gradients(base, loss, list(expected)).items():
                    close_gradients(found, expected[name], GRADIENTS, f"{name}, {side}, {how}")


def starts_at_the_base(base: Base, name: str, method: Method) -> None:
    """A fresh adapter changes no output by more than its method's `epsilon`."""
    base.add(name, method)
    row = draw([None, None], seed=2).tokens[1]
    with torch.no_grad():
        worst = gap(call_alone(base, row, name), call_alone(base, row, None))
    base.remove(name)
    assert method.epsilon is None or worst <= method.epsilon, f"{name} starts {worst:.3g} away"


def trains_only_the_adapter(base: Base, name: str) -> None:
    """Backward reaches every parameter of the adapter, and nothing of the base."""
    row = draw([None, None], seed=3).tokens[1]
    out = call_alone(base, row, name)
    (out * weights_like(out, 0)).sum().backward()
    reached = {n for n, p in base.adapters[name].module.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in base.adapters[name].module.named_parameters()}
    assert any(float(p.grad.abs().max()) > 0 for p in base.adapters[name].module.parameters())
    for key, parameter in base.model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, key
    for parameter in base.adapters[name].module.parameters():
        parameter.grad = None


def folds_and_reloads(base: Base, name: str, store: Any) -> None:
    """Folding keeps the outputs; saving and loading gives every tensor and output bit by bit."""
    row = draw([None, None], seed=4).tokens[1]
    adapter = base.adapters[name]
    with torch.no_grad():
        trained = call_alone(base, row, name)
        adapter.fold()
        folded = call_alone(base, row, name)
    assert gap(trained, folded) <= LOGITS
    tensors = {key: value.clone() for key, value in adapter.tensors().items()}
    ref = base.save(name, store=store).ref
    base.remove(name)
    loaded = base.load(ref, store=store)
    again = loaded.tensors()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    with torch.no_grad():
        assert torch.equal(folded, call_alone(base, row, loaded.name))


# -- what a base must look like again ------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that a closed base must have given back: values, keys, hooks, flags, settings, attributes."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, tensor in model.state_dict().items():
        found[f"tensor {name}"] = tensor.clone()
    for name, parameter in model.named_parameters():
        found[f"flag {name}"] = (parameter.requires_grad, parameter.grad is None, id(parameter))
    for name, module in model.named_modules():
        found[f"training {name}"] = module.training
        found[f"attributes {name}"] = sorted(module.__dict__)
        found[f"forward {name}"] = module.forward.__func__
        for key, value in module.__dict__.items():
            if "hooks" in key:
                found[f"{key} {name}"] = list(value.values() if isinstance(value, dict) else value)
        config = getattr(module, "config", None)
        found[f"config {name}"] = None if config is None else (id(config), config._attn_implementation, str(config))
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List the entries of two snapshots that are not the same, tensors compared bit by bit."""
    wrong = list(before.keys() ^ after.keys())
    for key in before.keys() & after.keys():
        one, other = before[key], after[key]
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        if not same:
            wrong.append(key if isinstance(one, Tensor) else f"{key}: {str(one)[:200]} became {str(other)[:200]}")
    return sorted(wrong)


def hook_count(model: nn.Module) -> int:
    """Number of forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
