"""A model under examination: runs small passes of random tokens, watches tensors by module, and changes them.

Passes are in evaluation mode with eager attention, which are put back as they were. Nothing of the model is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.anatomy.attention import own_function
from onebase.core.offload import device_of
from onebase.core.site import Ref
from onebase.errors import UnsupportedError

ROWS, TOKENS, DECODED = 3, 7, 6  # of a probe: small, odd and unlike any width, so that shapes tell dimensions apart
NAME = "onebase:probe"
FIRST = 4  # ids below are special in most vocabularies

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Attended:
    """One call of the attention function: its module, and what reached it, (B, H, T, head dim) each."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor


class Probe:
    """Runs one model.

    Args:
        model: any transformers model that reads token ids.

    Raises:
        UnsupportedError: the model has no token embedding.
    """

    def __init__(self, model: Any):
        self.model, self.backbone = model, model.base_model
        modules = dict(model.named_modules(remove_duplicate=False))
        self.prefix = next(name for name, module in modules.items() if module is self.backbone)
        self.paths: dict[nn.Module, str] = {}
        for path, module in modules.items():
            self.paths.setdefault(module, path)
        self.names = set(inspect.signature(self.backbone.forward).parameters)
        self.attended: list[Attended] = []
        try:
            embed = model.get_input_embeddings()
            vocabulary = int(embed.weight.shape[0])
        except (AttributeError, NotImplementedError, TypeError):
            raise UnsupportedError(f"{type(model).__name__} has no token embedding") from None
        self.device, self.dtype = device_of(embed), embed.weight.dtype
        self.ids, self.decoder_ids = self._draw(vocabulary)

    @property
    def tolerance(self) -> float:
        """Largest difference of two results that count as equal, relative to the largest value: 1e-5 in float32."""
        return max(1e-5, 8 * torch.finfo(self.dtype).eps)

    def _draw(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Draw ordinary token ids, each once where the vocabulary is large enough."""
        special: set[int] = set()
        for config in (self.model.config, getattr(self.model.config, "text_config", None)):
            for key, value in vars(config).items() if config is not None else ():
                if "token" in key and isinstance(value, int):
                    special.add(value)
        ordinary = [i for i in range(min(FIRST, vocabulary - 1), vocabulary) if i not in special]
        need = ROWS * (TOKENS + DECODED)
        order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(0))
        picked = torch.tensor(ordinary)[order[torch.arange(need) % len(ordinary)]].to(self.device)
        return picked[: ROWS * TOKENS].view(ROWS, TOKENS), picked[ROWS * TOKENS :].view(ROWS, DECODED)

    def gap(self, one: Tensor, other: Tensor) -> float:
        """Return the largest difference, relative to the largest value; infinite where shapes differ."""
        if one.shape != other.shape or not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
            return float("inf")
        if not one.numel():
            return 0.0
        return float((one.double() - other.double()).abs().max() / max(1.0, float(other.abs().max())))

    def equal(self, one: Tensor, other: Tensor) -> bool:
        """Whether two results are the same up to rounding."""
        return self.gap(one, other) <= self.tolerance

    # -- passes --------------------------------------------------------------------------------------------------

    def inputs(
        self, ids: Tensor | None = None, mask: Tensor | None = None, decoder: Tensor | None = None
    ) -> dict[str, Any]:
        """Return the inputs of a plain pass."""
        ids = self.ids if ids is None else ids
        call: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self.names:
            call["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        if "decoder_input_ids" in self.names and getattr(self.model.config, "is_encoder_decoder", False):
            call["decoder_input_ids"] = self.decoder_ids[: len(ids)] if decoder is None else decoder
        if "use_cache" in self.names:
            call["use_cache"] = False
        return call

    def run(
        self,
        watch: Iterable[Ref] = (),
        edits: Mapping[Ref, Edit] | None = None,
        call: Mapping[str, Any] | None = None,
        module: nn.Module | None = None,
    ) -> dict[Ref, Tensor]:
        """Run one pass and return what was watched, after the edits, as copies.

        Args:
            watch: places.
            edits: place -> function of the tensor there.
            call: inputs; those of a plain pass otherwise.
            module: what to call; the backbone by default.

        Raises:
            UnsupportedError: the pass failed.
        """
        found: dict[Ref, Tensor] = {}
        places: dict[Ref, Edit | None] = {**dict.fromkeys(watch), **(edits or {})}
        with ExitStack() as stack, torch.no_grad():
            for ref, edit in places.items():
                stack.enter_context(hooked(self.model.get_submodule(ref.path), ref, edit, found))
            self.call(call, module)
        return found

    def call(self, call: Mapping[str, Any] | None = None, module: nn.Module | None = None) -> Any:
        """Run one pass under the caller's hooks; return the output."""
        self.attended = []
        try:
            return (module or self.backbone)(**(self.inputs() if call is None else call))
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise UnsupportedError(
                f"{type(self.backbone).__name__} cannot run a plain pass of token ids: {type(error).__name__}: {first}"
            ) from error

    @contextmanager
    def examined(self) -> Iterator[Probe]:
        """Evaluate, with attention that reports what it gets, and put everything back."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def function(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
            self.attended.append(Attended(module, query, key, value))
            return own_function(module)(module, query, key, value, *args, **kw)

        ALL_ATTENTION_FUNCTIONS.register(NAME, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        configs = {id(c): c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None}
        before = [(c, s) for c in configs.values() if (s := getattr(c, "_attn_implementation", None)) is not None]
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            for config, _ in before:
                config._attn_implementation_internal = NAME
            self.model.eval()
            yield self
        finally:
            for config, name in before:
                config._attn_implementation_internal = name
            for module, mode in modes:
                module.training = mode
            self.attended = []
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)


def first(output: Any) -> Any:
    """Return the first value of a module's output."""
    return output[0] if isinstance(output, tuple) and output else output


def named(ref: Ref, args: tuple, kwargs: Mapping[str, Any]) -> int | str:
    """Return the position or keyword of an input, as `core.tap.first_tensor` reads it."""
    return ref.index if (ref.index or 0) < len(args) else ("hidden_states" if ref.index == 0 else "input_tensor")  # type: ignore[return-value]


@contextmanager
def hooked(module: nn.Module, ref: Ref, edit: Edit | None, found: dict[Ref, Tensor]) -> Iterator[None]:
    """Watch one place of a module, and change it where there is an edit."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        key = named(ref, args, kwargs)
        value = args[key] if isinstance(key, int) else kwargs[key]
        new = value if edit is None else edit(value)
        found[ref] = new.detach().clone()
        if new is value:
            return None
        if isinstance(key, int):
            return (*args[:key], new, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: new}

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        value = first(output)
        new = value if edit is None else edit(value)
        found[ref] = new.detach().clone()
        if new is value:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if ref.index is None:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
