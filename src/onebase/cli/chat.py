"""`onebase chat`: talk to stored adapters in the terminal, on the engine that serves."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.output import Output
from onebase.errors import OnebaseError

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.serve.catalog import Catalog
    from onebase.serve.engine import Engine
    from onebase.store import Stored

HELP = "/use NAME answers with another adapter, /new forgets what was said, the end of input (Ctrl-D) ends"


def chat(
    adapter: Annotated[
        str, typer.Argument(metavar="[NAME]", autocompletion=o.stored_names, help="Adapter; 'base' is the base alone.")
    ] = "base",
    base: o.AdapterBase = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the system says first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Draw tokens; the most probable ones otherwise.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="With --temperature.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="With --temperature: the same seed, the same text.")
    ] = 0,
    device: o.Device = None,
    dtype: o.Dtype = None,
    debug: o.Debug = False,
) -> None:
    """Talk to adapters: a line is what you say, the answer is written as it comes.

    /use NAME answers with another adapter from then on, which reads what was said before; /new forgets it.
    """
    from onebase.cli.bases import PLAIN, check_kinds, open_shared
    from onebase.cli.failures import UsageError
    from onebase.serve.asked import Sampling
    from onebase.serve.catalog import Catalog
    from onebase.serve.engine import Engine
    from onebase.serve.settings import ServeSettings
    from onebase.store import Store

    if top_p is not None and temperature is None:
        raise UsageError("--top-p has no effect without --temperature")
    out, store = Output(False), Store()
    check_kinds([adapter], writes=True)
    loaded = open_shared([] if adapter == PLAIN else [store.resolve(adapter)], base, device, dtype, out)
    engine = Engine(loaded, ServeSettings(new_tokens=max_new_tokens))
    talk = Talk(engine, Catalog([store], [loaded.id]), Sampling(max_new_tokens, temperature, None, top_p), seed, system)
    try:
        talk.use(adapter)
        _converse(talk, out)
    finally:
        engine.close()


class Talk:
    """A conversation with adapters of one base.

    Args:
        engine: writes.
        catalog: knows adapters by name.
        sampling: of answers.
        seed: of drawing; each answer draws on.
        system: said first, or None.

    Attributes:
        name: who answers.
        turns: what was said, {"role", "content"} each.
    """

    def __init__(self, engine: Engine, catalog: Catalog, sampling: Any, seed: int = 0, system: str | None = None):
        self.engine, self.catalog, self.sampling, self.seed, self.system = engine, catalog, sampling, seed, system
        self.name, self._stored, self.turns = "base", None, []
        self.new()

    def use(self, name: str) -> None:
        """Let another adapter answer.

        Raises:
            OnebaseError: there is none of this name, or it writes no text.
        """
        from onebase.errors import UnsupportedError
        from onebase.tasks import get_task

        stored = self.catalog.resolve(name)
        if stored is not None and not get_task(stored.config.task["kind"]).writes:
            raise UnsupportedError(f"adapter {name!r} labels texts ({stored.config.task['kind']}): use onebase predict")
        self.name, self._stored = name, stored

    def new(self) -> None:
        """Forget what was said."""
        self.turns = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str, show: Callable[[str], None]) -> str:
        """Say something and return the answer.

        Args:
            text: one turn. An adapter that was not trained on conversations is given it alone.
            show: receives the answer piece by piece. Where it is empty, the turn is forgotten.

        Raises:
            OnebaseError: the answer cannot be written; what was said is forgotten again. An interrupt likewise.
        """
        from onebase.serve.asked import Prompt

        said = [*self.turns, {"role": "user", "content": text}]
        prompt = said if _converses(self.engine.base, self._stored) else text
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        asked = Prompt(prompt, self._stored, self.sampling, self.seed, (), lambda piece, tokens: pieces.put(piece))
        items = self.engine.write([asked])
        asked.future.add_done_callback(lambda done: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                show(piece)
            written, _ = asked.future.result()
        except BaseException:
            self.engine.cancel(items)
            raise
        self.seed += 1
        if written.text.strip():  # no template has a place for a turn in which nothing is said
            self.turns = [*said, {"role": "assistant", "content": written.text}]
        return written.text


def _converses(base: Base, stored: Stored | None) -> bool:
    """Whether what answers reads whole conversations."""
    if stored is None:
        return bool(getattr(base.tokenizer, "chat_template", None))
    return stored.config.task["kind"] == "chat"


def _converse(talk: Talk, out: Output) -> None:
    person = sys.stdin.isatty()
    if person:
        out.note(HELP)
    while True:
        try:
            line = input(f"{talk.name}> " if person else "").strip()
        except EOFError:
            return
        try:
            if line.startswith("/"):
                _command(talk, line, out)
            elif line:
                talk.say(line, lambda piece: print(piece, end="", flush=True))
                print(flush=True)
        except OnebaseError as error:
            out.note(f"error: {error}")
        except KeyboardInterrupt:
            out.note("\ninterrupted; what you said last is forgotten")


def _command(talk: Talk, line: str, out: Output) -> None:
    word, _, rest = line.partition(" ")
    if word == "/use" and rest.strip():
        talk.use(rest.strip())
        out.note(f"{talk.name} answers")
    elif word == "/new":
        talk.new()
    else:
        out.note(f"unknown command {line!r}: {HELP}")
