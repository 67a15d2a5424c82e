"""Calls of a stack's `forward` by itself: hooks hang on the call of a module, so they would be skipped without a word.

Some libraries call `model.forward(...)` where torch expects `model(...)`; sentence-transformers does. An anchored stack
therefore has a `forward` of its own, which sends such a call through the hooks. Calls that come from the hooks carry a
mark, so nothing is remembered between calls, and a compiler sees plain code.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


class DirectCalls:
    """The `forward` of one anchored module.

    Args:
        module: the stack; its own `forward`, or what another library put in its place, is called in the end.

    Attributes:
        mark: a keyword of calls that went through the anchor; one of its own, as a model may have two bases.
    """

    def __init__(self, module: nn.Module):
        self.module, self.open, self.mark = module, True, f"_onebase_hooked_{id(self):x}"
        self.before = module.__dict__.get("forward")
        own, calls = module.forward, self

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hooked = kwargs.pop(calls.mark, False) or not calls.open
            return own(*args, **kwargs) if hooked else self(*args, **kwargs)

        self.method = types.MethodType(forward, module)
        module.__dict__["forward"] = self.method

    def remove(self) -> None:
        """Give the module its `forward` back, unless another library has put one in front of this meanwhile."""
        self.open = False
        if self.module.__dict__.get("forward") is not self.method:
            return
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before
