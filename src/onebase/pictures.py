"""Pictures as a base reads them: files and PIL images, through the image processor that the base came with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from onebase.base import Base

# What a processor's settings say beside what it does to pixels: how they were saved, and which of several
# implementations that compute the same was picked.
_INCIDENTAL = ("image_processor_type", "processor_class", "transformers_version", "_processor_class", "use_fast")


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, read when its pixels are asked for: a data set of them never stands in memory.

    Attributes:
        source: a file, or a PIL image.
        processor: the base's image processor.
        channels: that the base reads: 3 for colour, 1 for grey.
    """

    source: Any
    processor: Any
    channels: int = 3

    @property
    def key(self) -> Any:
        """What tells pictures apart: the file, or the image in memory."""
        return self.source if isinstance(self.source, str) else id(self.source)

    def pixels(self) -> Tensor:
        """Return the pixels (C, H, W), float32, at the size and scale that the base was trained with.

        Raises:
            DataError: the file is gone or is no picture.
        """
        image = opened(self.source, self.channels)
        found = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return found[0].float()


def need_pillow() -> None:
    """Raise ConfigError where the library that reads pictures is not installed."""
    from importlib.util import find_spec

    if find_spec("PIL") is None:
        raise ConfigError("pictures are read with Pillow, which is not installed: pip install 'onebase[images]'")


def opened(source: Any, channels: int = 3) -> Any:
    """Return a PIL image in colour (or grey), turned as the camera was held.

    Args:
        source: the path of a file, or a PIL image, as `pictures` has checked.
        channels: 1 for grey.

    Raises:
        DataError: no such file, or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    image = source
    if isinstance(source, str):
        try:
            with Image.open(source) as file:
                image = ImageOps.exif_transpose(file)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{source}: {problem(Path(source), error)}") from None
    return image.convert("L" if channels == 1 else "RGB")


def problem(path: Path, error: Exception) -> str:
    """Say why a file gives no picture."""
    if not path.exists():
        return "no such file"
    if path.is_dir():
        return "a folder, no picture"
    return f"no picture that can be read ({type(error).__name__})"


def pictures(base: Base, sources: Sequence[Any]) -> list[Picture]:
    """Return the pictures of some files or PIL images, for a base.

    Raises:
        UnsupportedError: the base reads no images, or came without the settings of its image processor.
        DataError: something is neither.
    """
    check_reads_images(base)
    need_pillow()
    from PIL import Image

    for i, source in enumerate(sources):
        if not isinstance(source, str | Path | Image.Image):
            raise DataError(f"picture {i} is {source!r}: expected the path of a file, or a PIL image")
    channels, _, _ = size_of(base)
    return [Picture(str(s) if isinstance(s, Path) else s, base.processor, channels) for s in sources]


def check_reads_images(base: Base) -> None:
    """Raise UnsupportedError where a base cannot read pictures from files."""
    if not base.reads_images:
        raise UnsupportedError(f"{base.id} reads text, no images: load a ViT, e.g. google/vit-base-patch16-224-in21k")
    if base.processor is None:
        raise UnsupportedError(
            f"{base.id} came without preprocessor_config.json, which says how pictures become pixels: add the file to "
            "its folder, or pass Base(model, processor=...)"
        )


def digest_processor(processor: Any) -> str:
    """Return the hash of what an image processor does to pixels, as ``sha256:...``."""
    settings = {key: value for key, value in processor.to_dict().items() if key not in _INCIDENTAL}
    text = json.dumps(settings, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def size_of(base: Base) -> tuple[int, int, int]:
    """Return the channels, height and width of the pictures that a base was made for."""
    size = base.model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(base.model.config.num_channels), int(height), int(width)


def tokens_per_picture(base: Base) -> int:
    """Return how many tokens a picture becomes."""
    return base.anatomy.stacks[0].count(torch.empty(1, *size_of(base), device="meta"))  # type: ignore[misc]


def noise(base: Base, count: int, generator: torch.Generator) -> Tensor:
    """Return pixels (count, C, H, W) of standard normal noise: processors scale pictures to about that range."""
    drawn = torch.randn(count, *size_of(base), generator=generator)
    return drawn.to(base.device, base.anatomy.stacks[0].embed.weight.dtype)  # type: ignore[union-attr,arg-type]
