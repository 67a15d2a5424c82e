"""Everything a new method is written with: ``from onebase.extend import ...``. One file is the whole extension."""

from onebase.core.contracts import AdapterModule, Delta, KVDelta, PromptDelta
from onebase.core.plan import At
from onebase.core.site import Site, standardize
from onebase.methods.method import Init, Method, check, match_linears
from onebase.methods.registry import register, unregister

__all__ = [
    "AdapterModule",
    "At",
    "Delta",
    "Init",
    "KVDelta",
    "Method",
    "PromptDelta",
    "Site",
    "check",
    "match_linears",
    "register",
    "standardize",
    "unregister",
]
