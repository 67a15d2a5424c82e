"""Merged encoders as ONNX, written by torch's own exporter and asked the probes by onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from onebase.base import Base

FILE = "model.onnx"
INSTALL = "ONNX files need onnx, onnxscript and onnxruntime: pip install 'onebase[onnx]'"


class _Encoder(nn.Module):
    """The model as a function of ids and mask alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, or the last hidden states (B, T, D)."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return found.logits if "logits" in found else found.last_hidden_state


def check_onnx(base: Base) -> None:
    """Raise unless this base can be written: an encoder, and the packages are there.

    Raises:
        UnsupportedError: it writes text, or reads images.
        ConfigError: a package is missing.
    """
    stack = base.anatomy.stacks[-1]
    if base.is_encoder_decoder or stack.causal or stack.patches is not None:
        raise UnsupportedError(
            f"onnx is written of encoders that read text; {base.id} is a {type(base.model).__name__}, whose cache or "
            "input needs an exporter of its own: onebase merge NAME --out MODEL, then optimum-cli export onnx --model "
            "MODEL OUT (pip install 'optimum-onnx')"
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{INSTALL} ({error})") from None


def write_onnx(model: Any, folder: Path, vocabulary: int) -> Path:
    """Write a plain model (no hooks of ours) as model.onnx, for any number of rows and tokens.

    Args:
        model: an encoder of transformers, float32, on the CPU.
        folder: where to.
        vocabulary: ids to trace with are below it.
    """
    ids = torch.arange(14).reshape(2, 7) % max(1, vocabulary - 1)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=2, max=100_000)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            _Encoder(model).eval(), (ids, mask), dynamo=True, verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["output"], dynamic_shapes={"input_ids": {0: rows, 1: tokens},
                                                     "attention_mask": {0: rows, 1: tokens}},
        )  # fmt: skip
        assert program is not None
        program.save(str(folder / FILE))
    return folder / FILE


def answers_of(file: Path, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return what onnxruntime computes for (ids, mask) pairs, (B, T) each."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
        for ids, mask in batches
    ]
