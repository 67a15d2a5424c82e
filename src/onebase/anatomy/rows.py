"""The vocabulary of a family row: paths and roles, no modelling code.

Paths are relative: a stack's to the backbone, everything in a sub-layer's to its layer. A projection is a module
path, (path, i, n) for the i-th of n equal parts of a fused output, or (path, (start, stop)) for unequal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from onebase.core.site import Ref

Projection = str | tuple[str, int, int] | tuple[str, tuple[int, int]]


@dataclass(frozen=True)
class SubLayer:
    """One residual branch of a layer.

    Attributes:
        name: attention, cross or mlp.
        exit: module whose output is the very tensor added to the residual.
        residual: where the tensor that the residual carries can be caught.
        parts: q, k, v, o, gate, up, down -> projection.
        norms: norm modules of this branch, by part name (norm, post_norm).
        core: the module that calls the attention function ('' for an MLP).
        heads: (key/value heads, head dim) where they are not the family's.
        refused: part, 'exit' or 'kv' -> why it cannot be adapted.
        width: features of the residual, needed where neither o nor down is among the parts.
    """

    name: Literal["attention", "cross", "mlp"]
    exit: str
    residual: Ref
    parts: Mapping[str, Projection]
    norms: Mapping[str, str]
    core: str = ""
    heads: tuple[int, int] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    width: int = 0


@dataclass(frozen=True)
class StackRow:
    """One stack of a family.

    Attributes:
        name: encoder or decoder.
        path: from the backbone; '' is the backbone itself.
        layers: path of the layer list, from the stack.
        embed: path of the token embedding, from the stack.
        causal: tokens see only earlier ones.
        sublayers: branches in the order they run.
        position_start: first position id, None where the stack takes none.
        learned_positions: whether positions beyond `position_limit` do not exist.
        feeds: stack whose cross-attention reads this one.
        pooler: module (from the stack) that reads the first token, '' if there is none.
        layer_dropout: attribute of the layer object with a rate that its own forward applies.
        by_layer: layer -> its branches, for layers that differ from `sublayers`.
        embeddings_refusal: why no virtual tokens can be given, or ''.
        padding: 'left' or 'right' -> why rows cannot be padded on that side.
    """

    name: Literal["encoder", "decoder"]
    layers: str
    embed: str
    sublayers: tuple[SubLayer, ...]
    path: str = ""
    causal: bool = False
    position_start: int | None = 0
    position_limit: int | None = None
    feeds: str = ""
    pooler: str = ""
    layer_dropout: str = ""
    by_layer: Mapping[int, tuple[SubLayer, ...]] = field(default_factory=dict)
    embeddings_refusal: str = ""
    padding: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of models that share module names.

    Attributes:
        model_types: `config.model_type` values.
        stacks: config -> rows.
        heads: config -> (key/value heads, head dim).
        pooling: how a sequence becomes one vector by default: mean, first or last.
        prefix_refusal: config -> reason why prefixes cannot work, or ''.
    """

    model_types: tuple[str, ...]
    stacks: Callable[[Any], tuple[StackRow, ...]]
    heads: Callable[[Any], tuple[int, int]]
    pooling: Literal["mean", "first", "last"]
    prefix_refusal: Callable[[Any], str] = field(default=lambda config: "")
