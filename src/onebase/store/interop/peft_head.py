"""The classification heads that PEFT saves beside an adapter, per family of models, as heads here and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.errors import UnsupportedError
from onebase.heads import DenseHead, LinearHead

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store.interop.peft_read import PeftFile

PROMPTS = ("PROMPT_TUNING", "P_TUNING")


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """How the sequence classifier of a family computes.

    Attributes:
        out: module of the last linear map.
        inner: module of the hidden layer that is saved with it, '' where there is none.
        activation: of the hidden layer.
        pooler: the hidden layer is the base's own pooler.
        pooling: which token's state is read.
        bias: the last map has a bias.
    """

    out: str
    inner: str = ""
    activation: str = ""
    pooler: bool = False
    pooling: str = "first"
    bias: bool = True


_ROBERTA = HeadForm(out="classifier.out_proj", inner="classifier.dense", activation="tanh")
_SCORE = HeadForm(out="score", pooling="last", bias=False)
# model_type -> form, from the ...ForSequenceClassification classes of transformers
FORMS: dict[str, HeadForm] = {
    "bert": HeadForm(out="classifier", activation="tanh", pooler=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
    "electra": HeadForm(out="classifier.out_proj", inner="classifier.dense", activation="gelu"),
    "distilbert": HeadForm(out="classifier", inner="pre_classifier", activation="relu"),
    **dict.fromkeys(
        ("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "opt", "phi", "gptj", "gpt_neox",
         "falcon", "bloom"),
        _SCORE,
    ),
}  # fmt: skip


def read_head(file: PeftFile, base: Base, labels: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of the task and the head's tensors; what does not fit goes on the file's list of problems."""
    kind = file.config.get("task_type")
    if kind != "SEQ_CLS":
        reason = "" if kind in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION") else f" of a {kind} head"
        file.wrong += [f"tensor {key}{reason}: onebase has no place for it" for key in file.head]
        if reason and not file.head:
            file.wrong.append(f"task_type = {kind!r}: only heads of SEQ_CLS can be read")
        if labels:
            file.wrong.append(f"labels were given, but task_type = {kind!r} has none")
        return {}, {}
    form = FORMS.get(base.anatomy.model_type)
    if form is None or base.is_encoder_decoder:
        file.wrong.append(f"a classification head on {base.anatomy.model_type}: onebase knows no head of this family")
        return {}, {}
    if file.kind in PROMPTS and form.pooling == "first":
        file.wrong.append("the head reads the first column, which is a virtual token; heads here read tokens of texts")
        return {}, {}
    return _classification(file, base, form, labels)


def _classification(
    file: PeftFile, base: Base, form: HeadForm, labels: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    given = dict(file.head)
    if form.out.startswith("classifier"):
        given = {key: t for key, t in given.items() if not key.startswith("score.")}
    weight = given.pop(f"{form.out}.weight", None)
    if weight is None or weight.dim() != 2:
        file.wrong.append(f"missing tensor base_model.model.{form.out}.weight (labels, {base.anatomy.hidden_size})")
        return {}, {}
    outputs = len(weight)
    bias = given.pop(f"{form.out}.bias", None) if form.bias else torch.zeros(outputs)
    if bias is None or len(bias) != outputs:
        file.wrong.append(f"missing tensor base_model.model.{form.out}.bias ({outputs},)")
        return {}, {}
    if outputs < 2:
        file.wrong.append(f"{form.out}.weight has {outputs} row: regression heads cannot be read")
    names = labels or tuple(f"LABEL_{i}" for i in range(outputs))
    if len(names) != outputs or len(set(names)) != outputs:
        file.wrong.append(f"{len(names)} labels were given ({', '.join(names)}), the head has {outputs}")
    head = {"head.weight": weight, "head.bias": bias}
    task: dict[str, Any] = {"kind": "classification", "labels": list(names), "pooling": form.pooling,
                            "metric": "accuracy"}  # fmt: skip
    if form.pooler or form.inner:
        inner = _inner(file, base, form, given)
        if any(t is None for t in inner):
            file.wrong.append(f"missing tensors base_model.model.{form.inner}.weight and .bias")
            return {}, {}
        head["head.inner_weight"], head["head.inner_bias"] = inner  # type: ignore[assignment]
        if form.pooler and file.pooler is not None:
            head["head.inner_weight"] = torch.add(head["head.inner_weight"], file.pooler)  # type: ignore[arg-type]
        task["head"] = {"hidden": len(inner[1]), "activation": form.activation}  # type: ignore[arg-type]
    width = head["head.weight"].shape[1]
    head["head.center"], head["head.scale"] = torch.zeros(width), torch.ones(width)
    file.wrong += [f"unexpected tensor {key} {tuple(t.shape)}" for key, t in given.items()]
    return task, head


def _inner(file: PeftFile, base: Base, form: HeadForm, given: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return weight and bias of the hidden layer: saved in the file, or the base's pooler."""
    path = f"{file.modules.named}.pooler.dense" if form.pooler else form.inner
    if form.pooler and f"{path}.weight" not in given:
        return _pooler(base)
    return tuple(given.pop(f"{path}.{what}", None) for what in ("weight", "bias"))


def _pooler(base: Base) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the pooler that the head reads; a base with another head keeps it in its checkpoint.

    Raises:
        UnsupportedError: neither the base nor its checkpoint has one.
    """
    pooler = base.anatomy.stacks[0].pooler
    if pooler is None:
        pooler = _pooler_of_checkpoint(base)
    dense = getattr(pooler, "dense", None)
    if not isinstance(dense, nn.Linear):
        raise UnsupportedError(
            f"the head reads the pooler, which {type(base.model).__name__} lacks: pass Base a model with one, such as "
            "AutoModel.from_pretrained(...)"
        )
    assert dense.bias is not None
    return dense.weight.detach().float().cpu().clone(), dense.bias.detach().float().cpu().clone()


def _pooler_of_checkpoint(base: Base) -> nn.Module | None:
    from transformers import AutoModel

    source = str(getattr(base.model.config, "_name_or_path", "") or "")
    if not source:
        return None
    try:
        model, info = AutoModel.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError):
        return None
    return None if any("pooler" in key for key in info["missing_keys"]) else getattr(model, "pooler", None)


def plain_linear(head: LinearHead) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the last map with the standardisation folded in: the same function, exactly."""
    weight = (head.weight * head.scale).detach().cpu()
    bias = (head.bias - (head.weight * head.scale) @ head.center).detach().cpu()
    return weight, bias


def write_head(base: Base, head: nn.Module, task: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a head under the names of the family's sequence classifier.

    Raises:
        UnsupportedError: the family's classifier computes in another form, and how.
    """
    kind = base.anatomy.model_type
    form = FORMS.get(kind)
    if form is None:
        raise UnsupportedError(f"PEFT keeps heads of ...ForSequenceClassification classes; {kind} has none known here")
    if type(head) not in (LinearHead, DenseHead) or task["kind"] != "classification":
        raise UnsupportedError(f"a head of the task {task['kind']} has no form in PEFT: only classification has one")
    assert isinstance(head, LinearHead)
    if task["pooling"] != form.pooling:
        raise UnsupportedError(
            f"the head reads pooling={task['pooling']!r}, the classifier of {kind} in transformers the {form.pooling} "
            f"token: train with pooling={form.pooling!r} to export the head"
        )
    weight, bias = plain_linear(head)
    out = {f"{form.out}.weight": weight}
    if form.bias:
        out[f"{form.out}.bias"] = bias
    elif float(bias.abs().max()) > 0:
        raise UnsupportedError(
            f"the head has a bias (largest {float(bias.abs().max()):.3g}), and the classifier of {kind} has none"
        )
    return out | _write_inner(base, head, form)


def _write_inner(base: Base, head: LinearHead, form: HeadForm) -> dict[str, Tensor]:
    if not (form.inner or form.pooler):
        if isinstance(head, DenseHead):
            raise UnsupportedError(f"the head has a hidden layer, and the classifier of {base.anatomy.model_type} none")
        return {}
    if not isinstance(head, DenseHead) or head.activation != form.activation:
        raise UnsupportedError(
            f"the classifier of {base.anatomy.model_type} has a hidden layer with {form.activation}, the head has "
            f"{head.activation if isinstance(head, DenseHead) else 'none'}"
        )
    inner = {"weight": head.inner_weight.detach().cpu(), "bias": head.inner_bias.detach().cpu()}
    if form.inner:
        return {f"{form.inner}.{name}": t for name, t in inner.items()}
    weight, bias = _pooler(base)
    if not (torch.equal(weight, inner["weight"]) and torch.equal(bias, inner["bias"])):
        return {f"pooler.dense.{name}": t for name, t in inner.items()}
    return {}
