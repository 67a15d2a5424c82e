"""Unions: several methods in one adapter, in written order: ``prefix(length=30) + bottleneck(preset='parallel')``.

After: He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366.
Formula: deltas of one site are applied in written order, each to what the one before made of h: h' = f2(x, f1(x, h)); x
    is the same for all. Prefixes of one attention module, and virtual tokens, stand side by side in written order.
Parameters: the sum of the parts'.
Start: each part's own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from onebase.core.bank import Bank, key_of
from onebase.core.contracts import AdapterModule, Delta, KVDelta, PromptDelta, SiteDelta, TokenDelta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.errors import ConfigError, unknown
from onebase.methods.method import Init, Method, check
from onebase.methods.registry import parse_method, register


class ChainedDelta(Delta):
    """Deltas of one site, one after the other. Their parameters belong to the parts of the union."""

    def __init__(self, deltas: Sequence[Delta]):
        super().__init__()
        self.chain = tuple(deltas)  # a tuple registers nothing
        self.reads_positions = any(delta.positional for delta in deltas)

    @property
    def positional(self) -> bool:  # type: ignore[override]
        """Whether one of them reads positions."""
        return self.reads_positions

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Apply them in order."""
        for delta in self.chain:
            h = delta(x, h, at)
        return h

    def signature(self) -> Hashable | None:
        """Return those of the parts, where all of them have one."""
        keys = tuple(key_of(delta) for delta in self.chain)
        return None if None in keys else keys

    def dropping(self) -> float:
        """Return the largest rate among the parts; each has its own in its signature."""
        return max(delta.dropping() for delta in self.chain)

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Apply the banks of the parts in order."""
        for number in range(len(self.chain)):
            h = bank.link(number).compute(x, h)
        return h

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Merge them in order."""
        for delta in self.chain:
            weight, bias = delta.merged(weight, bias)
        return weight, bias


class JoinedKV(KVDelta):
    """Prefixes of one attention module, side by side."""

    def __init__(self, deltas: Sequence[KVDelta]):
        super().__init__()
        if any(delta.shift for delta in deltas):
            raise ConfigError("prefixes that take positions (positions='follow') cannot share an attention module")
        self.chain = tuple(deltas)

    def kv(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, (P1 + P2 + ..., heads, head dim)."""
        keys, values = zip(*(delta.kv() for delta in self.chain))
        return torch.cat(keys), torch.cat(values)


class JoinedPrompt(PromptDelta):
    """Virtual tokens side by side."""

    def __init__(self, deltas: Sequence[PromptDelta]):
        super().__init__()
        if len({(delta.behind, delta.leads) for delta in deltas}) > 1:
            raise ConfigError("prompts with different settings of behind or leads cannot share a text")
        self.chain = tuple(deltas)
        self.embedded, self.behind, self.leads = deltas[0].embedded, deltas[0].behind, deltas[0].leads

    def tokens(self) -> Tensor:
        """Return all virtual tokens, (P1 + P2 + ..., D)."""
        return torch.cat([delta.tokens() for delta in self.chain])


class JoinedTokens(TokenDelta):
    """Trained tokens of several parts, no id twice."""

    def __init__(self, deltas: Sequence[TokenDelta]):
        super().__init__()
        self.chain = tuple(deltas)

    def ids(self) -> Tensor:
        """Return all ids."""
        return torch.cat([delta.ids() for delta in self.chain])

    def rows(self) -> Tensor:
        """Return all embeddings."""
        return torch.cat([delta.rows() for delta in self.chain])


JOINS: tuple[tuple[type, type], ...] = (
    (Delta, ChainedDelta),
    (KVDelta, JoinedKV),
    (PromptDelta, JoinedPrompt),
    (TokenDelta, JoinedTokens),
)


def join(site: str, deltas: Sequence[SiteDelta]) -> SiteDelta:
    """Return one delta that does what `deltas` of a site do in order."""
    if len(deltas) == 1:
        return deltas[0]
    for kind, joined in JOINS:
        if all(isinstance(delta, kind) for delta in deltas):
            return joined(deltas)
    raise ConfigError(f"site {site}: {', '.join(type(delta).__name__ for delta in deltas)} cannot share a site")


class UnionModule(AdapterModule):
    """The modules of the parts. Tensors are named ``parts.<i>.<name in the part>``."""

    def __init__(self, parts: Sequence[AdapterModule]):
        nn.Module.__init__(self)  # the parts hold the deltas, and nothing may be registered twice
        self.parts = nn.ModuleList(parts)

    def members(self) -> list[AdapterModule]:
        """Return the modules of the parts."""
        return list(self.parts)  # type: ignore[arg-type]

    def items(self):
        """Yield (site name, the joined delta)."""
        found: dict[str, list[SiteDelta]] = {}
        for part in self.members():
            for name, delta in part.items():
                found.setdefault(name, []).append(delta)
        for name, deltas in found.items():
            yield name, join(name, deltas)

    def fold(self) -> AdapterModule:
        """Fold every part."""
        return UnionModule([part.fold() for part in self.members()])

    def penalty(self) -> Tensor | None:
        """Return the sum of the parts' penalties."""
        found = [value for part in self.members() if (value := part.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def stepped(self, step: int, steps: int) -> None:
        """Tell every part."""
        for part in self.members():
            part.stepped(step, steps)

    def _of(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        start = f"parts.{number}."
        return {name[len(start) :]: value for name, value in values.items() if name.startswith(start)}

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        """Tell every part the shapes of its own tensors."""
        for number, part in enumerate(self.members()):
            part.fit(self._of(number, shapes))

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy to every part its own tensors."""
        for number, part in enumerate(self.members()):
            part.put(self._of(number, tensors))


class Composite(Method):
    """A method that is a union of others; subclasses say of which."""

    def members(self) -> tuple[Method, ...]:
        """Return the parts in written order."""
        raise NotImplementedError

    def vocabulary(self) -> tuple[str, ...]:
        """Return the words of all parts, each once."""
        return tuple(dict.fromkeys(word for part in self.members() for word in part.vocabulary()))

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Let every part select, which raises where one cannot serve; return all sites, for `build` to select again.

        What one part selects depends on all sites (layers counted from the top), so a part never selects among the
        sites of the others.
        """
        self.needs(sites)
        return list(sites)

    def needs(self, sites: Sequence[Site]) -> list[Site]:
        """Return what any part selects, once, in the order of the parts."""
        return list(dict.fromkeys(site for part in self.members() for site in part.needs(sites)))

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build every part in order, from one generator."""
        modules = [part.build(part.select(sites), init) for part in self.members()]
        union = UnionModule(modules)
        list(union.items())  # deltas that cannot share a site raise here
        ids = [i for _, delta in union.items() if isinstance(delta, TokenDelta) for i in delta.ids().tolist()]
        check(len(set(ids)) == len(ids), f"{self.name}: words of the parts", self.vocabulary(), "no word twice")
        return union


@register
@dataclass(frozen=True, kw_only=True)
class Union(Composite):
    """Several methods in one adapter, in written order; written a + b.

    Attributes:
        parts: the methods, two or more; shorthands and stored mappings are read.
    """

    name: ClassVar[str] = "union"
    summary: ClassVar[str] = "several methods in one adapter, in written order; written 'prefix + bottleneck'"

    parts: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        flat: list[Method] = []
        for part in self.parts:
            method = parse_method(part)
            flat += method.parts if isinstance(method, Union) else [method]
        check(len(flat) >= 2, "union.parts", self.parts, "two methods or more, written a + b")
        epsilons = [part.epsilon for part in flat]
        facts = {
            "parts": tuple(flat),
            "epsilon": None if None in epsilons else sum(e for e in epsilons if e is not None),
            "mergeable": all(part.mergeable for part in flat),
        }
        for key, value in facts.items():
            object.__setattr__(self, key, value)  # the dataclass is frozen, and these follow from the parts

    @classmethod
    def of(cls, *parts: Method) -> Self:
        """Return the union of some methods; unions among them are taken apart."""
        return cls(parts=parts)

    def members(self) -> tuple[Method, ...]:
        """Return the parts."""
        return self.parts

    def settings(self) -> dict[str, Any]:
        """Return the parts as plain JSON values."""
        return {"parts": [{"name": part.name, "settings": part.settings()} for part in self.parts]}

    def shorthand(self) -> str:
        """Return the parts' shorthands with + between them."""
        return " + ".join(part.shorthand() for part in self.parts)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build from ``{"parts": [...]}``: shorthands, stored mappings or methods."""
        for key in settings:
            if key != "parts":
                raise unknown("setting of method union", key, ["parts"])
        parts = settings.get("parts", ())
        check(isinstance(parts, (list, tuple)), "union.parts", parts, "a list of methods")
        return cls(parts=tuple(parts))
