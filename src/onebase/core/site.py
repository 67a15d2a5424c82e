"""Places in a base: sites, stacks and where their tensors are captured. Pure description plus read-only access."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.offload import device_of, resident
from onebase.core.quantized import dequantized, kind_of
from onebase.errors import UnsupportedError

SiteKind = Literal["linear", "input", "exit", "norm", "block", "kv", "embeddings", "embedded", "tokens"]
TOKENS: tuple[SiteKind, ...] = ("embeddings", "embedded", "tokens")  # kinds that change what layers are given


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


@dataclass(frozen=True)
class Groupwise:
    """A method of a module that calls tapped projections on inputs that have no batch rows.

    Attributes:
        path: module path.
        method: name of the method.
        rows: how many of its first arguments are row-major, (B * k, ...), as its result is.
    """

    path: str
    method: str
    rows: int


@dataclass(frozen=True, eq=False)
class Site:
    """A named place in the base. Read-only: `weight` and `bias` are copies or views that nobody may change.

    Attributes:
        name: e.g. ``encoder/3/attention/q``.
        kind: linear output, linear input, sub-layer exit, norm output, block output, attention keys and values,
            embeddings (virtual tokens), embedded (virtual tokens behind positions and norms), tokens (embeddings of
            single ids).
        stack, layer, sublayer, part: the components of the name ('' and -1 where they do not apply).
        path: module path from the model's root; the tap hooks this module's output, or its input.
        d_in, d_out: features of the module's input and of the value at the site.
        span: features of the module's output that belong to this site, for fused projections: (start, stop).
        index: the same where they do not lie side by side (q, k and v interleaved per head): (d_out,) feature numbers
            in the order of this part's own features. A site has a span or an index, never both.
        heads, head_dim: of keys and values, for 'kv' sites.
        groupwise: a computation that calls this site's module on inputs without batch rows, or None.
        unsupported: why nothing can be tapped here; adding an adapter that needs this site raises with it.
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
    index: Tensor | None = field(repr=False, default=None)
    residual: Ref | None = None
    norm: NormInfo | None = None
    heads: int = 0
    head_dim: int = 0
    groupwise: Groupwise | None = None
    unsupported: str | None = None
    cancels: bool = False
    _moved: dict[torch.device, Tensor] = field(repr=False, default_factory=dict)  # `index` by device

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """Return the same site: a copy of an adapter stays on the base, which is not copied."""
        return self

    @property
    def is_part(self) -> bool:
        """Whether the module's output holds more than this site."""
        return self.span is not None or self.index is not None

    def take(self, values: Tensor, dim: int = -1) -> Tensor:
        """Return this site's features of the module's output along `dim`: a view of a span, a copy of an index.

        Args:
            values: the whole output, or a tensor that has its features along `dim`.
            dim: of the features; `d_out` of them are returned.
        """
        if self.span is not None:
            return values.narrow(dim, self.span[0], self.span[1] - self.span[0])
        return values if self.index is None else values.index_select(dim, self._index_on(values.device))

    def put(self, values: Tensor, part: Tensor) -> None:
        """Write this site's features into the module's whole output, in place.

        Args:
            values: (..., features of the module).
            part: (..., d_out).
        """
        if self.span is not None:
            values[..., self.span[0] : self.span[1]] = part
        elif self.index is not None:
            values.index_copy_(-1, self._index_on(values.device), part)
        else:
            values.copy_(part)

    def _index_on(self, device: torch.device) -> Tensor:
        assert self.index is not None
        if self.index.device == device:
            return self.index
        if device not in self._moved:  # a copy per call would wait for the device
            self._moved[device] = self.index.to(device)
        return self._moved[device]

    def weight(self) -> Tensor:
        """Return W, (d_out, d_in), detached, dequantized where the base is quantized, of this site's features only.

        A view where the features lie side by side, a copy where they are interleaved.

        Raises:
            UnsupportedError: the tensor is not resident (offloaded) or is no matrix.
        """
        weight = self._tensor("weight")
        if weight.dim() == 2 and _is_conv1d(self.module):
            weight = weight.t()  # transformers' Conv1D stores (in, out)
        return self.take(weight, 0)

    def bias(self) -> Tensor | None:
        """Return the bias (d_out,) of this site's features, detached, or None."""
        return None if getattr(self.module, "bias", None) is None else self.take(self._tensor("bias"), 0)

    def _tensor(self, name: str) -> Tensor:
        tensor = getattr(self.module, name, None)
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(f"site {self.name}: {type(self.module).__name__} has no {name}")
        if tensor.is_meta:
            kept = resident(self.module, name)
            if kept is None:
                raise UnsupportedError(
                    f"site {self.name}: its {name} is offloaded (on the meta device); load the base without offload "
                    "or use a method that does not read W"
                )
            return kept.to(device_of(self.module))
        if not kind_of(tensor):
            tensor = tensor.detach()
            if hasattr(tensor, "full_tensor"):  # split over processes, all of which ask for it now
                tensor = tensor.full_tensor()  # type: ignore[operator]
            return tensor
        return dequantized(self.module, tensor)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of layers that is called as one module: an encoder, a decoder or the only backbone.

    Attributes:
        name: 'encoder' or 'decoder'.
        path: module path from the model's root ('' is the model itself).
        causal: tokens see only earlier tokens.
        embed: the token embedding module; where images are read, the one that embeds patches.
        embedded: module that makes embedded tokens into what the layers read (positions, types, norm), where the stack
            has one, or None.
        placed: `embedded` adds the positions; where attention turns by them instead, what stands behind it has its own.
        width: D of an embedded token, and so of a virtual one.
        hidden: D of the states that the stack returns.
        position_start: first position id, or None where positions need not be counted.
        position_limit: number of positions that exist, or None where there is no limit.
        positions: learned position embedding that counts columns because the stack takes no `position_ids`, or None.
        position_offset: row of that embedding's weight that holds position 0.
        feeds: name of the stack whose cross-attention reads this one's states, or ''.
        pooler: module that reads the first token inside the stack, or None.
        pooled: module whose output the pooler gets only the first token of, None where it is called with all states.
        patches: module that makes tokens of images, positions included, or None.
        count: images (B, C, H, W) -> T, where there is `patches`.
        before: tokens that stay in front of virtual tokens.
        layers: the layer modules, for gradient checkpointing.
        layer_dropout: attributes of a layer object (or of its config) with dropout rates that it applies itself.
        padding: 'left' or 'right' -> why rows cannot be padded on that side.
        packs: everything in the stack but attention is pointwise, and positions can be given: rows can be packed.
        trunk: layers take nothing but what is known by name: rows can become more between two of them.
    """

    name: str
    path: str
    module: Any = field(repr=False)
    causal: bool = False
    embed: Any = field(repr=False, default_factory=nn.Identity)
    embedded: nn.Module | None = field(repr=False, default=None)
    placed: bool = False
    width: int = 0
    hidden: int = 0
    position_start: int | None = 0
    position_limit: int | None = None
    positions: nn.Module | None = field(repr=False, default=None)
    position_offset: int = 0
    feeds: str = ""
    pooler: nn.Module | None = field(repr=False, default=None)
    pooled: nn.Module | None = field(repr=False, default=None)
    patches: nn.Module | None = field(repr=False, default=None)
    count: Callable[[Tensor], int] | None = field(repr=False, default=None)
    before: int = 0
    layers: tuple[nn.Module, ...] = field(repr=False, default=())
    layer_dropout: tuple[str, ...] = ()
    padding: Mapping[str, str] = field(default_factory=dict)
    packs: bool = False
    trunk: bool = False


def standardize(x: Tensor, norm: NormInfo) -> Tensor:
    """Return n(x), the norm without its gain and bias, computed in float32.

    Args:
        x: (..., d) the norm's input.
        norm: kind and epsilon.

    Returns:
        (..., d) in the dtype of `x`.
    """
    shape = x.shape[-1:]
    if norm.kind == "layer":
        return F.layer_norm(x, shape, eps=norm.eps).to(x.dtype)  # computes in float32 inside, one pass
    return F.rms_norm(x.float(), shape, eps=norm.eps).to(x.dtype)
