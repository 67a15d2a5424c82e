"""Between module paths, which other libraries write, and sites, which onebase writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.core.site import Site

if TYPE_CHECKING:
    from onebase.base import Base


# Families whose headed classes keep encoder and decoder at the top, as their bare class does.
FLAT = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


COMMON_NAMES = ("dense", "out_proj", "classifier", "score", "LayerNorm")  # a head may have such a module too


class Modules:
    """The modules of a base by the paths that other libraries know them by.

    A headed class of transformers keeps its backbone under a name of its own (``bert.``, ``model.``,
    ``transformer.``), a bare one does not; a file that was written from either fits a base of either.

    Args:
        base: the base.
    """

    def __init__(self, base: Base):
        model = base.model
        self.model, self.anatomy = model, base.anatomy
        self.named = str(getattr(model, "base_model_prefix", "") or "")
        backbone = model.base_model
        self.prefix = next(name for name, module in model.named_modules(remove_duplicate=False) if module is backbone)
        self.flat = base.anatomy.model_type in FLAT
        self._sites: dict[tuple[str, str], list[Site]] = {}
        for site in base.anatomy.sites.values():
            self._sites.setdefault((site.path, site.kind), []).append(site)

    def own(self, path: str) -> str | None:
        """Return the path in this base of a path in a file, or None where there is no such module."""
        inner = path.removeprefix(f"{self.named}.") if self.named else path
        for candidate in (f"{self.prefix}.{inner}".strip("."), path):
            if self._has(candidate):
                return candidate
        return None

    def spoken(self, path: str, headed: bool) -> str:
        """Return the path that a headed or a bare class gives to a module of this base."""
        inner = path.removeprefix(f"{self.prefix}.") if self.prefix else path
        return f"{self.named}.{inner}" if headed and self.named and not self.flat else inner

    def _has(self, path: str) -> bool:
        try:
            self.model.get_submodule(path)
        except AttributeError:
            return False
        return bool(path)

    def get(self, path: str) -> nn.Module:
        """Return the module at a path of this base."""
        return self.model.get_submodule(path)

    def sites(self, path: str, kind: str) -> list[Site]:
        """Return the sites of one kind at a module: several where its output is fused."""
        return self._sites.get((path, kind), [])

    def linears(self) -> Iterator[str]:
        """Yield the paths of all linear maps inside the layers."""
        yield from dict.fromkeys(path for path, kind in self._sites if kind == "linear" and path)

    def covered(self, path: str) -> str:
        """Return why the sites at a linear module are not the whole of it, or ''."""
        sites = self.sites(path, "linear")
        if not sites:
            return "onebase adapts the linear maps of layers, and this is none"
        refused = next((site.unsupported for site in sites if site.unsupported), None)
        if refused:
            return refused
        total = out_features(self.get(path))
        if sum(site.d_out for site in sites) != total:
            return f"its {total} output features have no sites of their own"
        return ""


def out_features(module: nn.Module) -> int:
    """Return the output features of a Linear or a transformers Conv1D."""
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]


def in_features(module: nn.Module) -> int:
    """Return the input features of a Linear or a transformers Conv1D."""
    return int(getattr(module, "in_features", None) or module.nx)  # type: ignore[arg-type]


def patterns(anatomy: Any, chosen: Iterable[str], kind: str = "linear") -> tuple[str, ...]:
    """Name linear sites as settings do: by part where a whole part is meant, by site elsewhere."""
    names = set(chosen)
    by_part: dict[str, list[str]] = {}
    for site in anatomy.sites.values():
        if site.kind == kind:
            by_part.setdefault(site.part, []).append(site.name)
    out: list[str] = []
    for part, members in by_part.items():
        inside = [name for name in members if name in names]
        out += [part] if len(inside) == len(members) else [exactly(name) for name in inside]
    return tuple(out)


def exactly(site: str) -> str:
    """Return the pattern that matches one site."""
    return f"re:^{re.escape(site)}$"


def by_pattern(anatomy: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value of sites, and the others by part or pattern."""
    default = Counter(values.values()).most_common(1)[0][0]
    out: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            for pattern in patterns(anatomy, [name for name, own in values.items() if own == value]):
                out[pattern] = value
    return default, out


def gather(sites: Sequence[Site], values: Sequence[Tensor], total: int) -> Tensor:
    """Put the features of a module's sites together: the reverse of `Site.take` along the first dimension.

    Args:
        sites: all sites of one module.
        values: (d_out, ...) of each.
        total: output features of the module.

    Returns:
        (total, ...).
    """
    out = torch.zeros(total, *values[0].shape[1:])
    for site, value in zip(sites, values, strict=True):
        if site.span is not None:
            out[site.span[0] : site.span[1]] = value
        elif site.index is not None:
            out[site.index] = value
        else:
            out.copy_(value)
    return out


def endings(modules: Modules, paths: Iterable[str], among: Iterable[str] = ()) -> list[str]:
    """Name modules as lists of endings do: by last name where this means no other module, by path elsewhere.

    Args:
        modules: of the base.
        paths: modules to name.
        among: further modules whose names mix with those of `paths`; a last name stands for one kind only.
    """
    chosen, other = set(paths), set(among)
    everything = [name for name, module in modules.model.named_modules() if not list(module.children())]
    out: set[str] = set()
    for path in chosen:
        last = path.rsplit(".", 1)[-1]
        same = {name for name in everything if name.rsplit(".", 1)[-1] == last}
        # a head that is added later may have a module of a common name
        plain = same <= chosen and not same & other and last not in COMMON_NAMES
        out.add(last if plain else modules.spoken(path, False))
    return sorted(out)
