"""Building the adapter that stored settings describe, when the settings may be damaged or hostile.

A digest only says that a folder is as somebody sealed it. Settings that no onebase would write must end in an error
that names them, not in a traceback or in an allocation of whatever size they ask for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onebase.adapter import Adapter, problems
from onebase.build import build_adapter, placed
from onebase.compose.kept import rebuilt
from onebase.compose.recipes import NAME as COMPOSED
from onebase.errors import CorruptError, OnebaseError
from onebase.methods.registry import parse_method
from onebase.tasks import get_task

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store, Stored

# aten operations that make a tensor of a stated size
FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "randint", "new_empty", "new_zeros", "new_ones"}
SLACK = 2**26  # values: 256 MiB of float32, for what methods draw and do not store, such as VeRA's projections


class _Ceiling(TorchDispatchMode):
    """Refuses single tensors of more than `most` values, before they are allocated."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in FACTORIES:
            for value in args:
                if isinstance(value, list | tuple) and math.prod(value) > self.most:
                    raise ValueError(f"they ask for a tensor of shape {list(value)}")
        return func(*args, **(kwargs or {}))


@contextmanager
def explained(stored: Stored, what: str) -> Iterator[None]:
    """Turn what stored settings make fail unexpectedly into a CorruptError that shows them; `what` they are."""
    try:
        yield
    except OnebaseError as error:
        raise type(error)(f"{stored.ref} ({what} of its config): {error}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        config = stored.config
        raise CorruptError(
            f"{stored.ref}: {what} of its config cannot be used ({type(error).__name__}: {_short(error)}). "
            f"method {_short(config.method.model_dump())}, task {_short(config.task)}. Restore the folder from a copy."
        ) from error


def rebuild(
    base: Base, name: str, stored: Stored, tensors: Mapping[str, Tensor], store: Store | None = None
) -> Adapter:
    """Build an adapter from its stored settings and put its tensors in.

    Args:
        base: what it goes on; checked to be the one it was made for.
        name: of the adapter here.
        stored: where it comes from.
        tensors: verified; the task of its config is, too.
        store: where the parts of a composition are; the default store otherwise.

    Raises:
        CorruptError: settings that cannot be used, or tensors that do not fit them.
        OnebaseError: the method or task is unknown here, or refuses its settings.
    """
    own = sum(p.numel() for p in base.model.parameters()) + sum(t.numel() for t in tensors.values())
    task = dict(stored.config.task)
    with explained(stored, "method or task"):
        with _Ceiling(own + SLACK):
            if stored.config.method.name == COMPOSED:
                own_head = any(key.startswith("head.") for key in tensors)
                adapter = rebuilt(base, name, stored, store or default_store(), own_head)
            else:
                method = parse_method(stored.config.method.model_dump(mode="json"))
                adapter = build_adapter(base, name, method, task, 0, empty=True)
            shapes = {
                k.removeprefix("base_head."): tuple(t.shape) for k, t in tensors.items() if k.startswith("base_head.")
            }
            if shapes:
                head = get_task(task["kind"]).own_head(task, base.anatomy.hidden_size, shapes)
                adapter.base_head = placed(base, head if head is None else head.requires_grad_(False))
            adapter.module.fit({key: tensor.shape for key, tensor in tensors.items()})
        adapter.bind()
    expected = adapter.tensors()
    wrong = problems(expected, tensors)
    wrong += [
        f"{key}: dtype {tensor.dtype}, expected {expected[key].dtype}"
        for key, tensor in sorted(tensors.items())
        if key in expected and tensor.dtype.is_floating_point != expected[key].dtype.is_floating_point
    ]
    if wrong:
        raise CorruptError(
            f"{stored.ref} does not fit {adapter.method.name} on this base:\n  - " + "\n  - ".join(wrong)
        )
    adapter.put(tensors)
    return adapter


def default_store() -> Store:
    """Return the store of this user."""
    from onebase.store import Store

    return Store()


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 300 else text[:297] + "..."
