"""Trained tokens: input embeddings of a few words, of known tokens or of words that only this adapter knows.

After: textual inversion, Gal et al. 2022, arXiv 2208.01618, which trains one new word's embedding in a frozen model.
Formula: embed(id) = E_i where id is the i-th word's, the base's own embedding elsewhere.
Parameters: k * D for k words.
Start: a known token has its own embedding, so the start is the base; a new word has the mean of the embeddings of the
    pieces that the base's tokenizer cuts it into.
Which words: a word that is a token of the vocabulary as it is written, or that the tokenizer makes one token of, is
    that token. Any other is added as a special token to this adapter's own view of the tokenizer: texts of this
    adapter are cut with it, texts of others are not. Its id lies behind the base's last embedding.
Output: the embeddings are inputs only. An LM head, tied to the input embeddings or not, stays the base's: logits keep
    the base's vocabulary, a known token is scored with the base's own row, and a new word is never generated
    and cannot be a training target (training on such texts raises). Tying would change logits of every row of the
    head for one adapter, and a base whose outputs must not change has one head.
Stack: the one that reads the text; the encoder of an encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from onebase.core.contracts import AdapterModule, TokenDelta
from onebase.core.site import Site
from onebase.methods.method import Init, Method, check
from onebase.methods.registry import register


class LearnedTokens(TokenDelta):
    """Learned embeddings of some ids."""

    known: Tensor  # a buffer: ids follow from the words and the tokenizer, so they are not stored

    def __init__(self, ids: Sequence[int], start: Tensor):
        super().__init__()
        self.register_buffer("known", torch.tensor(list(ids), dtype=torch.long), persistent=False)
        self.embedding = nn.Parameter(start)  # (k, D)

    def ids(self) -> Tensor:
        """Return the ids."""
        return self.known

    def rows(self) -> Tensor:
        """Return the parameters."""
        return self.embedding


@register
@dataclass(frozen=True, kw_only=True)
class Tokens(Method):
    """Trained input embeddings of a few words, known or new.

    Attributes:
        words: the words, such as ('<clause>', 'abusive'). At least one, no word twice.
    """

    name: ClassVar[str] = "tokens"
    summary: ClassVar[str] = "trained input embeddings of a few words, known tokens or new ones"

    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fine = all(isinstance(word, str) and word.strip() == word and word for word in self.words)
        check(bool(self.words) and fine, "tokens.words", self.words, "words without spaces around them")
        check(len(set(self.words)) == len(self.words), "tokens.words", self.words, "no word twice")

    def vocabulary(self) -> tuple[str, ...]:
        """Return the words."""
        return self.words

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the token embeddings of the first stack."""
        return [next(site for site in sites if site.kind == "tokens")]

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build an embedding for every word.

        Raises:
            ConfigError: the base has no tokenizer, or two words are the same token.
        """
        ids, new = init.word_ids(self.words)
        check(len(set(ids)) == len(ids), "tokens.words", self.words, "words that are different tokens")
        rows = [init.embed(word).mean(0) if word in new else init.embed_ids([i])[0] for word, i in zip(self.words, ids)]
        return AdapterModule({sites[0].name: LearnedTokens(ids, torch.stack(rows).clone())})
