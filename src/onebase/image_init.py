"""What methods may draw on to initialise on a base that reads images: tokens of noise, as there are no words.

Processors scale pixels to about mean 0 and deviation 1, so images of standard normal noise are in the range that the
base knows; their tokens have the size and the spread of real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebase.core.route import as_route
from onebase.errors import ConfigError
from onebase.methods.method import Init
from onebase.pictures import noise, tokens_per_picture

if TYPE_CHECKING:
    from onebase.base import Base

IMAGES = 8  # of noise; their tokens are the pool that prompts and prefixes start from


def image_init(base: Base, seed: int, empty: bool) -> Init:
    """Return what a method may draw on.

    Args:
        base: a base that reads images.
        seed: of the noise and of the method.
        empty: the tensors will be overwritten (loading): skip forwards of the base.
    """
    stack = base.anatomy.stacks[0]
    generator = torch.Generator().manual_seed(seed)

    def images() -> Tensor:
        return noise(base, IMAGES, generator)

    def embed(text: str) -> Tensor:
        raise _no_words(text)

    def embed_ids(ids: Sequence[int]) -> Tensor:
        if empty:
            return torch.zeros(len(ids), stack.width)
        with torch.no_grad():
            tokens = stack.patches(images())[:, stack.before :]  # type: ignore[misc]
        pool = tokens.flatten(0, 1).float().cpu()
        return pool[torch.tensor(list(ids)) % len(pool)]

    def kv(text: str, length: int) -> dict[str, tuple[Tensor, Tensor]]:
        if text:
            raise _no_words(text)
        sites = [site for _, site in base.anatomy.kv_modules]
        if empty:
            return {s.name: tuple(torch.zeros(length, s.heads, s.head_dim) for _ in "kv") for s in sites}  # type: ignore[misc]
        installed = base._installed
        with torch.no_grad(), installed.context.use(as_route(None)), installed.recording() as found:
            stack.module(pixel_values=images())
        columns = next(iter(found.values()))[0].shape[2]
        picks = torch.randint(IMAGES * columns, (length,), generator=generator)

        def choose(values: Tensor) -> Tensor:  # (images, heads, T, head dim) -> (length, heads, head dim)
            return values.transpose(1, 2).flatten(0, 1).float().cpu()[picks].clone()

        return {s.name: (choose(found[s.name][0]), choose(found[s.name][1])) for s in sites}

    def frequent(count: int) -> list[int]:
        return list(range(min(count, IMAGES * (tokens_per_picture(base) - stack.before))))

    def word_ids(words: Sequence[str]) -> tuple[list[int], set[str]]:
        raise _no_words(" ".join(words))

    return Init(generator, embed, kv, embed_ids, (), frequent, word_ids)


def _no_words(text: str) -> ConfigError:
    return ConfigError(
        f"this base reads images and knows no words, so nothing can start from {text!r}: leave the text out"
    )
