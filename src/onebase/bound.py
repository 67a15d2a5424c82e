"""Bound calls: a callable that carries its route into any thread, executor or task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onebase.base import AdapterNames, Base, Prediction


class Bound:
    """A function under a route. The route is entered in whatever thread makes the call.

    Args:
        base: the base.
        adapter: one name, or one per row.
        function: what to call; the model by default.
    """

    def __init__(self, base: Base, adapter: AdapterNames, function: Callable[..., Any] | None = None):
        self.base, self.adapter, self.function = base, adapter, function or base.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function under the route."""
        with self.base.use(self.adapter):
            return self.function(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own `generate` under the route: for streamers and code that expects transformers' API."""
        config = kwargs.get("generation_config") or self.base.model.generation_config

        def setting(name: str) -> int:
            return int(kwargs.get(name) or getattr(config, name, None) or 1)

        repeat = max(setting("num_beams"), setting("num_return_sequences"))
        mask = kwargs.get("attention_mask")
        prompts = None if mask is None or mask.dim() != 2 else mask.sum(1).tolist()
        route = self.base.use(self.adapter, repeat=repeat, prompts=prompts)
        with self.base._installed.without_checkpointing(), route:
            return self.base.model.generate(*args, **kwargs)

    def predict(self, texts: Any, **settings: Any) -> list[Prediction]:
        """Call `Base.predict` with the bound adapter."""
        return self.base.predict(texts, self.adapter, **settings)
