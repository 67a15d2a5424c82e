"""onebase: one frozen base model, many small adapters, of any method.

Importing this package imports neither torch nor transformers; names are resolved at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_WHERE = {
    "Base": "onebase.base",
    "Bottleneck": "onebase.methods.bottleneck",
    "Data": "onebase.data",
    "Job": "onebase.training",
    "LoRA": "onebase.methods.lora",
    "Method": "onebase.methods.method",
    "Prediction": "onebase.tasks",
    "Prefix": "onebase.methods.prefix",
    "Prompt": "onebase.methods.prompt",
    "Run": "onebase.training",
    "Store": "onebase.store",
    "compare": "onebase.comparison",
    "errors": "onebase.errors",
    "evaluate": "onebase.evaluation",
    "extend": "onebase.extend",
    "load_base": "onebase.loading",
    "load_data": "onebase.data",
    "parse_method": "onebase.methods.registry",
    "train": "onebase.training",
    "train_many": "onebase.training",
}

__all__ = [
    "Base",
    "Bottleneck",
    "Data",
    "Job",
    "LoRA",
    "Method",
    "Prediction",
    "Prefix",
    "Prompt",
    "Run",
    "Store",
    "compare",
    "errors",
    "evaluate",
    "extend",
    "load_base",
    "load_data",
    "parse_method",
    "train",
    "train_many",
]

if TYPE_CHECKING:
    from onebase import errors, extend
    from onebase.base import Base
    from onebase.comparison import compare
    from onebase.data import Data
    from onebase.data import load as load_data
    from onebase.evaluation import evaluate
    from onebase.loading import load_base
    from onebase.methods.bottleneck import Bottleneck
    from onebase.methods.lora import LoRA
    from onebase.methods.method import Method
    from onebase.methods.prefix import Prefix
    from onebase.methods.prompt import Prompt
    from onebase.methods.registry import parse_method
    from onebase.store import Store
    from onebase.tasks import Prediction
    from onebase.training import Job, Run, train, train_many


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'onebase' has no attribute {name!r}")
    module = importlib.import_module(_WHERE[name])
    if name in ("errors", "extend"):
        return module
    return getattr(module, "load" if name == "load_data" else name)


def __dir__() -> list[str]:
    return sorted(__all__)
