"""ViT: an encoder that reads images.

Virtual tokens stand directly behind the CLS token and have no position, as in Visual Prompt Tuning (Jia et al. 2022,
arXiv 2203.12119, the shallow form): they join after patches and positions were embedded. So the CLS token stays the
first, which poolers and classifiers read, and the patches keep their positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onebase.anatomy.families.common import heads
from onebase.anatomy.rows import Family, Pixels, StackRow, SubLayer
from onebase.core.site import Ref


def _tokens(embeddings: Any, pixels: Tensor) -> int:
    """Return how many tokens images (B, C, H, W) become: one per patch, and the CLS token."""
    height, width = embeddings.patch_embeddings.patch_size
    return (pixels.shape[2] // height) * (pixels.shape[3] // width) + 1


def _vit(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="attention",
        residual=Ref("layernorm_before", 0),
        parts={part: f"attention.{part}_proj" for part in "qkvo"},
        norms={"norm": "layernorm_before"},
        core="attention",
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp",
        residual=Ref("layernorm_after", 0),
        parts={"up": "mlp.fc1", "down": "mlp.fc2"},
        norms={"norm": "layernorm_after"},
    )
    return (
        StackRow(
            name="encoder",
            layers="layers",
            embed="embeddings.patch_embeddings.projection",
            width=config.hidden_size,
            sublayers=(attention, mlp),
            position_start=None,
            pooler="pooler",
            pixels=Pixels("embeddings", _tokens, before=1),
        ),
    )


ROWS = (Family(("vit",), _vit, heads, "first"),)
