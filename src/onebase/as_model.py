"""An adapter as a trainable module: parameters and state are the adapter and head only."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.errors import ConfigError, UnsupportedError
from onebase.tasks import get_task

if TYPE_CHECKING:
    from onebase.base import Base


class AdapterModel(nn.Module):
    """One adapter over its base, for Trainer, TRL, pipelines, DDP and FSDP.

    The base is held outside the module tree: it is neither saved, nor moved, nor synchronised, nor optimised.

    Args:
        base: the base that carries the adapter.
        adapter: the adapter.
    """

    _base: Base
    _adapter: Adapter

    def __init__(self, base: Base, adapter: Adapter):
        super().__init__()
        if adapter.task.get("pairs") == "apart":
            raise UnsupportedError(
                f"adapter {adapter.name!r} reads the two texts of a pair in rows of their own, a module has one row "
                "per example: train it with onebase.train, or with pairs='joint'"
            )
        self.adapter = adapter.module
        self.head = adapter.head
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_adapter", adapter)
        self.config = copy.deepcopy(base.model.config)  # a copy: Trainer writes into the config of what it trains

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` uses Trainer's `num_items_in_batch`: a head does, an LM head where the base does."""
        model = self._base.model
        takes = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
        return self.head is not None or bool(getattr(model, "accepts_loss_kwargs", takes))

    @property
    def loss_type(self) -> str | None:
        """Which loss transformers computes for the LM head: Trainer counts shifted labels by it."""
        return getattr(self._base.model, "loss_type", None) if self.head is None else None

    @property
    def device(self) -> torch.device:
        """The base's device."""
        return self._base.device

    @property
    def main_input_name(self) -> str:
        """Name of the first input, as transformers calls it."""
        return "input_ids"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ):
        """Run the base under this adapter.

        Args:
            input_ids, attention_mask: (B, T).
            labels: what the task compares with: (B,) class numbers, (B, T) token ids for the LM head, ...
            num_items_in_batch: labels in all micro-batches of a step, which Trainer passes: the loss is then their
                share of the step's mean.
            inputs: further inputs of the base model.

        Returns:
            A SequenceClassifierOutput, or the base model's own output where its LM head serves.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        name = self._adapter.name
        if self.head is None:
            with self._base.use(name):
                more = {"labels": labels, **inputs} if labels is not None else inputs
                if num_items_in_batch is not None:
                    more = {"num_items_in_batch": num_items_in_batch, **more}
                return self._base.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch = {"input_ids": input_ids, "attention_mask": mask, **inputs}
        unknown = [key for key in inputs if key != "token_type_ids"]
        if unknown:
            raise ConfigError(f"inputs {unknown} are not used by a head")
        spec = self._adapter.task
        task = get_task(spec["kind"])
        logits = task.read(self.head, self._base.states(batch, name), mask, spec)
        loss = None
        if labels is not None:
            sums, counts = task.tensor_loss(logits, labels, spec)
            loss = sums.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Turn on checkpointing of the base's layers (onebase's own setting; the arguments are what Trainer passes)."""
        self._base.gradient_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Turn checkpointing off."""
        self._base.gradient_checkpointing(False)

    gradient_checkpointing_enable = activation_checkpointing_enable  # the names before transformers 5.23
    gradient_checkpointing_disable = activation_checkpointing_disable

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the adapter as a folder that `Base.load` reads.

        Args:
            folder: a new or empty folder.
        """
        from onebase.storing import export_folder

        export_folder(self._base, self._adapter, Path(folder))
