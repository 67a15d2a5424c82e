"""Chat: conversations, learned at the assistant's turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from onebase.data.messages import as_messages
from onebase.encode import IGNORED, Encoded
from onebase.errors import ConfigError, DataError, UnsupportedError
from onebase.tasks.conversations import Message, Unfit, end_of_turn, labelled, prompt_of, shortened, template_of
from onebase.tasks.language import LanguageTask
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

SHOWN = 5  # bad conversations that an error names


@register_task
class Chat(LanguageTask):
    """The loss is on every turn of the assistant with its end; turns of user, system and tools are read only.

    The spec holds `chat_template` ("chatml" or Jinja) and `stop`, the token ids that end a turn, so that an adapter
    is asked as it was taught.
    """

    kind: ClassVar[str] = "chat"
    summary: ClassVar[str] = "conversations, learned at the assistant's turns"
    writes: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[tuple[str, ...]] = ("chat_template", "stop")

    def check_base(self, base: Base) -> None:
        """Require a decoder."""
        super().check_base(base)
        if base.is_encoder_decoder:
            raise UnsupportedError("chat needs a decoder-only base; on an encoder-decoder use seq2seq")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take the chat template: the tokenizer's own, or the one that is given."""
        return self.without_data(spec, base)

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Take the chat template, unless the spec has one."""
        if "chat_template" in spec and "stop" in spec:
            return spec
        self.check_base(base)
        template = template_of(base.tokenizer, spec["template"])
        try:
            stop = end_of_turn(base.tokenizer, template)
        except Unfit as error:
            raise ConfigError(f"this chat template cannot be used: {error}") from error
        return spec | {"template": "", "chat_template": template, "stop": stop}

    def prompt(self, base: Base, spec: Mapping[str, Any], prompt: Any) -> list[int]:
        """Render a conversation up to the assistant's next turn; a text is one turn of the user."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        template = spec.get("chat_template") or template_of(base.tokenizer, "")
        try:
            return prompt_of(base.tokenizer, template, as_messages(turns, answered=False))
        except ValueError as error:
            raise ConfigError(f"this conversation cannot be continued: {error}") from error

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode conversations.

        Raises:
            DataError: the assistant's tokens cannot be told in some of them; or no such token is left after cutting.
        """
        if not len(rows):
            return Examples(())
        encoded, bad = [], []
        for number, messages in enumerate(rows["messages"], 1):
            try:
                encoded.append(encode_conversation(base.tokenizer, spec, messages))
            except Unfit as error:
                bad.append(f"conversation {number} ({str(messages[0]['content'])[:40]!r}): {error}")
        if bad:
            more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            shown = "".join(f"\n  {line}" for line in bad[:SHOWN])
            raise DataError(f"{len(bad)} of {len(rows)} conversations cannot be used:{shown}{more}")
        if all(label == IGNORED for row in encoded for label in row.labels or ()):
            raise DataError(
                f"no token of the assistant is left within {spec['max_length']} tokens: raise max_length, or shorten "
                "what comes before the answers"
            )
        return Examples(tuple(encoded), cut=sum(row.cut > 0 for row in encoded))


def encode_conversation(tokenizer: Any, spec: Mapping[str, Any], messages: Sequence[Message]) -> Encoded:
    """Encode one conversation up to the assistant's last turn.

    What is too long loses its earliest turns, whole exchanges at a time (the system's stay). Where a single exchange
    is too long its end is cut.

    Raises:
        Unfit: the assistant's tokens cannot be told.
    """
    last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    template, end, limit = spec["chat_template"], spec["stop"], spec["max_length"]
    ids, own = labelled(tokenizer, template, end, messages)
    whole = len(ids)
    while len(ids) > limit and (fewer := shortened(messages)) is not None:
        messages = fewer
        ids, own = labelled(tokenizer, template, end, messages)
    ids, own = ids[:limit], own[:limit]
    labels = [token if mine else IGNORED for token, mine in zip(ids, own)]
    return Encoded(tuple(ids), labels=tuple(labels), cut=whole - len(ids))
