"""The vocabulary of a family row: paths and roles, no modelling code.

Paths are relative: a stack's to the backbone, everything in a sub-layer's to its layer. A projection is a module
path; or (path, i, n) for the i-th of n equal parts of a fused output; or a Part, made by `fused`; or Untapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from onebase.core.site import Groupwise, Ref


@dataclass(frozen=True, eq=False)
class Part:
    """Some output features of a fused projection.

    Attributes:
        path: module path.
        features: (start, stop) where they lie side by side, else their numbers, (d_out,).
    """

    path: str
    features: tuple[int, int] | Tensor


@dataclass(frozen=True)
class Untapped:
    """A projection that no hook reaches.

    Attributes:
        path: the module that holds its weights.
        reason: a sentence that says why.
    """

    path: str
    reason: str


Projection = str | tuple[str, int, int] | Part | Untapped


def fused(path: str, groups: int = 1, **widths: int) -> dict[str, Projection]:
    """Name the parts of a fused projection.

    Args:
        path: module path.
        groups: how often the parts alternate: 1 where each part is one run, the number of heads where q, k and v
            follow one another per head.
        widths: part name -> features of this part in one group, in the order in which they lie there.

    Returns:
        part name -> Part.

    Example:
        >>> fused("query_key_value", 2, q=1, k=1, v=1)["k"].features.tolist()
        [1, 4]
    """
    total, start = sum(widths.values()), 0
    parts: dict[str, Projection] = {}
    for name, width in widths.items():
        if groups == 1:
            parts[name] = Part(path, (start, start + width))
        else:
            first = torch.arange(groups)[:, None] * total + start
            parts[name] = Part(path, (first + torch.arange(width)).flatten())
        start += width
    return parts


@dataclass(frozen=True)
class SubLayer:
    """One residual branch of a layer.

    Attributes:
        name: attention, cross or mlp.
        exit: module whose output is the very tensor added to the residual.
        residual: where the tensor that the residual carries can be caught.
        parts: q, k, v, o, gate, up, down -> projection.
        norms: norm modules of this branch, by part name (norm, post_norm, q_norm, k_norm).
        core: the module that calls the attention function ('' for an MLP).
        heads: (key/value heads, head dim) where they are not the family's.
        groupwise: part -> the computation that also calls this projection on an input without batch rows; its path
            is relative to the layer.
        refused: 'exit', 'kv' or a part that no linear map plays by itself -> why; its linears have names of their own.
        width: features of the residual where neither o nor down is a part, None for the config's `hidden_size`.
        cancels: softmax cancels a constant that is added to the keys; None: unless positions turn them, a norm follows
            or sinks stand beside them.
    """

    name: Literal["attention", "cross", "mlp"]
    exit: str
    residual: Ref
    parts: Mapping[str, Projection]
    norms: Mapping[str, str]
    core: str = ""
    heads: tuple[int, int] | None = None
    groupwise: Mapping[str, Groupwise] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None
    cancels: bool | None = None


@dataclass(frozen=True)
class StackRow:
    """One stack of a family.

    Attributes:
        name: encoder or decoder.
        path: from the backbone; '' is the backbone itself.
        layers: path of the layer list, from the stack; '*' stands for every child of a list of lists.
        embed: path of the token embedding, from the stack.
        width: features of an embedded token, None for those of the embedding's weight.
        hidden: features of the stack's states, None where they are as wide as embedded tokens.
        causal: tokens see only earlier ones.
        sublayers: branches in the order they run.
        position_start: first position id, None where positions are not counted (relative ones need no repair).
        position_limit: number of positions that exist, None where there is no limit.
        position_module: path of a learned position embedding that counts columns because the stack takes no
            `position_ids`, '' elsewhere.
        position_offset: row of that embedding's weight that holds position 0.
        feeds: stack whose cross-attention reads this one.
        pooler: module (from the stack) that reads the first token, '' if there is none.
        pooler_reads: module (from the stack) whose output the pooler gets only the first token of, '' where the
            pooler is called with all states.
        pixels: how images become tokens, None for stacks that read token ids.
        layer_dropout: attributes of the layer object (``dropout``) or of its config (``config.hidden_dropout``) with
            rates that the layer's own forward applies.
        by_layer: layer -> its branches, for layers that differ from `sublayers`.
        embeddings_refusal: why no virtual tokens can be given, or ''.
        block_refusal: why what leaves a layer cannot be changed by position, or ''.
        padding: 'left' or 'right' -> why rows cannot be padded on that side.
    """

    name: Literal["encoder", "decoder"]
    layers: str
    embed: str
    sublayers: tuple[SubLayer, ...]
    path: str = ""
    width: int | None = None
    hidden: int | None = None
    causal: bool = False
    position_start: int | None = 0
    position_limit: int | None = None
    position_module: str = ""
    position_offset: int = 0
    feeds: str = ""
    pooler: str = ""
    pooler_reads: str = ""
    pixels: Pixels | None = None
    layer_dropout: tuple[str, ...] = ()
    by_layer: Mapping[int, tuple[SubLayer, ...]] = field(default_factory=dict)
    embeddings_refusal: str = ""
    block_refusal: str = ""
    padding: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pixels:
    """How a stack that reads images makes tokens of them.

    Attributes:
        module: path of the module whose output are the tokens, (B, T, D), positions included.
        count: that module, images (B, C, H, W) -> T.
        before: tokens that stay in front of virtual tokens (the CLS token).
    """

    module: str
    count: Callable[[Any, Tensor], int]
    before: int


@dataclass(frozen=True)
class Family:
    """A family of models that share module names.

    Attributes:
        model_types: `config.model_type` values.
        stacks: config -> rows.
        heads: config -> (key/value heads, head dim).
        pooling: how a sequence becomes one vector by default: mean, first or last.
        prefix_refusal: config -> reason why prefixes cannot work, or ''.
        refusal: config -> reason why a model with this setting cannot be served at all, or ''.
    """

    model_types: tuple[str, ...]
    stacks: Callable[[Any], tuple[StackRow, ...]]
    heads: Callable[[Any], tuple[int, int]]
    pooling: Literal["mean", "first", "last"]
    prefix_refusal: Callable[[Any], str] = field(default=lambda config: "")
    refusal: Callable[[Any], str] = field(default=lambda config: "")
