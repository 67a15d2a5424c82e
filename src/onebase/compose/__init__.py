"""Composition: several adapters act as one, per call and per row.

    from onebase.compose import stack, combine

    base.predict(texts, adapter=[stack("fr", "sentiment"), "sentiment", None])
    base.add("mix", combine("a", "b", weights=[.7, .3], how="ties", density=.5))
    ob.train(base, "allocine.csv", method=stack("fr", "lora"), name="allocine")      # trained on top of a frozen one

A composition is a method whose parts are attached adapters. It has the task and head of its last part that has a head.
A stored one is a small file that names its parts by digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onebase.compose.recipes import Average, Combine, Composition, Fuse, Stack
from onebase.methods.method import Method

__all__ = ["Composition", "average", "combine", "fuse", "parse", "stack"]


def stack(*parts: str | Method) -> Composition:
    """Let adapters act one after the other at every site, such as a task adapter on a language adapter (MAD-X).

    Args:
        parts: names of adapters or compositions, in order; a method among them (``LoRA(rank=4)``) is trained on top
            while the others stay as they are.

    Source: Pfeiffer et al. 2020, MAD-X, arXiv 2005.00052.
    """
    return Stack(parts=_flat(parts))


def fuse(*parts: str | Method) -> Composition:
    """Attend over what bottlenecks give, with weights that are trained: AdapterFusion.

    Args:
        parts: names of adapters, bottlenecks without trained norms.

    Source: Pfeiffer et al. 2020, AdapterFusion, arXiv 2005.00247.
    """
    return Fuse(parts=parts)


def combine(
    *parts: str | Method,
    weights: Sequence[float] | Mapping[str, float] = (),
    how: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Composition:
    """Combine changes of linear maps (LoRA, DoRA, HiRA, VeRA, dense) into one.

    Args:
        parts: names of adapters.
        weights: one number per part, of its change, in their order or by name; 1 each by default.
        how: 'linear' (weighted sum), 'ties' (prune, elect signs, mean of those that agree), 'dare' (drop at random,
            rescale, sum), 'dare_ties', 'prune' (the largest values, sum).
        rank: keep the nearest LoRA of this rank (by SVD); None keeps the exact change: a LoRA whose rank is the sum of
            the parts' for a linear combination of LoRAs, a dense change otherwise.
        density: share of values kept by ties, dare, dare_ties and prune, .5 by default; others do not take it.
        seed: of what dare and dare_ties drop, 0 by default; others do not take it.
    """
    return Combine(parts=parts, weights=weights, how=how, rank=rank, density=density, seed=seed)  # type: ignore[arg-type]


def average(
    *parts: str | Method, weights: Sequence[float] | Mapping[str, float] = (), of: str = "outputs"
) -> Composition:
    """Average what adapters add at each site, or their values.

    Args:
        parts: names of adapters.
        weights: one number per part, in their order or by name; equal parts of 1 by default.
        of: 'outputs', for any adapters that change values; 'values', for adapters of one method and shape.
    """
    return Average(parts=parts, weights=weights, of=of)  # type: ignore[arg-type]


def _flat(parts: Sequence[str | Method]) -> tuple[str | Method, ...]:
    from onebase.methods.registry import parse_method

    flat: list[str | Method] = []
    for part in parts:
        if isinstance(part, Stack) and not part.held:
            flat += part.parts
        elif isinstance(part, str) and "(" in part:
            flat.append(parse_method(part))
        else:
            flat.append(part)
    return tuple(flat)


def parse(text: str) -> Composition:
    """Read a composition as it is written: ``combine(a@2, 'b-large', weights=[.7, .3], how='ties')``.

    Args:
        text: kind(part, ..., option=literal); a part is a reference (quoted where it has '-', '.' or '/'), or a
            composition.

    Raises:
        ConfigError: it is none.
        UnknownNameError: an unknown kind or option.
    """
    from onebase.compose.written import read

    return read(text)
