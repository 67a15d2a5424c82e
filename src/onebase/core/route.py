"""Routes: which rows of a call belong to which adapter. An argument of the call, never state of the model."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from onebase.core.plan import Plan
from onebase.errors import RouteError


@dataclass(frozen=True)
class Route:
    """Adapter names for the rows of a call.

    Attributes:
        names: one name (or None for the plain base) for every row, or one entry per row.
        repeat: rows per entry that a stated beam or sample factor makes (entry i covers rows i*repeat ...).
        strip: an encoder that feeds a decoder hands back only the callers' tokens (used when it is read alone).
        prompts: tokens of the prompt of each entry (or of each row, under a single name), where texts go on after it.
        pack: rows may be computed without their padding; only the last states are read, and zeros are in padding.
        rows: row of the call that each entry reads; the call then answers one row per entry. None: its own.
        memory: states below the first delta, a `core.kept.Memory`, or None.
    """

    names: str | tuple[str | None, ...] | None
    repeat: int = 1
    strip: bool = False
    prompts: tuple[int, ...] | None = None
    pack: bool = False
    rows: tuple[int, ...] | None = None
    memory: Any = None

    def per_row(self, rows: int) -> list[str | None]:
        """Return one name per row.

        Args:
            rows: the number of rows of the module call.

        Raises:
            RouteError: the list fits neither `rows` nor `rows / repeat`.
        """
        if not isinstance(self.names, tuple):
            return [self.names] * rows
        if len(self.names) == rows:
            return list(self.names)
        if len(self.names) * self.repeat == rows:
            return [name for name in self.names for _ in range(self.repeat)]
        stated = (
            f" (or {len(self.names) * self.repeat} with the stated factor {self.repeat})" if self.repeat > 1 else ""
        )
        raise RouteError(
            f"the call has {rows} rows but the route names {len(self.names)}{stated}. Pass one name per row, or a "
            "single name for all rows; for beams or several samples state the factor: use(names, repeat=k)."
        )

    def prompt_lengths(self, rows: int) -> list[int] | None:
        """Return the prompt's tokens of each row, or None where nobody stated them.

        Raises:
            RouteError: the list fits neither `rows` nor `rows / repeat`.
        """
        if self.prompts is None or len(self.prompts) == rows:
            return None if self.prompts is None else list(self.prompts)
        if len(self.prompts) * self.repeat == rows:
            return [length for length in self.prompts for _ in range(self.repeat)]
        raise RouteError(f"the call has {rows} rows but prompts states {len(self.prompts)} lengths: pass one per row")


@dataclass
class Frame:
    """One anchor being executed: the module and the plan its taps read."""

    module: nn.Module
    plan: Plan | None


class Runtime(threading.local):
    """What the taps of one base read, per thread: the plan of the call in progress."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.plan: Plan | None = None
        # From `adapter_ids` among the inputs of the call in progress, with the route of `use` at that time: a later
        # `use` shows that the call is over, also when it was interrupted (KeyboardInterrupt skips hooks).
        self.override: tuple[Route, Route | None] | None = None
        self.recorder: dict | None = None  # collects keys and values while a prefix is initialised from text

    def push(self, frame: Frame) -> None:
        """Enter an anchor."""
        self.frames.append(frame)
        self.plan = frame.plan

    def switch(self, plan: Plan) -> None:
        """Go on with another plan in the innermost anchor."""
        self.frames[-1].plan = self.plan = plan

    def pop(self) -> None:
        """Leave the innermost anchor."""
        self.frames.pop()
        self.plan = self.frames[-1].plan if self.frames else None

    @property
    def inside(self) -> bool:
        """Whether an anchor of this thread is being executed."""
        return bool(self.frames)

    @contextmanager
    def hold(self, plan: Plan | None, module: nn.Module) -> Iterator[None]:
        """Make `plan` current for a while: used when checkpointed layers are computed again."""
        depth = len(self.frames)
        self.push(Frame(module, plan))
        try:
            yield
        finally:
            while len(self.frames) > depth:
                self.pop()


@dataclass
class RouteContext:
    """The route chosen by `use`, per task and thread, and which threads are inside a `use` now."""

    variable: contextvars.ContextVar[Route | None] = field(
        default_factory=lambda: contextvars.ContextVar("onebase_route", default=None)
    )
    holders: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def use(self, route: Route) -> Iterator[None]:
        """Route every call of this task by `route` until the block ends."""
        me = threading.get_ident()
        with self.lock:
            self.holders[me] = self.holders.get(me, 0) + 1
        token = self.variable.set(route)
        try:
            yield
        finally:
            self.variable.reset(token)
            with self.lock:
                self.holders[me] -= 1
                if not self.holders[me]:
                    del self.holders[me]

    def current(self) -> Route | None:
        """Return the route of this task, or None where nobody chose one.

        Raises:
            RouteError: this thread has no route while another thread is inside `use`: a route does not follow a
                call into another thread by itself, and answering with the plain base would be silent.
        """
        route = self.variable.get()
        if route is None and self.holders:
            others = [ident for ident in list(self.holders) if ident != threading.get_ident()]
            if others and threading.get_ident() not in self.holders:
                raise RouteError(
                    "this thread has no route while another thread is inside base.use(...). A route does not follow "
                    "a call into a new thread or executor: pass base.bind(name) (or base.bind(name, function)) to "
                    "the thread, or wrap the call in base.use(None) for the plain base."
                )
        return route


def as_route(
    adapter: str | Sequence[str | None] | None,
    repeat: int = 1,
    strip: bool = False,
    prompts: Sequence[int] | None = None,
    pack: bool = False,
    rows: Sequence[int] | None = None,
    memory: Any = None,
) -> Route:
    """Turn a name or a list of names into a route."""
    names = adapter if adapter is None or isinstance(adapter, str) else tuple(adapter)
    stated = None if prompts is None else tuple(prompts)
    return Route(names, repeat, strip, stated, pack, None if rows is None else tuple(rows), memory)
