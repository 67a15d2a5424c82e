"""An adapter as a trainable module: parameters and state are the adapter and head only."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.errors import ConfigError, UnsupportedError
from onebase.heads import TiedHead
from onebase.tasks import get_task

if TYPE_CHECKING:
    from onebase.base import Base


class AdapterModel(nn.Module):
    """One adapter over its base, for Trainer, TRL, pipelines, DDP and FSDP.

    The base is held outside the module tree: it is neither saved, nor moved, nor synchronised, nor optimised.

    Args:
        base: the base that carries the adapter.
        adapter: the adapter; None is the plain base, the reference of preference trainers: without parameters, and
            with the base's fingerprint as its state, so that what is cached by state is not another base's.
    """

    _base: Base
    _adapter: Adapter | None

    def __init__(self, base: Base, adapter: Adapter | None):
        super().__init__()
        if adapter is not None and adapter.task.get("pairs") == "apart":
            raise UnsupportedError(
                f"adapter {adapter.name!r} reads the two texts of a pair in rows of their own, a module has one row "
                "per example: train it with onebase.train, or with pairs='joint'"
            )
        self.adapter = None if adapter is None else adapter.module
        self.head = None if adapter is None else adapter.head
        # Trainers switch dropout off by p = 0 in every nn.Dropout; deltas draw it by a function, and follow this one.
        self.dropout = nn.Dropout(1.0)
        if adapter is None:
            self.register_buffer("base", torch.tensor(list(base.fingerprint().encode()), dtype=torch.uint8))
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_adapter", adapter)
        # copies: trainers write into the settings of what they train
        self.config = copy.deepcopy(base.model.config)
        self.generation_config = copy.deepcopy(getattr(base.model, "generation_config", None))
        self.model_tags: list[str] = []

    @property
    def _name(self) -> str | None:
        return None if self._adapter is None else self._adapter.name

    def train(self, mode: bool = True) -> AdapterModel:
        """Switch dropout of the deltas, unless somebody set the rate of `dropout` to 0."""
        super().train(mode)
        if self.adapter is not None and not self.dropout.p:
            self.adapter.train(False)
        return self

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
    def dtype(self) -> torch.dtype:
        """The base's dtype; parameters of adapters are float32."""
        return self._base.model.dtype

    @property
    def base_model(self) -> Callable[..., Any]:
        """The base's stack without its LM head, under this adapter: for trainers that multiply by the head themselves.

        Raises:
            UnsupportedError: the adapter has a head of its own, which they would leave out.
        """
        self._refuse_head("a trainer that computes tokens from hidden states")
        return self._base.bind(self._name, self._base.model.base_model)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the base's LM head; errors as of `base_model`."""
        self._refuse_head("a trainer that reads the LM head")
        return self._base.model.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's embeddings of tokens."""
        return self._base.model.get_input_embeddings()

    def can_generate(self) -> bool:
        """Whether this writes text: the base has an LM head, and the adapter none of its own."""
        return self.head is None and self._base.has_lm_head

    def generate(self, *args: Any, generation_config: Any = None, **settings: Any) -> Any:
        """Call transformers' `generate` under this adapter, with this module's `generation_config`."""
        self._refuse_head("generate")
        config = self.generation_config if generation_config is None else generation_config
        return self._base.bind(self._name).generate(*args, generation_config=config, **settings)

    def _refuse_head(self, what: str) -> None:
        if self.head is not None:
            assert self._adapter is not None
            raise UnsupportedError(
                f"adapter {self._name!r} has a {self._adapter.task['kind']} head, which {what} would leave out: add it "
                "with a task that writes, such as {'kind': 'causal-lm'}"
            )

    def add_model_tags(self, tags: str | Sequence[str]) -> None:
        """Keep words about how this was trained; `save_pretrained` writes them into the provenance."""
        self.model_tags += [t for t in ([tags] if isinstance(tags, str) else tags) if t not in self.model_tags]

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

        name = self._name
        if self.head is None or self._adapter is None:
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
        if isinstance(self.head, TiedHead):
            logits = self.head.logits(logits)
        loss = None
        if labels is not None:
            sums, counts = task.tensor_loss(logits, labels, spec)
            loss = sums.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Turn on checkpointing of the base's layers (onebase's own setting; the arguments are what Trainer passes)."""
        self._base.gradient_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Turn checkpointing off."""
        self._base.gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the base's layers are checkpointed."""
        return self._base._installed.checkpointed

    gradient_checkpointing_enable = activation_checkpointing_enable  # the names before transformers 5.23
    gradient_checkpointing_disable = activation_checkpointing_disable

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the adapter as a folder that `Base.load` reads.

        Args:
            folder: a new or empty folder.

        Raises:
            ConfigError: this is the plain base, which has nothing to write.
        """
        from onebase.storing import export_folder

        if self._adapter is None:
            raise ConfigError("this is the plain base: save the module of an adapter")
        tags = {"provenance": {"tags": self.model_tags}} if self.model_tags else {}
        export_folder(self._base, self._adapter, Path(folder), **tags)
