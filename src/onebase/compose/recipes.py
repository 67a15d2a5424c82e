"""What a composition is: how several adapters of one base act as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from onebase.compose.deltas import AverageDelta, Derived, Fused, FusionDelta, Held
from onebase.compose.weights import HOW, change, combine, joined, pieces
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.site import Site
from onebase.errors import ConfigError, UnsupportedError, unknown
from onebase.methods.dense import DenseDelta
from onebase.methods.lora import low_rank
from onebase.methods.method import Init, Method, check, plain_number
from onebase.methods.union import UnionModule

if TYPE_CHECKING:
    from onebase.adapter import Adapter

DENSITY = 0.5  # share of values that is kept by default
USED_BY = {"density": ("ties", "dare", "dare_ties", "prune"), "seed": ("dare", "dare_ties")}  # option -> how
NAME = "composed"  # of the method in a stored config


@dataclass(frozen=True, kw_only=True)
class Composition(Method):
    """Several adapters that act as one; see `stack`, `fuse`, `combine` and `average`.

    Attributes:
        parts: names of adapters, methods that are still to be trained (stack), or compositions.
        held: the adapters that the names mean on a base, in the order of `parts` without methods; () before
            a base is known.
    """

    name: ClassVar[str] = NAME
    kind: ClassVar[str]
    fewest: ClassVar[int] = 2

    parts: tuple[str | Method, ...]
    held: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        check(len(self.parts) >= self.fewest, f"{self.kind}: parts", list(self.parts), f"at least {self.fewest}")
        for part in self.parts:
            if not isinstance(part, str | Method):
                raise ConfigError(f"{self.kind}: {part!r} is no part: expected the name of an adapter or a composition")
            if isinstance(part, Method) and not isinstance(part, Composition):
                self._take_method(part)

    def _take_method(self, part: Method) -> None:
        raise ConfigError(
            f"{self.kind}: {part.shorthand()} is a method, not an adapter: only stack takes one, to train it on top"
        )

    @property
    def own(self) -> tuple[Method, ...]:
        """The methods that are trained with this composition."""
        return tuple(p for p in self.parts if isinstance(p, Method) and not isinstance(p, Composition))

    @property
    def trained(self) -> str | Method | None:
        """What a training run trains: a method, the name of its recipe, or None for nothing."""
        return self.own[-1] if self.own else None

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether its effect is a change of weights."""
        return bool(self.held) and all(m.mergeable for m in (*self.own, *(a.method for a in self.held)))

    def adapters(self) -> Iterator[Adapter]:
        """Yield every adapter that it is made of, those of compositions within it included."""
        for adapter in self.held:
            yield adapter
            if isinstance(adapter.method, Composition):
                yield from adapter.method.adapters()

    def lead(self) -> Adapter | None:
        """Return the part whose task and head it answers with: the last one that has a head, else the last one."""
        return next((a for a in reversed(self.held) if a.head is not None), self.held[-1] if self.held else None)

    def bound_to(self, held: Sequence[Adapter]) -> Self:
        """Return the composition of these adapters."""
        return replace(self, held=tuple(held))

    def vocabulary(self) -> tuple[str, ...]:
        """Return the words of the one part that has some.

        Raises:
            UnsupportedError: two parts have words of their own, whose ids would be the same.
        """
        found = [words for m in (*(a.method for a in self.held), *self.own) if (words := m.vocabulary())]
        if len(found) > 1:
            raise UnsupportedError(f"{self.shorthand()}: two parts have words of their own, which would share ids")
        return found[0] if found else ()

    def needs(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites of what is still to be trained."""
        return list(dict.fromkeys(site for method in self.own for site in method.needs(sites)))

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return all sites: each part has chosen its own, and methods choose again while they are built."""
        self.needs(sites)
        return list(sites)

    def _deltas(self) -> dict[str, list[tuple[int, Any]]]:
        """Return site name -> (number of the part, delta) of every part there."""
        if not self.held:
            raise ConfigError(f"{self.shorthand()} names adapters of a base: use it with base.add, base.use or train")
        found: dict[str, list[tuple[int, Any]]] = {}
        for number, adapter in enumerate(self.held):
            for site, delta in adapter.module.items():
                found.setdefault(site, []).append((number, delta))
        return found

    def _pointwise(self, found: Mapping[str, list[tuple[int, Any]]]) -> None:
        for site, deltas in found.items():
            for number, delta in deltas:
                if not isinstance(delta, Delta):
                    raise UnsupportedError(
                        f"{self.kind}: {self.held[number].name!r} has {type(delta).__name__} at {site}, which adds "
                        f"tokens or keys: {self.kind} takes changes of values (stack takes both)"
                    )

    def settings(self) -> dict[str, Any]:
        """Return kind, parts and options as JSON values; a stored part is named by its digest."""
        held, parts = iter(self.held), []
        for part in self.parts:
            if isinstance(part, Method) and not isinstance(part, Composition):
                parts.append({"method": {"name": part.name, "settings": part.settings()}})
                continue
            adapter = next(held, None)
            if isinstance(part, Composition):
                bound = part if adapter is None else adapter.method
                parts.append({"composition": bound.settings()})
            else:
                facts = {} if adapter is None else {"ref": adapter.ref, "digest": adapter.digest}
                parts.append({"adapter": part, **facts})
        return {"kind": self.kind, "parts": parts, **self.options()}

    def options(self) -> dict[str, Any]:
        """Return what is set beside the parts, as JSON values."""
        return {}

    def shorthand(self) -> str:
        """Return ``kind(part, ..., option=value)``."""
        words = [p if isinstance(p, str) else p.shorthand() for p in self.parts]
        words += [f"{key}={value!r}" for key, value in self.options().items() if value is not None]
        return f"{self.kind}({', '.join(words)})"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Refuse: the parts are adapters of a base, so only a store and a base together can read these settings."""
        raise ConfigError("a composition names its parts: load it onto a base with base.load")


@dataclass(frozen=True, kw_only=True)
class Stack(Composition):
    """Parts one after the other at every site, in written order."""

    kind: ClassVar[str] = "stack"

    def _take_method(self, part: Method) -> None:
        """Take any method."""

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Refer to the deltas of adapters, and build those that are to be trained."""
        self._deltas()
        held, modules = iter(self.held), []
        for part in self.parts:
            if isinstance(part, Method) and not isinstance(part, Composition):
                modules.append(part.build(part.select(sites), init))
            else:
                modules.append(Held(next(held)))
        union = UnionModule(modules)
        list(union.items())  # deltas that cannot share a site raise here
        return union


@dataclass(frozen=True, kw_only=True)
class Fuse(Composition):
    """AdapterFusion (arXiv 2005.00247): trained attention over what the parts give at each exit site."""

    kind: ClassVar[str] = "fuse"

    @property
    def trained(self) -> str | Method | None:
        """Its own recipe."""
        return self.kind

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Never: what it adds depends on the token."""
        return False

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build the attention at every site of the parts.

        Raises:
            UnsupportedError: a part changes something else than what leaves a sub-layer.
        """
        found, by_name = self._deltas(), {site.name: site for site in sites}
        self._pointwise(found)
        for site, deltas in found.items():
            if by_name[site].kind != "exit":
                raise UnsupportedError(
                    f"fuse: {self.held[deltas[0][0]].name!r} changes {site}; AdapterFusion is over bottlenecks without "
                    "trained norms, e.g. bottleneck(preset='pfeiffer')"
                )
        return Fused(
            {name: FusionDelta([d for _, d in deltas], by_name[name].d_out, init.generator)
             for name, deltas in found.items()}
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Weighted(Composition):
    """A composition with one weight per part."""

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self._numbers() or self._default()
        check(len(weights) == len(self.parts), f"{self.kind}: weights", list(weights), f"{len(self.parts)} numbers")
        for weight in weights:
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            check(number and abs(weight) < float("inf"), f"{self.kind}: weights", list(weights), "finite numbers")
        object.__setattr__(self, "weights", tuple(float(w) for w in weights))  # the dataclass is frozen

    def _numbers(self) -> tuple[Any, ...]:
        """Return the weights in the order of the parts: of a list, an array, or a mapping by part."""
        given: Any = self.weights
        if isinstance(given, Mapping):
            names = [part if isinstance(part, str) else part.shorthand() for part in self.parts]
            check(len(given) == len(set(names)) == len(names) and set(given) == set(names), f"{self.kind}: weights",
                  dict(given), f"a number for each of {', '.join(names)}")  # fmt: skip
            return tuple(plain_number(given[name]) for name in names)
        given = given.tolist() if hasattr(given, "tolist") else given  # an array or a tensor
        listed = isinstance(given, Iterable) and not isinstance(given, str | bytes | set | frozenset)
        check(listed, f"{self.kind}: weights", given, "a list of numbers, or a mapping by part")
        return tuple(plain_number(weight) for weight in given)

    def _default(self) -> tuple[float, ...]:
        return (1.0 / len(self.parts),) * len(self.parts)

    def options(self) -> dict[str, Any]:
        """Return the weights."""
        return {"weights": list(self.weights)}


@dataclass(frozen=True, kw_only=True)
class Average(_Weighted):
    """A weighted average: of what the parts add at each site, or of their values (`of`)."""

    kind: ClassVar[str] = "average"

    of: str = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("outputs", "values"):
            raise unknown("average.of", self.of, ("outputs", "values"))

    def options(self) -> dict[str, Any]:
        """Return weights and what is averaged."""
        return {**super().options(), "of": self.of}

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build the averages."""
        found = self._deltas()
        if self.of == "values":
            return self._values()
        self._pointwise(found)
        return Derived(
            {site: AverageDelta([d for _, d in deltas], [self.weights[n] for n, _ in deltas])
             for site, deltas in found.items()}
        )  # fmt: skip

    def _values(self) -> AdapterModule:
        """Average the values of adapters of one method."""
        import copy

        from onebase.adapter import problems

        first = self.held[0]
        for other in self.held[1:]:
            if other.method != first.method:
                raise UnsupportedError(
                    f"average(of='values'): {first.name!r} is {first.method.shorthand()} and {other.name!r} is "
                    f"{other.method.shorthand()}; values are averaged between adapters of one method, of='outputs' "
                    "between any"
                )
        modules = [adapter.module.fold() for adapter in self.held]
        tensors = [module.tensors() for module in modules]
        for other, own in zip(self.held[1:], tensors[1:]):
            if wrong := problems(tensors[0], own):
                raise UnsupportedError(
                    f"average: {other.name!r} does not fit {first.name!r}:\n  - " + "\n  - ".join(wrong)
                )
        mixed = copy.deepcopy(modules[0])
        mean = {}
        for key, value in tensors[0].items():
            if value.is_floating_point():
                mean[key] = sum(w * own[key].detach() for w, own in zip(self.weights, tensors))
            elif all(torch.equal(value, own[key]) for own in tensors[1:]):
                mean[key] = value
            else:
                raise UnsupportedError(f"average(of='values'): {key} counts or names something, and differs")
        mixed.put(mean)
        return Derived(dict(mixed.items()))


@dataclass(frozen=True, kw_only=True)
class Combine(_Weighted):
    """A weighted combination of changes of linear maps."""

    kind: ClassVar[str] = "combine"

    how: str = "linear"
    rank: int | None = None
    density: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in HOW:
            raise unknown("combine.how", self.how, HOW)
        for name, default in (("rank", None), ("density", DENSITY), ("seed", 0)):
            value, used = plain_number(getattr(self, name)), USED_BY.get(name, HOW)
            if value is not None and self.how not in used:
                raise ConfigError(
                    f"combine.{name} = {value!r} has no effect with how={self.how!r}, only with {', '.join(used)}: "
                    "leave it out, or choose one of these"
                )
            if value is None and self.how in used:
                value = default
            object.__setattr__(self, name, value)  # the dataclass is frozen
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        check(self.rank is None or whole, "combine.rank", self.rank, "an integer of at least 1, or None")
        if self.density is not None:
            fits = type(self.density) in (int, float) and 0 < self.density <= 1
            check(fits, "combine.density", self.density, "more than 0, at most 1")
        if self.seed is not None:
            fits = type(self.seed) is int and 0 <= self.seed < 2**63
            check(fits, "combine.seed", self.seed, "an integer of at least 0")

    def _default(self) -> tuple[float, ...]:
        return (1.0,) * len(self.parts)

    def options(self) -> dict[str, Any]:
        """Return weights and those settings that have an effect."""
        found = {**super().options(), "how": self.how, "rank": self.rank}
        return found | {name: getattr(self, name) for name, used in USED_BY.items() if self.how in used}

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Compute the combination at every site of any part; a part without that site changes nothing there."""
        found, by_name = self._deltas(), {site.name: site for site in sites}
        self._pointwise(found)
        generator = torch.Generator().manual_seed(self.seed or 0)
        deltas: dict[str, Delta] = {}
        facts = {"error": 0.0}
        with torch.no_grad():
            for name in sorted(found):
                deltas[name] = self._at(by_name[name], found[name], generator, facts)
        return Derived(deltas, {} if self.rank is None else facts)

    def _at(
        self, site: Site, own: list[tuple[int, Delta]], generator: torch.Generator, facts: dict[str, float]
    ) -> Delta:
        lists = [pieces(delta) for _, delta in own]
        if self.how == "linear" and self.rank is None and None not in lists and site.kind == "linear":
            flat = [(one, self.weights[number]) for (number, _), many in zip(own, lists) for one in many or ()]
            return joined([delta for delta, _ in flat], [weight for _, weight in flat])
        changes = {number: change(site, delta) for number, delta in own}
        like = next(iter(changes.values()))[0]
        every = [changes[i][0] if i in changes else torch.zeros_like(like) for i in range(len(self.held))]
        mixed = combine(every, self.weights, self.how, self.density or DENSITY, generator)
        if all(bias is None for _, bias in changes.values()):
            bias = None
        else:
            given = [changes[i][1] if i in changes else None for i in range(len(self.held))]
            bias = combine(
                [like.new_zeros(site.d_out) if b is None else b for b in given],
                self.weights, self.how, self.density or DENSITY, generator,
            )  # fmt: skip
        if self.rank is None:
            return DenseDelta(mixed, bias)
        if bias is not None:
            raise UnsupportedError(
                f"combine: a part changes the bias at {site.name}, which no LoRA holds: leave rank out"
            )
        delta, error = low_rank(mixed, self.rank)
        facts["error"] = max(facts["error"], error)
        return delta


KINDS: dict[str, type[Composition]] = {c.kind: c for c in (Stack, Fuse, Average, Combine)}
