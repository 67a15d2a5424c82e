"""One model class against every method: what can be added, and whether it is right where it can.

Right means: a fresh adapter changes nothing (as far as its method says so), a moved one shows, and each row of one
mixed batch equals that row alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onebase.base import Base
from onebase.errors import OnebaseError
from onebase.methods import all_methods
from onebase.support.shrink import BOS, EOS, PAD, VOCABULARY, build

CLOSE = 1e-4  # largest difference of a row in a batch and alone, relative to its largest value
VISIBLE = 3e-6  # a moved adapter that changes less is not seen
LENGTHS = (5, 9, 7)  # tokens of the rows of a batch, in turn
FIRST = 4
UNTRIED = ("union",)  # as good as its parts
# Settings that need no data; a method that is not listed is tried with its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "prefix": {"length": 3, "init": "random"},
    "prompt": {"length": 2, "init": "uniform"},
    "bitfit": {"create": True},
    "tokens": {"words": ["w9", "w20"]},
}
YES = "yes"


@dataclass
class Trial:
    """What one class gave.

    Attributes:
        model_type: the class's family.
        source: 'row' or 'discovery'; '' where nothing was built or found.
        reason: why the whole class is out, '' if it is not.
        methods: method -> 'yes', or the reason against it.
        padding: sides on which rows cannot be padded.
        wrong: what raised nothing and was not right; must be empty.
    """

    model_type: str
    source: str = ""
    reason: str = ""
    methods: dict[str, str] = field(default_factory=dict)
    padding: tuple[str, ...] = ()
    wrong: list[str] = field(default_factory=list)


def general(reason: str) -> str:
    """Return a reason without the names and numbers of one model, so that equal reasons read alike."""
    text = " ".join(reason.split())
    text = re.sub(r"^\w+ at [\w/*]+: |^\w+: (?=\w)", "", text)
    text = re.sub(
        r"\w+ computes with tensors of its own \(.*\), which", "a module computes with its own tensors, which", text
    )
    text = re.sub(r"changes by [^,]+,", "changes,", text)
    text = re.sub(r"(?<=[./ ])\d+(?=[./ ])", "*", text)
    text = re.sub(r"^[\w.*]+: (?=\w)", "", text)
    text = re.sub(r"^[\w.*]+ (runs) [\d*]+ times", r"a linear map \1 several times", text)
    text = re.sub(r"\(\d+(, \d+)*,?\)", "(...)", text)
    text = re.sub(r"\d+(\.\d+)?(e-?\d+)?(?= in training| it is| before)", "...", text)
    return text[:200]


def attempt(model_type: str) -> Trial:
    """Build a class and try every method on it."""
    trial = Trial(model_type)
    try:
        model = build(model_type)
    except Exception as error:
        trial.reason = f"not built: {type(error).__name__}: {general(str(error))[:120]}"
        return trial
    try:
        base = Base(model, _tokenizer())
    except OnebaseError as error:
        trial.reason = general(str(error))
        return trial
    with base, torch.no_grad():
        trial.source = base.anatomy.source
        trial.padding = tuple(sorted({side for stack in base.anatomy.stacks for side in stack.padding}))
        _try_methods(base, trial)
    return trial


def _try_methods(base: Base, trial: Trial) -> None:
    row = _tokens(1, 8)[0]
    row[1], row[6] = 9, 20  # the words whose embeddings `tokens` trains
    plain = _alone(base, row, None)
    for number, (name, cls) in enumerate(all_methods().items()):
        if name in UNTRIED:
            continue
        try:
            method = cls.from_settings(SETTINGS.get(name, {}))
            adapter = base.add(name, method, seed=number)
        except OnebaseError as error:
            trial.methods[name] = general(str(error))
            continue
        try:
            start = _gap(_alone(base, row, name), plain)
            if method.epsilon is not None and start > max(method.epsilon, 1e-6):
                trial.wrong.append(f"{name} starts {start:.2g} away")
            generator = torch.Generator().manual_seed(100 + number)
            for parameter in adapter.module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if _gap(_alone(base, row, name), plain) <= VISIBLE:
                trial.wrong.append(f"{name} shows nowhere")
            trial.methods[name] = YES
        except OnebaseError as error:
            trial.methods[name] = general(str(error))
            base.remove(name)
        except Exception as error:
            trial.methods[name] = trial_failure(trial, name, error)
            base.remove(name)
    added = [name for name, answer in trial.methods.items() if answer == YES]
    try:
        _compare(base, trial, added)
    except Exception as error:
        trial.wrong.append(f"a mixed batch raises {type(error).__name__}: {general(str(error))}")


def trial_failure(trial: Trial, name: str, error: Exception) -> str:
    """Note an exception that is no answer: the method was added, and the call broke."""
    trial.wrong.append(f"{name} raises {type(error).__name__}: {general(str(error))}")
    return "breaks"


def _compare(base: Base, trial: Trial, added: Sequence[str]) -> None:
    """Check each row of mixed batches, padded where the base can be, against that row alone."""
    names = [*added, None, *reversed(added)]
    sides = [side for side in ("right", "left") if side not in trial.padding] or [""]
    lengths = [LENGTHS[i % 3] if sides != [""] else LENGTHS[1] for i in range(len(names))]
    rows = [_tokens(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    alone = [_alone(base, row, name) for row, name in zip(rows, names)]
    for side in sides:
        width = max(lengths)
        ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        with base.use(names):
            out = _values(base.model(**_inputs(base, ids, mask)))
        for i, name in enumerate(names):
            found = out[i] if base.is_encoder_decoder else out[i, mask[i].bool()]
            gap = _gap(found, alone[i])
            if gap > CLOSE:
                trial.wrong.append(
                    f"{name or 'the base'} in a mixed batch, padded {side or 'nowhere'}: off by {gap:.2g}"
                )


def _tokenizer() -> Any:
    """Return a tokenizer of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    special = {"bos_token": f"w{BOS}", "pad_token": f"w{PAD}", "eos_token": f"w{EOS}", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def tried() -> list[str]:
    """Return the names of the methods that a trial tries."""
    return [name for name in all_methods() if name not in UNTRIED]


def _tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST, VOCABULARY, (rows, length), generator=generator)


def _inputs(base: Base, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    if base.is_encoder_decoder:
        call["decoder_input_ids"] = torch.tensor([[BOS, 5, 6]] * len(ids))
    if base.anatomy.stacks[-1].causal:
        call["use_cache"] = False
    return call


def _alone(base: Base, row: Tensor, name: str | None) -> Tensor:
    with base.use(name):
        return _values(base.model(**_inputs(base, row[None])))[0]


def _values(output: Any) -> Tensor:
    """Return logits, or the last hidden state of a model without an LM head."""
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def _gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite where something is not finite."""
    if one.shape != other.shape or not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


def as_plain(trial: Trial) -> Mapping[str, Any]:
    """Return a trial as JSON values."""
    return {**vars(trial), "padding": list(trial.padding)}
