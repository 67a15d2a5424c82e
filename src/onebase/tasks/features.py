"""No task: an adapter without a head gives embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from onebase.encode import Encoded, encode_windows
from onebase.errors import ConfigError
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Prediction, Task

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Rows


@register_task
class Features(Task):
    """Pooled states, as they are."""

    kind: ClassVar[str] = "features"
    summary: ClassVar[str] = "no head: embeddings"
    embeds: ClassVar[bool] = True

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Refuse: there is nothing to train."""
        raise ConfigError("features is no task that can be trained: it has no loss. Try embeddings")

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Encode texts, or pictures for a base that reads images."""
        if base.reads_images:
            from onebase.tasks.images import picture_rows

            return [[row] for row in picture_rows(base, texts)]
        return encode_windows(base.tokenizer, spec, texts, pairs)

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return the embedding."""
        return Prediction(name, None, {}, values[0].float().cpu(), rows[0].cut)
