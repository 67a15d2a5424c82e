"""Conversations to token ids: chat templates, which tokens are the assistant's, and what is cut when one is too long.

Two kinds of templates: "chatml", which is built in and written with whatever plain tokens the tokenizer has, piece by
piece, each turn ending in <|im_end|> where that is one token of the tokenizer, else in its end of text; and Jinja
templates of tokenizers, whose rendering is only ever compared, never interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from onebase.errors import ConfigError

CHATML = "chatml"
START, END = "<|im_start|>", "<|im_end|>"
# What marks the assistant's tokens inside a Jinja template.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CONTENT = "quartz"  # stands for an answer where only what surrounds it is of interest

Message = Mapping[str, Any]


class Unfit(ValueError):
    """A conversation that this template cannot present exactly; the message says why."""


def template_of(tokenizer: Any, asked: str) -> str:
    """Return the chat template to use: "chatml", or a Jinja template.

    Args:
        tokenizer: a transformers tokenizer.
        asked: "" for the tokenizer's own, "chatml", or a Jinja template.

    Raises:
        ConfigError: the tokenizer has none, or `asked` is no template for conversations.
    """
    if asked == CHATML or "messages" in asked:
        return asked
    if asked:
        raise ConfigError(f"template {asked[:80]!r}: expected 'chatml', or a Jinja template that reads messages")
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this base's tokenizer has no chat template: pass template='chatml' (--template chatml), which is built in "
            "and written with plain tokens, or a Jinja template"
        )
    return tokenizer.get_chat_template()


def end_of_turn(tokenizer: Any, template: str) -> list[int]:
    """Return the token ids that a template writes at the end of an assistant's turn.

    Raises:
        ConfigError: it writes none, so that generation could not stop.
    """
    if template == CHATML:
        return _chatml_end(tokenizer)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _CONTENT}]
    after = render_jinja(tokenizer, template, turns, False).rpartition(_CONTENT)[2].strip()
    if not after:
        raise ConfigError(
            "this chat template writes nothing at the end of an assistant's turn, so that generation would not stop: "
            "pass template='chatml', or a template that writes an end"
        )
    return _plain(tokenizer, after)


def render_jinja(tokenizer: Any, template: str, messages: Sequence[Message], answer: bool) -> str:
    """Render a conversation as text, with the opening of an answer at the end where `answer`.

    Raises:
        Unfit: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        turns = [dict(message) for message in messages]
        return str(
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=answer)
        )
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        raise Unfit(f"the chat template refuses it: {error}") from error


def prompt_of(tokenizer: Any, template: str, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation that the assistant is to continue."""
    if template == CHATML:
        return [*_chatml(tokenizer, messages)[0], *_plain(tokenizer, f"\n{START}assistant\n")]
    return _plain(tokenizer, render_jinja(tokenizer, template, messages, True))


def labelled(
    tokenizer: Any, template: str, end: Sequence[int], messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and which of them the assistant wrote, ends of turns included.

    Args:
        tokenizer: a transformers tokenizer.
        template: "chatml" or Jinja.
        end: what `end_of_turn` gave.
        messages: the conversation.

    Raises:
        Unfit: the tokens of the assistant cannot be told exactly.
    """
    if template == CHATML:
        return _chatml(tokenizer, messages)
    if _GENERATION.search(template):
        return _marked(tokenizer, template, messages)
    whole = render_jinja(tokenizer, template, messages, False)
    ids, own = _plain(tokenizer, whole), []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _prefix(tokenizer, render_jinja(tokenizer, template, messages[:k], True), whole, ids, k)
        closed = _prefix(tokenizer, render_jinja(tokenizer, template, messages[: k + 1], False), whole, ids, k + 1)
        own += [False] * (opened - len(own))
        own += [True] * (_end_in(ids, opened, closed, end, k) - opened)
    return ids, own + [False] * (len(ids) - len(own))


def _prefix(tokenizer: Any, text: str, whole: str, ids: list[int], turns: int) -> int:
    """Return how many of the whole's tokens the first turns are."""
    part = _plain(tokenizer, text)
    if ids[: len(part)] == part:
        return len(part)
    if not whole.startswith(text):
        raise Unfit(
            f"its first {turns} turns are rendered otherwise when more turns follow, so the assistant's tokens cannot "
            "be told: use a template that leaves earlier turns as they are, such as template='chatml', or cut the "
            "conversation into one example for each answer"
        )
    raise Unfit(
        f"the tokenizer joins the characters at the border of turn {turns} to one token, so the assistant's tokens "
        "cannot be told: use template='chatml', which encodes turns apart"
    )


def _end_in(ids: list[int], start: int, stop: int, end: Sequence[int], k: int) -> int:
    """Return where an assistant's turn ends: after its last end-of-turn tokens; a line break after them is nobody's."""
    for place in range(stop - len(end), start - 1, -1):
        if ids[place : place + len(end)] == list(end):
            return place + len(end)
    raise Unfit(
        f"turn {k + 1} of the assistant does not end with the template's end-of-turn tokens {list(end)}: the template "
        "leaves them out there, or the tokenizer joins them with the text; use template='chatml'"
    )


def _marked(tokenizer: Any, template: str, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Take the assistant's tokens from the template's own marks."""
    if not tokenizer.is_fast:
        raise Unfit("a template with generation marks needs a fast tokenizer: use template='chatml'")
    render_jinja(tokenizer, template, messages, False)  # explains a template that refuses
    found = tokenizer.apply_chat_template(
        [dict(message) for message in messages], chat_template=template, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _chatml(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Write a conversation in ChatML piece by piece, so that no token crosses a border."""
    ids, end = _opening(tokenizer), _chatml_end(tokenizer)
    own = [False] * len(ids)
    for k, message in enumerate(messages):
        if message.get("tool_calls"):
            raise Unfit("ChatML has no form for tool calls: use a tokenizer whose own chat template has one")
        head = _plain(tokenizer, ("\n" if k else "") + f"{START}{message['role']}\n")
        body = _plain(tokenizer, message["content"]) + end
        ids += head + body
        own += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    return ids, own


def _chatml_end(tokenizer: Any) -> list[int]:
    """Return what ends a turn in ChatML.

    A base that was not made for ChatML has hardly ever seen the pieces of <|im_end|>, and with its embeddings frozen
    it can hardly learn to write them in a row: the perplexity of a one-word answer with its end stayed at 5.3 on a
    decoder of 260 thousand parameters (8 pieces) and 1.38 on one of 5 million (7 pieces); with the end of text in their
    place it was 2.9 and 1.14.
    """
    pieces = _plain(tokenizer, END)
    return pieces if len(pieces) == 1 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _opening(tokenizer: Any) -> list[int]:
    """Return BOS where the tokenizer begins texts with it."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shortened(messages: Sequence[Message]) -> Sequence[Message] | None:
    """Leave out the earliest turns up to the next one of the user; what the system said first stays.

    Returns:
        The shorter conversation, None where there is no later turn of the user that the assistant answers.
    """
    first = next((k for k, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    rest = messages[first:]
    for k in range(1, len(rest)):
        if rest[k]["role"] == "user" and any(m["role"] == "assistant" for m in rest[k:]):
            return [*messages[:first], *rest[k:]]
    return None
