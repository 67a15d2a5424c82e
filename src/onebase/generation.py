"""Generation: mixed batches, beams and seeded sampling, each row as if it were alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.data.messages import is_conversation
from onebase.encode import Encoded, collate, pad_id
from onebase.errors import ConfigError, UnsupportedError, unknown
from onebase.tasks import get_task
from onebase.words import seen

if TYPE_CHECKING:
    from onebase.base import Base


@dataclass(frozen=True)
class Shape:
    """What reshapes a row's distribution before a token is drawn; see `Base.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


def draw(scores: Tensor, shapes: Sequence[Shape | None], generators: Sequence[torch.Generator | None]) -> Tensor:
    """Choose a token for each row: drawn from its own generator, or the most probable one.

    Sampling is by the Gumbel-max rule: argmax of (score + Gumbel noise) is a draw from softmax(score). The noise of
    a row depends on its generator alone, so a row draws the same tokens in any batch.

    Args:
        scores: (B, V) logits, float32.
        shapes: per row how it draws; None takes the most probable token.
        generators: per row, None where it does not draw.

    Returns:
        (B,) token ids.
    """
    chosen = scores.argmax(-1)
    for shape in dict.fromkeys(shape for shape in shapes if shape is not None):
        rows = [i for i, other in enumerate(shapes) if other == shape]
        own = scores[rows]
        for warper in warpers(shape):
            own = warper(None, own)
        noise = torch.stack([torch.rand(scores.shape[1], generator=generators[i]) for i in rows])
        noise = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(scores.device)
        chosen[rows] = (own.float() + noise).argmax(-1)
    return chosen


class RowSampler:
    """A logits processor that draws each row's token by its own settings and leaves that one possible.

    Args:
        seeds: one per row, None where it takes the most probable token.
        shapes: per row how it draws, None likewise.
    """

    def __init__(self, seeds: Sequence[int | None], shapes: Sequence[Shape | None]):
        self.shapes = list(shapes)
        self.generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) with every token but the chosen one at -inf."""
        chosen = draw(scores, self.shapes, self.generators)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class RowStop:
    """A stopping criterion by row: a row is done once it has written its adapter's end of turn.

    Args:
        stops: per row the token ids that end it, () for none.
        start: tokens of the prompt, which do not count.
    """

    def __init__(self, stops: Sequence[Sequence[int]], start: int):
        self.stops, self.start = [list(stop) for stop in stops], start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return (rows,) whether each is done; beams of one prompt are neighbours."""
        copies = len(input_ids) // len(self.stops)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for i, row in enumerate(input_ids):
            stop = self.stops[i // copies]
            if stop and len(row) - self.start >= len(stop):
                done[i] = row[-len(stop) :].tolist() == stop
        return done


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample `index` of a row: sample 0 uses the row's own."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63  # golden-ratio steps keep the streams apart


def warpers(shape: Shape) -> list[Any]:
    """Return transformers' own warpers for a shape, in its order."""
    from transformers.generation import logits_process as lp

    if shape.temperature <= 0:
        raise ConfigError(
            f"temperature = {shape.temperature!r}: expected a positive number; for greedy pass do_sample=False"
        )
    found: list[Any] = []
    if shape.temperature != 1.0:
        found.append(lp.TemperatureLogitsWarper(float(shape.temperature)))
    if shape.top_k:
        found.append(lp.TopKLogitsWarper(top_k=shape.top_k))
    if shape.top_p is not None and shape.top_p < 1.0:
        found.append(lp.TopPLogitsWarper(top_p=shape.top_p))
    if shape.min_p is not None:
        found.append(lp.MinPLogitsWarper(min_p=shape.min_p))
    return found


def encode_prompts(base: Base, prompts: Sequence[Any], names: Sequence[str | None]) -> list[Encoded]:
    """Encode prompts, each through the template of its adapter; token ids are taken as they are."""
    rows = []
    for prompt, name in zip(prompts, names):
        if not isinstance(prompt, str) and not is_conversation(prompt):
            rows.append(Encoded(tuple(int(i) for i in prompt)))
            continue
        spec: dict[str, Any] = base.adapters[name].task if name is not None else {}
        kind = spec.get("kind", "causal-lm" if isinstance(prompt, str) else "chat")
        with base.encoding:
            ids = get_task(kind).prompt(seen(base, base.tokenizer_of(name)), spec, prompt)
        rows.append(Encoded(tuple(ids) or (pad_id(base.tokenizer),)))
    return rows


def generate_ids(
    base: Base,
    prompts: Sequence[Any],
    names: Sequence[str | None],
    *,
    max_new_tokens: int,
    do_sample: bool,
    seeds: Sequence[int] | None,
    shape: Shape,
    num_beams: int,
    num_return_sequences: int,
    settings: dict[str, Any],
) -> list[list[list[int]]]:
    """Generate for every prompt; see `Base.generate`.

    Returns:
        per prompt, per returned sequence: the new token ids, without EOS.
    """
    if do_sample and num_beams > 1:
        raise UnsupportedError("beam sampling draws from all beams at once, so no row would equal itself alone")
    if num_beams > 1 and num_return_sequences > num_beams:
        raise ConfigError(f"num_return_sequences = {num_return_sequences}: expected at most num_beams = {num_beams}")
    if not do_sample and num_beams == 1 and num_return_sequences > 1:
        raise ConfigError("greedy search has one result: pass do_sample=True or num_beams")
    _check_settings(settings)
    rows, names = encode_prompts(base, prompts, names), list(names)
    processors: list[Any] = []
    copies = num_return_sequences if do_sample else 1
    if do_sample:
        warpers(shape)  # refuses a temperature before anything is computed
        rows = [row for row in rows for _ in range(copies)]
        names = [name for name in names for _ in range(copies)]
        drawn = seeds if seeds is not None else torch.randint(2**62, (len(prompts),)).tolist()
        own = [sample_seed(seed, k) for seed in drawn for k in range(copies)]
        processors = [RowSampler(own, [shape] * len(own))]
    returned = 1 if do_sample else num_return_sequences
    settings = {**settings, "num_beams": num_beams, "num_return_sequences": returned}
    sequences = write_rows(base, rows, names, max_new_tokens, settings, processors)
    per = num_return_sequences
    return [sequences[i * per : (i + 1) * per] for i in range(len(prompts))]


def write_rows(
    base: Base,
    rows: Sequence[Encoded],
    names: Sequence[str | None],
    max_new_tokens: int,
    settings: dict[str, Any],
    processors: Sequence[Any] = (),
    criteria: Sequence[Any] = (),
) -> list[list[int]]:
    """Continue encoded prompts in one batch of transformers' `generate`, without its sampling.

    Args:
        base: writes.
        rows: prompts.
        names: one adapter per row, None for the plain base.
        max_new_tokens: at most this many new tokens, of any row.
        settings: fields of transformers' GenerationConfig.
        processors: logits processors, after those of the settings.
        criteria: further stopping criteria, asked after every step.

    Returns:
        per returned sequence, those of a row side by side: the new token ids, without EOS.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    settings = dict(settings)
    beams = settings.setdefault("num_beams", 1)
    side = "right" if base.is_encoder_decoder else "left"
    batch = collate(rows, pad_id(base.tokenizer), side, base.device)
    start = 1 if base.is_encoder_decoder else batch["input_ids"].shape[1]
    ends = [end_of(base, name) for name in names]
    own = base.model.generation_config
    eos = settings.pop("eos_token_id", eos_of(base))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id(base.tokenizer),
        eos_token_id=eos,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        **settings,
    )
    lengths = [len(row.ids) for row in rows]
    route = base.use(names, repeat=beams, prompts=lengths)
    with torch.no_grad(), base._installed.without_checkpointing(), base._installed.fast_products(), route:
        output = base.model.generate(
            **{k: batch[k] for k in ("input_ids", "attention_mask")},
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([*([RowStop(ends, start)] if any(ends) else []), *criteria]),
        )
    stops = set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    per_row = len(output) // len(ends)
    return [
        until(row[start:].tolist(), stops, pad_id(base.tokenizer), ends[i // per_row]) for i, row in enumerate(output)
    ]


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise unless transformers knows every setting: it keeps others without a word, and nothing reads them."""
    from transformers import GenerationConfig

    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in settings:
        if name in ("streamer", "logits_processor", "stopping_criteria", "assistant_model"):
            raise ConfigError(f"{name} is an object that transformers calls: pass it to base.bind(names).generate")
        if name not in fields:
            raise unknown("setting of generate", name, fields)


def eos_of(base: Base) -> Any:
    """Return the token id, or ids, that end a text of a base; None where nothing does."""
    own = base.model.generation_config.eos_token_id
    return own if own is not None else base.tokenizer.eos_token_id


def end_of(base: Base, name: str | None) -> tuple[int, ...]:
    """Return the token ids that end an answer of an adapter beside the base's own, () for none."""
    return () if name is None else tuple(base.adapters[name].task.get("stop") or ())


def until(ids: list[int], stops: set[int], pad: int, end: Sequence[int] = ()) -> list[int]:
    """Cut at the first end of text or turn; without one, drop the padding that other rows' lengths left behind."""
    for place, token in enumerate(ids):
        if token in stops or (end and ids[place : place + len(end)] == list(end)):
            return ids[:place]
    while ids and ids[-1] == pad and pad not in stops:
        ids = ids[:-1]
    return ids
