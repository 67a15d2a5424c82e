"""The methods under test: every registered one, with several settings where the suite knows some."""

from __future__ import annotations

from typing import Any

from families import TEXTS

from onebase.methods import all_methods
from onebase.methods.method import Method

# Words of the tokenizer under test, most of what it knows: a drawn row has several of them.
WORDS = tuple(dict.fromkeys(word for text in TEXTS[:4] for word in text.split()))

# A method that is not listed here is tested with its defaults; nothing else has to change for a new method.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adalora": ({"rank": 3, "target": 2}, {"rank": 2, "target": 1, "sites": "paper", "orthogonal": 0.0}),
    "bitfit": ({"create": True}, {"sites": ["q", "up"], "norms": False, "create": True}),
    "bottleneck": (
        {},
        {"preset": "pfeiffer", "size": 3, "activation": "relu"},
        {"preset": "parallel"},
        {"preset": "houlsby", "size": {1: 4}, "norms": False},
        {"preset": "pfeiffer", "leave_out": [0], "norms": True, "activation": "tanh"},
        {"preset": "pfeiffer", "size": 3, "reads": "sum"},
    ),
    "dense": ({}, {"sites": "paper", "bias": True}),
    "dora": ({}, {"rank": 2, "sites": "paper", "ranks": {"q": 3}, "rslora": True}),
    "hira": ({"rank": 2, "scale": 8.0}, {"rank": 3, "scale": 8.0, "sites": ["q", "v", "down"]}),
    "ia3": ({}, {"sites": ["hidden", "q", "up"]}),
    "layernorm": ({}, {"sublayers": ["mlp"], "bias": False}),
    "lora": (
        {},
        {"rank": 1, "sites": "paper"},
        {"rank": 3, "rslora": True, "ranks": {"q": 5}, "alphas": {"re:mlp": 4.0}},
        {"rank": 2, "sites": ["up", "down"]},
    ),
    "loreft": ({"rank": 2, "first": 2, "last": 1}, {"rank": 3, "first": 0, "last": 2, "layers": [-1]}),
    "mam": ({"length": 3},),
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
        {"length": 3, "place": "embedded", "leads": True},
        {"length": 2, "init": "uniform", "mlp": 4, "place": "embedded", "behind": 1},
        {"length": 2, "init": "vocabulary", "behind": 1},
    ),
    "tokens": ({"words": WORDS},),
    "union": (
        {"parts": ["prompt(length=2)", "lora(rank=2)", "dora(rank=1)", "loreft(rank=1, last=1)", "ia3"]},
        {"parts": ["prefix(length=2)", "prefix(length=1, init='random')", "prompt(length=1)", "prompt(length=2)"]},
        {"parts": ["prompt(length=2, behind=1)", "prompt(length=1, behind=1)", "loreft(rank=2, first=2, last=1)"]},
    ),
    "vera": ({"rank": 4, "d_init": 1.0}, {"rank": 8, "sites": ["v", "down"], "stored": True, "d_init": 2.0}),
}


def variants(name: str) -> dict[str, Method]:
    """Return label -> method for every setting under test of the method `name`."""
    cls = all_methods()[name]
    return {f"{name}-{i}": cls.from_settings(s) for i, s in enumerate(SETTINGS.get(name, ({},)))}


def every() -> dict[str, Method]:
    """Return label -> method for every registered method and setting."""
    return {label: method for name in all_methods() for label, method in variants(name).items()}
