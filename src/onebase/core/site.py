"""Places in a base: sites, stacks and where their tensors are captured. Pure description plus read-only access."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onebase.errors import UnsupportedError

SiteKind = Literal["linear", "input", "exit", "norm", "block", "kv", "embeddings", "tokens"]


@dataclass(frozen=True)
class Ref:
    """Where a tensor can be caught: the input `index` of a module, or its output."""

    path: str
    index: int | None = 0  # None: the module's output

    def __str__(self) -> str:
        return f"{'output' if self.index is None else f'input {self.index}'} of {self.path}"


@dataclass(frozen=True)
class NormInfo:
    """How a norm module computes: ``n(x) * gamma + beta`` with n standardising ('layer') or scaling ('rms')."""

    kind: Literal["layer", "rms"]
    eps: float
    has_bias: bool


@dataclass(frozen=True, eq=False)
class Site:
    """A named place in the base. Read-only: `weight` and `bias` are copies or views that nobody may change.

    Attributes:
        name: e.g. ``encoder/3/attention/q``.
        kind: linear output, linear input, sub-layer exit, norm output, block output, attention keys and values,
            embeddings (virtual tokens), tokens (embeddings of single ids).
        stack, layer, sublayer, part: the components of the name ('' and -1 where they do not apply).
        path: module path from the model's root; the tap hooks this module's output, or its input.
        d_in, d_out: features of the module's input and of the value at the site.
        span: features of the module's output that belong to this site, for fused projections.
        heads, head_dim: of keys and values, for 'kv' sites.
        cancels: a constant added here changes nothing, because softmax cancels it (keys that are not rotated).
    """

    name: str
    kind: SiteKind
    stack: str
    layer: int
    sublayer: str
    part: str
    path: str
    module: Any = field(repr=False)
    d_in: int = 0
    d_out: int = 0
    span: tuple[int, int] | None = None
    residual: Ref | None = None
    norm: NormInfo | None = None
    heads: int = 0
    head_dim: int = 0
    unsupported: str | None = None  # why nothing can be tapped here
    cancels: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """Return the same site: a copy of an adapter stays on the base, which is not copied."""
        return self

    def weight(self) -> Tensor:
        """Return W, (d_out, d_in), detached, dequantized where the base is quantized, of this site's span only.

        Raises:
            UnsupportedError: the tensor is not resident (offloaded) or is no matrix.
        """
        weight = self._tensor("weight")
        if weight.dim() == 2 and _is_conv1d(self.module):
            weight = weight.t()  # transformers' Conv1D stores (in, out)
        return weight if self.span is None else weight[self.span[0] : self.span[1]]

    def bias(self) -> Tensor | None:
        """Return the bias (d_out,) of this site's span, detached, or None."""
        if getattr(self.module, "bias", None) is None:
            return None
        bias = self._tensor("bias")
        return bias if self.span is None else bias[self.span[0] : self.span[1]]

    def _tensor(self, name: str) -> Tensor:
        tensor = getattr(self.module, name, None)
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(f"site {self.name}: {type(self.module).__name__} has no {name}")
        if tensor.is_meta:
            raise UnsupportedError(
                f"site {self.name}: its {name} is offloaded (on the meta device); load the base without offload "
                "or use a method that does not read W"
            )
        tensor = tensor.detach()
        if hasattr(tensor, "dequantize") and not tensor.is_floating_point():
            tensor = tensor.dequantize()
        return tensor


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of layers that is called as one module: an encoder, a decoder or the only backbone.

    Attributes:
        name: 'encoder' or 'decoder'.
        path: module path from the model's root ('' is the model itself).
        causal: tokens see only earlier tokens.
        embed: the token embedding module.
        position_start: first position id, or None where the stack takes no `position_ids`.
        position_limit: number of learned positions, or None where positions are computed.
        feeds: name of the stack whose cross-attention reads this one's states, or ''.
        pooler: module that reads the first token inside the stack, or None.
        layers: the layer modules, for gradient checkpointing.
        layer_dropout: attribute of a layer object that holds a dropout rate it applies itself, or ''.
    """

    name: str
    path: str
    module: Any = field(repr=False)
    causal: bool = False
    embed: Any = field(repr=False, default_factory=nn.Identity)
    position_start: int | None = 0
    position_limit: int | None = None
    feeds: str = ""
    pooler: nn.Module | None = field(repr=False, default=None)
    layers: tuple[nn.Module, ...] = field(repr=False, default=())
    layer_dropout: str = ""


def standardize(x: Tensor, norm: NormInfo) -> Tensor:
    """Return n(x), the norm without its gain and bias, computed in float32.

    Args:
        x: (..., d) the norm's input.
        norm: kind and epsilon.

    Returns:
        (..., d) in the dtype of `x`.
    """
    wide = x.float()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
