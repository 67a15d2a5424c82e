"""Conversations as lists of messages: read from OpenAI's or ShareGPT's shape, checked, in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onebase.data.misfit import Misfit, short

# The speakers of ShareGPT and its kin, under the names that chat templates know.
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
SPEAKERS = ("system", "developer", "user", "assistant", "tool")


def as_messages(value: Any, role: str = "messages", *, answered: bool = True) -> tuple[dict[str, Any], ...]:
    """Return a conversation as messages of role and content, with what else they hold (tool calls, names).

    Args:
        value: ``[{"role", "content"}, ...]`` (OpenAI), ``[{"from", "value"}, ...]`` (ShareGPT), or either as JSON text.
        role: what the conversation is called in problems.
        answered: whether an assistant must speak, as in training; otherwise the assistant is to speak next.

    Raises:
        Misfit: what is wrong, and in which message.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Misfit(f"{role} that are not JSON", short(value)) from None
    if not isinstance(value, list | tuple) or not value:
        raise Misfit(f"{role} that are no list", f"{short(value)}; expected [{{'role': ..., 'content': ...}}, ...]")
    messages = tuple(_message(item, number) for number, item in enumerate(value, 1))
    if answered and all(message["role"] != "assistant" for message in messages):
        raise Misfit("conversation without an assistant", "no message of the role assistant, so nothing to learn")
    if not answered and messages[-1]["role"] == "assistant":
        raise Misfit(
            "conversation that is answered",
            "the last message is the assistant's already; leave it out to have it written",
        )
    return messages


def is_conversation(value: Any) -> bool:
    """Say whether a value is a list of messages, rather than a text or token ids."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise Misfit("message that is no object", f"message {number}: {short(item)}")
    shared = "from" in item and "role" not in item
    speaker, content = (item["from"], item.get("value")) if shared else (item.get("role"), item.get("content"))
    known = _OTHER_NAMES.get(str(speaker), str(speaker))
    if known not in SPEAKERS:
        raise Misfit(
            "message of an unknown role", f"message {number}: {short(speaker)}; expected {', '.join(SPEAKERS)}"
        )
    rest = {str(k): v for k, v in item.items() if k not in ("role", "content", "from", "value") and v is not None}
    calls = bool(rest.get("tool_calls"))
    if not (isinstance(content, str) and content.strip()) and not (calls and content in (None, "")):
        raise Misfit("message without content", f"message {number} ({known}): {short(content)}; expected text")
    return {"role": known, "content": str(content or ""), **rest}
