"""Rows and prompts of any adapters in shared forwards. No HTTP.

Threads that answer rows share the base, another writes texts (`writing`); they take turns step by step. Answers are
those of `base.predict` and `base.generate`; texts go on where their prompt ends, with the space in front that some
tokenizers leave out of a text by itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from onebase.devices import answering_threads, keep_memory
from onebase.errors import RouteError, UnsupportedError
from onebase.serve.asked import PART, Late, Prompt, Row
from onebase.serve.scheduler import Admission, Item, Overloaded, Scheduler
from onebase.serve.settings import ServeSettings
from onebase.serve.text import positions_of
from onebase.serve.tiers import Tiers
from onebase.serve.turns import Turns
from onebase.serve.writing import Writer
from onebase.store.names import PLAIN
from onebase.tasks import get_task

if TYPE_CHECKING:
    from onebase.base import Base

WINDOW = 10.0  # seconds of rates
FEWEST = 4  # rows that a thread takes at least, where there are so many: smaller batches cost more for each row
MOST_BYTES = 4  # of a character in UTF-8
TAIL = 8  # tokens of a prompt that are decoded with what follows it
CHARACTERS = 4  # of a token, roughly: rows are weighed before they are encoded


class Engine:
    """One base that answers for many.

    Args:
        base: nothing else uses it while the engine runs.
        settings: bounds.
    """

    def __init__(self, base: Base, settings: ServeSettings):
        if base.reads_images:  # a request would name files of this machine
            raise UnsupportedError(f"{base.id} reads images, which the server does not take: use onebase predict")
        keep_memory(shared=True)
        self.base, self.settings = base, settings
        self.turns, self.encoding = Turns(), base.encoding
        self.positions = positions_of(base)
        self.special = frozenset(getattr(base.tokenizer, "all_special_ids", ()))
        self.tiers = Tiers(base, self.turns, settings.device_bytes, settings.memory_bytes)
        self.rows = Scheduler()
        self.prompts = Scheduler(quantum=1)  # a prompt of each adapter in turn: how long its text becomes nobody knows
        self.batches: deque[dict[str, Any]] = deque(maxlen=600)
        self.written = deque(maxlen=10_000)  # (time, tokens)
        self.admitted = Admission(settings.waiting_rows, settings.waiting_rows_each, lambda: self.rates()["rows_per_s"])
        self.writing = Admission(settings.waiting_prompts, settings.waiting_prompts, lambda: 1.0, "prompts")
        self.closing = False
        self._answering = self._start()
        self.writer = Writer(self)

    def _start(self) -> list[threading.Thread]:
        """Start the threads that answer rows; this thread, and those that it starts later, compute as before."""
        import torch

        before = torch.get_num_threads()
        count, each = answering_threads(self.base.device, not self.base.anatomy.stacks[0].causal)
        if self.settings.answering is not None:
            count, each = self.settings.answering, max(1, before // self.settings.answering)
        ready = threading.Barrier(count + 1)

        def run() -> None:
            if each != torch.get_num_threads():  # asked first: what is set before the first question is forgotten
                torch.set_num_threads(each)
            ready.wait()
            self._answer(count)

        threads = [threading.Thread(target=run, name=f"onebase-rows-{i}", daemon=True) for i in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(before)  # what threads that ask for the first time are told
        return threads

    @property
    def _threads(self) -> list[threading.Thread]:
        return [*self._answering, *self.writer.threads]

    @property
    def alive(self) -> bool:
        """Whether its threads run."""
        return all(thread.is_alive() for thread in self._threads)

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, rows: Sequence[Row], deadline: float | None = None) -> list[Item]:
        """Queue rows; each one's future gets its prediction and the entry that answered.

        Raises:
            Overloaded: there is no room; nothing was queued.
            UnsupportedError, RouteError: an adapter does not answer such rows; nothing was queued.
        """
        for row in rows:
            self._check(row)
        return self._enter(rows, self.rows, self.admitted, deadline)

    def write(self, prompts: Sequence[Prompt], deadline: float | None = None) -> list[Item]:
        """Queue prompts; each one's future gets what was written and the entry that wrote it."""
        if not self.base.has_lm_head:
            raise UnsupportedError("this base writes no text: ask /v1/classify or /v1/embeddings")
        for prompt in prompts:
            if prompt.stored is not None and not get_task(prompt.stored.config.task["kind"]).writes:
                kind = prompt.stored.config.task["kind"]
                raise UnsupportedError(f"adapter {prompt.stored.name!r} labels texts ({kind}): ask /v1/classify")
        return self._enter(prompts, self.prompts, self.writing, deadline)

    def cancel(self, items: Sequence[Item]) -> None:
        """Nobody waits for these any more: what has not begun never does, what is written stops at the next step."""
        for item in items:
            item.gone = True
            if item.payload.future.cancel():
                self._left(item)

    def close(self) -> None:
        """Finish what was taken, then stop."""
        self.closing = True
        until = time.monotonic() + self.settings.drain
        while (self.admitted.total or self.writing.total) and time.monotonic() < until:
            time.sleep(0.02)
        self.rows.close()
        self.prompts.close()
        for thread in self._threads:
            thread.join(5.0)
        self.tiers.close()

    def rates(self) -> dict[str, float]:
        """Return what was done per second, lately."""
        since = time.time() - WINDOW
        recent = [b for b in list(self.batches) if b["time"] >= since]
        return {
            "window_s": WINDOW,
            "rows_per_s": sum(b["rows"] for b in recent) / WINDOW,
            "tokens_per_s": sum(b["tokens"] for b in recent) / WINDOW,
            "batches_per_s": len(recent) / WINDOW,
            "generated_per_s": sum(n for at, n in list(self.written) if at >= since) / WINDOW,
        }

    def _check(self, row: Row) -> None:
        if row.stored is None:
            return
        spec = row.stored.config.task
        task = get_task(spec["kind"])
        if task.writes:
            raise UnsupportedError(f"adapter {row.stored.name!r} writes text: ask /v1/completions")
        if spec.get("pair") and row.pair is None:
            raise RouteError(f"adapter {row.stored.name!r} reads pairs of texts: give 'pair' beside 'text'")
        if row.pair is not None and spec["kind"] != "features" and not spec.get("pair"):
            raise RouteError(f"adapter {row.stored.name!r} reads single texts: leave 'pair' out")

    def _enter(
        self, asked: Sequence[Any], scheduler: Scheduler, admission: Admission, deadline: float | None
    ) -> list[Item]:
        if self.closing:
            raise Overloaded("the server is shutting down", 5.0)
        counts = Counter(_queue(one) for one in asked)
        entered: list[str] = []
        try:
            for queue, count in counts.items():
                admission.enter(queue, count)
                entered.append(queue)
        except Overloaded:
            for queue in entered:
                admission.leave(queue, counts[queue])
            raise
        items = [Item(_queue(one), _cost(one), one, deadline) for one in asked]
        for item in items:
            item.payload.admission = admission
        for item in items:
            if item.payload.stored is None:
                scheduler.put([item])
                continue
            lease = self.tiers.lease(item.payload.stored)
            lease.add_done_callback(lambda done, item=item: self._leased(done, item, scheduler))
        return items

    def _leased(self, done: Future, item: Item, scheduler: Scheduler) -> None:
        error = done.exception()
        if error is not None:
            self.settle(item, error=error)
            return
        item.payload.entry = done.result()
        if item.gone:
            self._release(item)
            return
        scheduler.put([item])

    def _release(self, item: Item) -> None:
        if item.payload.entry is not None:
            entry, item.payload.entry = item.payload.entry, None
            self.tiers.release(entry)

    def _left(self, item: Item) -> None:
        admission, item.payload.admission = item.payload.admission, None
        if admission is not None:  # once, however many find that nobody waits
            admission.leave(item.queue, 1)

    def settle(self, item: Item, result: Any = None, error: BaseException | None = None) -> None:
        """Give who waits an answer or an error, and the lease back."""
        entry = item.payload.entry
        self._release(item)
        if not item.payload.future.set_running_or_notify_cancel():
            return  # cancelled: it has left already
        self._left(item)
        if error is not None:
            item.payload.future.set_exception(error)
        else:
            item.payload.future.set_result((result, entry))

    def drop(self, late: Sequence[Item]) -> None:
        """Tell who waits that the deadline passed."""
        for item in late:
            self.settle(item, error=Late("the deadline passed before an answer was there"))

    # -- rows --------------------------------------------------------------------------------------------------------

    def _answer(self, threads: int) -> None:
        while self.rows.wait():
            share = max(FEWEST, -(-self.rows.waiting() // threads))
            tokens, rows = self.settings.batch_tokens, self.settings.batch_rows
            batch, late = self.rows.take(tokens, rows, time.monotonic(), most=share if threads > 1 else None)
            self.drop(late)
            for paired in (False, True):
                part = [item for item in batch if (item.payload.pair is not None) == paired]
                if part:
                    self._forward(part)

    def _forward(self, part: list[Item]) -> None:
        began = time.perf_counter()
        try:
            answers = self._predict(part)
        except Exception:
            # one row cannot be answered: each by itself, so that its error is its own
            for item in part:
                try:
                    answer = self._predict([item])[0]
                except Exception as error:
                    self.settle(item, error=error)
                else:
                    self.settle(item, answer)
            return
        took = (time.perf_counter() - began) * 1e3
        self.batches.append({
            "time": time.time(), "rows": len(part), "tokens": sum(item.cost for item in part), "ms": round(took, 2),
            "adapters": dict(Counter(item.queue for item in part)),
        })  # fmt: skip
        for item, answer in zip(part, answers):
            self.settle(item, answer)

    def _predict(self, part: Sequence[Item]) -> list[Any]:
        names = [None if item.payload.entry is None else item.payload.entry.name for item in part]
        pairs = [item.payload.pair for item in part]
        with self.turns.shared():
            return self.base.predict(
                [item.payload.text for item in part], adapter=names, batch_size=len(part),
                pairs=None if pairs[0] is None else pairs,
            )  # fmt: skip

    # -- texts -------------------------------------------------------------------------------------------------------

    def tail_of(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return the last tokens of a prompt that is continued: enough of them to decode what follows as what follows.

        A decoder that writes its prompt on needs them: tokenizers leave out the space at the start of a text.
        """
        if self.base.is_encoder_decoder:
            return ()
        read, size = [i for i in prompt if i not in self.special], TAIL
        # a tail that begins within a character would spoil the characters that follow
        while size < len(read) and self.text_of(read[-size:]).startswith(PART):
            size *= 2
        return tuple(read[-size:])

    def text_of(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Decode tokens.

        Args:
            ids: tokens.
            after: the tokens before them: the text is what `ids` add to the text of these.
        """
        with self.encoding:
            text = self._decode([*after, *ids])
            if text.endswith(PART):  # bytes of a character that is not complete spoil complete ones before it, in some
                for part in range(1, min(MOST_BYTES, len(ids) + 1)):
                    whole = self._decode([*after, *ids[:-part]])
                    if not whole.endswith(PART):
                        text = whole + self._decode(ids[-part:])
                        break
            before = self._decode(after) if after else ""
            if text.startswith(before):
                return text[len(before) :]
            if not before.endswith(PART):  # bytes that are no character spoil those before them
                return self._decode(ids)
        # a prompt that ends within a character reads differently once the character is complete
        kept = 0
        while text[kept : kept + 1] == before[kept : kept + 1] != "":
            kept += 1
        return text[kept:]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.base.tokenizer.decode(list(ids), skip_special_tokens=True)


def _queue(one: Any) -> str:
    return PLAIN if one.stored is None else one.stored.ref


def _cost(one: Any) -> int:
    text = one.text + (one.pair or "") if isinstance(one, Row) else ""
    return 2 + len(text) // CHARACTERS if text else 1
