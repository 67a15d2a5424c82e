"""Words of one adapter: its own view of the base's tokenizer. The base's tokenizer never changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.base import Base

UNUSED = "\U000f0000"  # a private character: no text has it


def known_id(tokenizer: Any, word: str) -> int | None:
    """Return the id of a word that is a token already: as it is written, or as the tokenizer cuts it; else None."""
    vocabulary = tokenizer.get_vocab()
    if word in vocabulary:
        return int(vocabulary[word])
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def vocabulary_size(base: Base) -> int:
    """Return the ids that the base can embed; often more than its tokenizer has, up to a round number."""
    return int(base.anatomy.stacks[0].embed.weight.shape[0])  # type: ignore[union-attr,index]


def view(base: Base, words: Sequence[str]) -> Any:
    """Return a tokenizer that keeps `words` whole: a copy with the unknown ones added, or the same where all are known.

    New words get the ids behind the base's last embedding, in this order: an LM head, whose rows end there too, can
    never write one. Ids that the base can embed but its tokenizer does not have are filled with unused tokens.

    Args:
        base: its tokenizer is not changed.
        words: known tokens and new words.

    Raises:
        ConfigError: there are words but no tokenizer.
    """
    tokenizer = base.tokenizer
    if words and tokenizer is None:
        raise ConfigError("trained tokens need the base's tokenizer: pass Base(model, tokenizer)")
    new = [word for word in words if known_id(tokenizer, word) is None]
    if not new:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    fill = [f"{UNUSED}{i}" for i in range(len(own), vocabulary_size(base))]
    own.add_tokens([*fill, *new], special_tokens=True)
    return own


def word_ids(tokenizer: Any, own: Any, words: Sequence[str]) -> tuple[list[int], set[str]]:
    """Return the id of every word, and which words are new.

    Args:
        tokenizer: the base's.
        own: `view` of it for all words of the adapter.
        words: a part of these words.
    """
    found = {word: known_id(tokenizer, word) for word in words}
    ids = [own.convert_tokens_to_ids(word) if i is None else i for word, i in found.items()]
    return ids, {word for word, i in found.items() if i is None}


class Seen:
    """A base as an adapter with words of its own sees it: everything is the base's, but the tokenizer."""

    def __init__(self, base: Base, tokenizer: Any):
        self._base, self.tokenizer = base, tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def seen(base: Base, tokenizer: Any) -> Base:
    """Return the base with another tokenizer, for encoding."""
    return base if tokenizer is None or tokenizer is base.tokenizer else Seen(base, tokenizer)  # type: ignore[return-value]
