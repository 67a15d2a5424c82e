"""The anatomy of one base: its stacks and every site, resolved from the family row."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from onebase.anatomy.families import FAMILIES
from onebase.anatomy.rows import Family, Part, Projection, StackRow, SubLayer, Untapped
from onebase.core.site import NormInfo, Ref, Site, SiteKind, Stack
from onebase.core.trunk import has_trunk
from onebase.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What was found in a base.

    Attributes:
        model_type: the family.
        stacks: in the order they run.
        sites: every site, by name.
        kv_modules: the modules that call the attention function, with their 'kv' site.
        pooling: default way to make one vector of a sequence.
        hidden_size: D of the states that heads read.
        source: 'row' of a family, or 'discovery'.
    """

    model_type: str
    stacks: tuple[Stack, ...]
    sites: dict[str, Site]
    kv_modules: tuple[tuple[nn.Module, Site], ...] = field(repr=False)
    pooling: str = "mean"
    hidden_size: int = 0
    source: Literal["row", "discovery"] = "row"

    @property
    def refused(self) -> dict[str, str]:
        """Site -> why nothing can be adapted there. A method that needs such a site raises with the reason."""
        return {name: site.unsupported for name, site in self.sites.items() if site.unsupported}

    @property
    def layers(self) -> int:
        """Layers of all stacks together."""
        return sum(len(stack.layers) for stack in self.stacks)

    def stack(self, name: str) -> Stack:
        """Return the stack called `name`."""
        return next(stack for stack in self.stacks if stack.name == name)


def dissect(model: Any) -> Anatomy:
    """Find stacks and sites of a transformers model.

    Args:
        model: any transformers model, with or without a head. A family without a row is discovered.

    Raises:
        UnsupportedError: discovery finds no stack of layers, or a module that a row names is missing.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    source = "discovery" if family is None else "row"
    if family is None:
        from onebase.anatomy.discovery import discover

        family = discover(model)
    refusal = family.refusal(config)
    if refusal:
        raise UnsupportedError(f"{config.model_type}: {refusal}")
    backbone = model.base_model
    prefix = next(name for name, module in model.named_modules(remove_duplicate=False) if module is backbone)
    finder = _Finder(model, prefix)
    stacks: list[Stack] = []
    sites: dict[str, Site] = {}
    kv_modules: list[tuple[nn.Module, Site]] = []
    rows = [row for row in family.stacks(config) if finder.has(row.path)]
    present = {row.name for row in rows}
    for row in rows:
        stack = finder.stack(row, feeds=row.feeds if row.feeds in present else "")
        stacks.append(stack)
        for site, core in _sites(row, stack, finder, family, config):
            sites[site.name] = site
            if core is not None:
                kv_modules.append((core, site))
    if source == "row":  # what discovery found may mix tokens where nobody looked
        stacks = [
            replace(s, packs=_packs(s, config, sites.values()), trunk=s.patches is None and has_trunk(s.layers))
            for s in stacks
        ]
    hidden = stacks[0].hidden
    return Anatomy(config.model_type, tuple(stacks), sites, tuple(kv_modules), family.pooling, hidden, source)


def _packs(stack: Stack, config: Any, sites: Iterable[Site]) -> bool:
    """Whether a stack computes the same on packed rows, with an attention function that takes them apart.

    Positions must be given with the call, every attention must go through the function, and see all of its row: a
    window counts columns of the batch.
    """
    own = [site for site in sites if site.stack == stack.name]
    attention = [site for site in own if site.kind == "kv"]
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        stack.position_start is not None
        and stack.positions is None
        and stack.patches is None
        and not windows
        and kinds <= {"full_attention"}
        and len(attention) == len(stack.layers)
        and not any(site.unsupported for site in attention)
        and not any(site.groupwise for site in own)
    )


def _arguments(module: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(module.forward).parameters


class _Finder:
    """Resolve row paths to modules and say what is missing."""

    def __init__(self, model: nn.Module, prefix: str):
        self.model, self.prefix = model, prefix
        # a position that turns keys turns what is added to them too, so no softmax cancels it
        config = model.config  # type: ignore[attr-defined]
        self.rotates = any("rotary" in type(module).__name__.lower() for module in model.modules()) or any(
            getattr(config, name, None)
            for name in ("rope_parameters", "rotary_dim", "rotary_pct")  # type: ignore[arg-type]
        )

    def join(self, *parts: str) -> str:
        return ".".join(part for part in parts if part)

    def has(self, path: str) -> bool:
        try:
            self.model.get_submodule(self.join(self.prefix, path))
        except AttributeError:
            return False
        return True

    def get(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedError(f"{type(self.model).__name__} has no module {path!r}: {error}") from None

    def layers(self, row: StackRow) -> list[str]:
        """Return the paths of a stack's layers; every '*' stands for all children of the list before it."""
        paths = [self.join(self.prefix, row.path)]
        for name in [*row.layers.split("."), "*"]:
            if name == "*":
                paths = [self.join(path, child) for path in paths for child, _ in self.get(path).named_children()]
            else:
                paths = [self.join(path, name) for path in paths]
        return paths

    def stack(self, row: StackRow, feeds: str) -> Stack:
        path = self.join(self.prefix, row.path)
        module = self.get(path)

        def inside(name: str) -> nn.Module | None:
            return self.get(self.join(path, name)) if name else None

        embed = self.get(self.join(path, row.embed))
        width = int(embed.weight.shape[1]) if row.width is None else row.width  # type: ignore[union-attr,index]
        patches = inside(row.pixels.module) if row.pixels else None
        pooler = getattr(module, row.pooler, None) if row.pooler else None
        embedded = inside(row.embed.rpartition(".")[0])
        if patches is not None or row.causal or embedded is None or "inputs_embeds" not in _arguments(embedded):
            embedded = None
        return Stack(
            name=row.name,
            path=path,
            module=module,
            causal=row.causal,
            embed=embed,
            embedded=embedded,
            placed=embedded is not None and "position_ids" in _arguments(embedded),
            width=width,
            hidden=width if row.hidden is None else row.hidden,
            position_start=row.position_start,
            position_limit=row.position_limit,
            positions=inside(row.position_module),
            position_offset=row.position_offset,
            feeds=feeds,
            pooler=pooler,
            pooled=inside(row.pooler_reads) if pooler is not None else None,
            patches=patches,
            count=partial(row.pixels.count, patches) if row.pixels else None,
            before=row.pixels.before if row.pixels else 0,
            layers=tuple(self.get(layer) for layer in self.layers(row)),
            layer_dropout=row.layer_dropout,
            padding=row.padding,
        )


def _sites(
    row: StackRow, stack: Stack, finder: _Finder, family: Family, config: object
) -> Iterator[tuple[Site, nn.Module | None]]:
    """Yield (site, attention module or None) of one stack."""
    path, width = finder.join(stack.path, row.embed), stack.width
    refusal = row.embeddings_refusal or None
    for kind in ("embeddings", "tokens"):
        where = (f"{row.name}/{kind}", kind, row.name, -1, "", kind, path, stack.embed)
        images = kind == "tokens" and stack.patches is not None
        reason = "trained tokens are words, and this base reads images" if images else refusal
        yield Site(*where, width, width, unsupported=reason), None  # type: ignore[arg-type]
    if stack.embedded is not None:
        where = (f"{row.name}/embedded", "embedded", row.name, -1, "", "embedded", path.rpartition(".")[0])
        # DeBERTa's embeddings widen before their norm, ELECTRA's and ALBERT's are widened behind it
        normed = [len(p) for p in stack.embedded.parameters() if p.dim() == 1]
        own = (stack.embedded, width, normed[-1] if normed else width)
        yield Site(*where, *own, unsupported=refusal), None  # type: ignore[arg-type]
    for index, (root, layer) in enumerate(zip(finder.layers(row), stack.layers, strict=True)):
        subs = row.by_layer.get(index, row.sublayers)
        hidden = next((sub.width for sub in subs if sub.width), stack.hidden)
        for sub in subs:
            for site, core in _sublayer_sites(sub, row.name, index, root, finder, family, config):
                hidden = site.d_out if site.kind == "exit" and not site.unsupported else hidden
                yield site, core
        name = f"{row.name}/{index}/block"
        where = (name, "block", row.name, index, "", "block", root, layer, hidden, hidden)
        yield Site(*where, unsupported=row.block_refusal or None), None  # type: ignore[arg-type]


def _sublayer_sites(
    sub: SubLayer, stack: str, index: int, root: str, finder: _Finder, family: Family, config: Any
) -> Iterator[tuple[Site, nn.Module | None]]:
    at = f"{stack}/{index}/{sub.name}"
    where = (stack, index, sub.name)
    width = int(config.hidden_size) if sub.width is None else sub.width
    for part, projection in sub.parts.items():
        site = _linear(at, where, part, projection, root, finder)
        if part in sub.groupwise:
            own = sub.groupwise[part]
            site = replace(site, groupwise=replace(own, path=finder.join(root, own.path)))
        if part == "k" and not site.unsupported:
            untouched = not finder.rotates and not _changes_keys(finder, root, sub.core)
            site = replace(site, cancels=untouched if sub.cancels is None else sub.cancels)
        yield site, None
        if part == "down":
            at_input: dict[str, Any] = {"kind": "input", "part": "hidden", "d_out": site.d_in}
            yield replace(site, name=f"{at}/hidden", span=None, index=None, **at_input), None
        width = site.d_out if part in ("o", "down") and not site.unsupported else width
    for part, relative in sub.norms.items():
        path = finder.join(root, relative)
        module = finder.get(path)
        info = _norm_info(module)
        if info is not None:
            d = int(module.weight.shape[0])  # type: ignore[union-attr,index]
            yield Site(f"{at}/{part}", "norm", *where, part, path, module, d, d, norm=info), None
    for part, reason in sub.refused.items():
        kind: SiteKind = part if part in ("exit", "kv") else "linear"  # type: ignore[assignment]
        yield Site(at if part == "exit" else f"{at}/{part}", kind, *where, part, "", None, unsupported=reason), None
        if part == "down":
            yield Site(f"{at}/hidden", "input", *where, "hidden", "", None, unsupported=reason), None
    if "exit" not in sub.refused:
        residual = Ref(finder.join(root, sub.residual.path), sub.residual.index)
        path = finder.join(root, sub.exit)
        yield Site(at, "exit", *where, "exit", path, finder.get(path), width, width, residual=residual), None
    if sub.core and "kv" not in sub.refused:
        heads, dim = sub.heads or family.heads(config)
        path = finder.join(root, sub.core)
        core = finder.get(path)
        refusal = family.prefix_refusal(config) or None
        site = Site(f"{at}/kv", "kv", *where, "kv", path, core, heads=heads, head_dim=dim, unsupported=refusal)
        yield site, core


def _linear(
    at: str, where: tuple[str, int, str], part: str, projection: Projection, root: str, finder: _Finder
) -> Site:
    """Return the site of one projection."""
    name = f"{at}/{part}"
    if isinstance(projection, Untapped):
        path = finder.join(root, projection.path)
        return Site(name, "linear", *where, part, path, finder.get(path), unsupported=projection.reason)
    relative = (
        projection
        if isinstance(projection, str)
        else projection[0]
        if isinstance(projection, tuple)
        else projection.path
    )
    path = finder.join(root, relative)
    module = finder.get(path)
    d_in, d_out = _features(module)
    span: tuple[int, int] | None = None
    index: Tensor | None = None
    if isinstance(projection, tuple):
        _, number, of = projection
        span = (number * d_out // of, (number + 1) * d_out // of)
    elif isinstance(projection, Part):
        span = projection.features if isinstance(projection.features, tuple) else None
        index = None if isinstance(projection.features, tuple) else projection.features
    if span is not None:
        d_out = span[1] - span[0]
    elif index is not None:
        d_out = len(index)
    return Site(name, "linear", *where, part, path, module, d_in, d_out, span, index)


def _changes_keys(finder: _Finder, root: str, core: str) -> bool:
    """Whether an attention module normalises its keys, or has sinks beside them."""
    module = finder.get(finder.join(root, core))
    return any(hasattr(module, name) for name in ("k_norm", "sinks"))


def _features(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a Linear, a quantized linear or a transformers Conv1D."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]  # Conv1D


def _norm_info(module: nn.Module) -> NormInfo | None:
    """Return how a norm computes; None where it has no weight to adapt."""
    if getattr(module, "weight", None) is None:
        return None
    eps = next((getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)), None)
    if eps is None:
        raise UnsupportedError(f"{type(module).__name__} states no epsilon")
    layer = isinstance(module, nn.LayerNorm) or getattr(module, "bias", None) is not None  # DeBERTa has its own class
    return NormInfo("layer" if layer else "rms", float(eps), getattr(module, "bias", None) is not None)
