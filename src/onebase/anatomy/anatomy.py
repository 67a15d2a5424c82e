"""The anatomy of one base: its stacks and every site, resolved from the family row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from onebase.anatomy.families import FAMILIES
from onebase.anatomy.rows import Family, StackRow, SubLayer
from onebase.core.site import NormInfo, Ref, Site, Stack
from onebase.errors import UnsupportedError, nearest


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What was found in a base.

    Attributes:
        model_type: the family.
        stacks: in the order they run.
        sites: every site, by name.
        kv_modules: the modules that call the attention function, with their 'kv' site.
        pooling: default way to make one vector of a sequence.
        hidden_size: D.
    """

    model_type: str
    stacks: tuple[Stack, ...]
    sites: dict[str, Site]
    kv_modules: tuple[tuple[nn.Module, Site], ...] = field(repr=False)
    pooling: str = "mean"
    hidden_size: int = 0

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
        model: any model of a known family, with or without a head.

    Raises:
        UnsupportedError: the family is unknown, or a module its row names is missing.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedError(
            f"no family row for model type {config.model_type!r}. {nearest(str(config.model_type), FAMILIES)}"
        )
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
    width = _embedding_width(stacks[0])
    return Anatomy(config.model_type, tuple(stacks), sites, tuple(kv_modules), family.pooling, width)


def _embedding_width(stack: Stack) -> int:
    return int(stack.embed.weight.shape[1])  # type: ignore[union-attr,index]


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

    def stack(self, row: StackRow, feeds: str) -> Stack:
        path = self.join(self.prefix, row.path)
        module = self.get(path)
        pooler = getattr(module, row.pooler, None) if row.pooler else None
        layers = self.get(self.join(path, row.layers))
        return Stack(
            name=row.name,
            path=path,
            module=module,
            causal=row.causal,
            embed=self.get(self.join(path, row.embed)),
            position_start=row.position_start,
            position_limit=row.position_limit,
            feeds=feeds,
            pooler=pooler,
            layers=tuple(layers.children()),
            layer_dropout=row.layer_dropout,
        )


def _sites(
    row: StackRow, stack: Stack, finder: _Finder, family: Family, config: object
) -> Iterator[tuple[Site, nn.Module | None]]:
    """Yield (site, attention module or None) of one stack."""
    width = _embedding_width(stack)
    path = finder.join(stack.path, row.embed)
    yield (
        Site(
            f"{row.name}/embeddings",
            "embeddings",
            row.name,
            -1,
            "",
            "embeddings",
            path,
            stack.embed,
            width,
            width,
        ),
        None,
    )
    name = f"{row.name}/tokens"
    yield Site(name, "tokens", row.name, -1, "", "tokens", path, stack.embed, width, width), None
    for index, layer in enumerate(stack.layers):
        root = finder.join(stack.path, row.layers, str(index))
        hidden = 0
        for sub in row.sublayers:
            for site, core in _sublayer_sites(sub, row.name, index, root, finder, family, config):
                hidden = site.d_out if site.kind == "exit" else hidden
                yield site, core
        name = f"{row.name}/{index}/block"
        yield Site(name, "block", row.name, index, "", "block", root, layer, hidden, hidden), None


def _sublayer_sites(
    sub: SubLayer, stack: str, index: int, root: str, finder: _Finder, family: Family, config: object
) -> Iterator[tuple[Site, nn.Module | None]]:
    at = f"{stack}/{index}/{sub.name}"
    where = (stack, index, sub.name)
    width = 0
    for part, projection in sub.parts.items():
        relative, number, of = projection if isinstance(projection, tuple) else (projection, 0, 1)
        path = finder.join(root, relative)
        module = finder.get(path)
        d_in, d_out = _features(module)
        span = None if of == 1 else (number * d_out // of, (number + 1) * d_out // of)
        d_out = d_out // of
        still = part == "k" and not finder.rotates and not _changes_keys(finder, root, sub.core)
        yield Site(f"{at}/{part}", "linear", *where, part, path, module, d_in, d_out, span, cancels=still), None
        if part == "down":
            yield Site(f"{at}/hidden", "input", *where, "hidden", path, module, d_in, d_in), None
        width = d_out if part in ("o", "down") else width
    for part, relative in sub.norms.items():
        path = finder.join(root, relative)
        module = finder.get(path)
        info = _norm_info(module)
        if info is not None:
            yield Site(f"{at}/{part}", "norm", *where, part, path, module, width, width, norm=info), None
    residual = Ref(finder.join(root, sub.residual.path), sub.residual.index)
    path = finder.join(root, sub.exit)
    yield Site(at, "exit", *where, "exit", path, finder.get(path), width, width, residual=residual), None
    if sub.core:
        heads, dim = family.heads(config)
        path = finder.join(root, sub.core)
        core = finder.get(path)
        refusal = family.prefix_refusal(config) or None
        site = Site(f"{at}/kv", "kv", *where, "kv", path, core, heads=heads, head_dim=dim, unsupported=refusal)
        yield site, core


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
    layer = isinstance(module, nn.LayerNorm)
    return NormInfo("layer" if layer else "rms", float(eps), getattr(module, "bias", None) is not None)
