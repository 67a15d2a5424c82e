"""The methods under test: every registered one, with several settings where the suite knows some."""

from __future__ import annotations

from typing import Any

from onebase.methods import all_methods
from onebase.methods.method import Method

# A method that is not listed here is tested with its defaults; nothing else has to change for a new method.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {},
        {"rank": 1, "sites": "paper"},
        {"rank": 3, "rslora": True, "ranks": {"q": 5}, "alphas": {"re:mlp": 4.0}},
        {"rank": 2, "sites": ["up", "down"]},
    ),
    "bottleneck": (
        {},
        {"preset": "pfeiffer", "size": 3, "activation": "relu"},
        {"preset": "parallel"},
        {"preset": "houlsby", "size": {1: 4}, "norms": False},
        {"preset": "pfeiffer", "leave_out": [0], "norms": True, "activation": "tanh"},
    ),
    "prefix": (
        {"length": 3, "init": "random"},
        {"length": 5, "text": "the cold river"},
        {"length": 2, "mlp": 6},
        {"length": 7, "cross": False},
    ),
    "prompt": (
        {"length": 2, "init": "uniform"},
        {"length": 5, "init": "text", "text": "the old bridge"},
        {"length": 3, "init": "vocabulary", "mlp": 6},
        {"length": 4},
    ),
}


def variants(name: str) -> dict[str, Method]:
    """Return label -> method for every setting under test of the method `name`."""
    cls = all_methods()[name]
    return {f"{name}-{i}": cls.from_settings(s) for i, s in enumerate(SETTINGS.get(name, ({},)))}


def every() -> dict[str, Method]:
    """Return label -> method for every registered method and setting."""
    return {label: method for name in all_methods() for label, method in variants(name).items()}
