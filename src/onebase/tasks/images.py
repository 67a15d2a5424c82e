"""Classification of images: one label per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from onebase.encode import Encoded
from onebase.errors import DataError
from onebase.pictures import check_reads_images, pictures, tokens_per_picture
from onebase.tasks.classification import Classification
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Rows


@register_task
class ImageClassification(Classification):
    """One label per picture; everything but the reading is that of texts."""

    kind: ClassVar[str] = "image-classification"
    summary: ClassVar[str] = "one label per picture"
    places: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {"class_weights": "auto"}
    reads: ClassVar[str] = "images"

    def check_base(self, base: Base) -> None:
        """Raise UnsupportedError where a base reads no pictures."""
        check_reads_images(base)

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Return a row per picture; pixels are read when a batch is made."""
        if not len(rows):
            return Examples((), torch.zeros(0))
        return Examples(tuple(picture_rows(base, rows["image"])), self.targets(spec, rows))

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Return a row per picture, given as paths or PIL images."""
        if pairs is not None:
            raise DataError("pictures have no second texts: leave pairs out")
        return [[row] for row in picture_rows(base, texts)]


def picture_rows(base: Base, sources: Sequence[Any]) -> list[Encoded]:
    """Return rows of as many blank tokens as a base makes of a picture, which batches are sized by."""
    found = pictures(base, sources)
    blank = (0,) * tokens_per_picture(base)
    return [Encoded(blank, image=picture) for picture in found]
