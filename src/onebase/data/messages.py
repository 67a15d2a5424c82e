"""Conversations as lists of messages: read from OpenAI's or ShareGPT's shape, checked, in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The speakers of ShareGPT and its kin, under the names that chat templates know.
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")


def as_messages(value: Any, *, answered: bool = True) -> tuple[dict[str, Any], ...]:
    """Return a conversation as messages of role and content, with what else they hold (tool calls, names).

    Args:
        value: ``[{"role", "content"}, ...]`` (OpenAI), ``[{"from", "value"}, ...]`` (ShareGPT), or either as JSON text.
        answered: whether an assistant must speak, as in training; otherwise the assistant is to speak next.

    Raises:
        ValueError: what is wrong, and in which message.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"messages that are not JSON: {_short(value)}") from None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"no list of messages: {_short(value)}; expected [{{'role': ..., 'content': ...}}, ...]")
    messages = tuple(_message(item, number) for number, item in enumerate(value, 1))
    if answered and all(message["role"] != "assistant" for message in messages):
        raise ValueError("no message of the role assistant, so there is nothing to learn")
    if not answered and messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's already; leave it out to have it written")
    return messages


def is_conversation(value: Any) -> bool:
    """Say whether a value is a list of messages, rather than a text or token ids."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ValueError(f"message {number} is no object: {_short(item)}")
    shared = "from" in item and "role" not in item
    speaker, content = (item["from"], item.get("value")) if shared else (item.get("role"), item.get("content"))
    role = SPEAKERS.get(str(speaker), str(speaker))
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {_short(speaker)}; expected {', '.join(ROLES)}")
    rest = {str(k): v for k, v in item.items() if k not in ("role", "content", "from", "value") and v is not None}
    if not (isinstance(content, str) and content.strip()) and not (rest.get("tool_calls") and content in (None, "")):
        raise ValueError(f"message {number} ({role}) has no text: {_short(content)}")
    return {"role": role, "content": str(content or ""), **rest}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
