"""Generation: mixed batches, beams and seeded sampling, each row as if it were alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.data.messages import is_conversation
from onebase.data.misfit import short
from onebase.encode import Encoded, collate, pad_id
from onebase.errors import ConfigError, DataError, RouteError, UnsupportedError, unknown
from onebase.methods.method import whole
from onebase.tasks import get_task
from onebase.words import seen, vocabulary_size

if TYPE_CHECKING:
    from onebase.base import Base

# Settings by which transformers also reads the padding of a prompt, with the value that turns each off.
COUNTS_PADDING: dict[str, Any] = {
    "bad_words_ids": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "forced_bos_token_id": None,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "sequence_bias": None,
    "watermarking_config": None,
}
WHOLE = ("encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "no_repeat_ngram_size")
POSITIVE = ("encoder_repetition_penalty", "max_time", "repetition_penalty")
BEAMS_ONLY = ("early_stopping", "length_penalty")
# Fields of GenerationConfig that transformers would not read here, or not serve, each with the way out.
REFUSED = {
    name: way_out
    for names, way_out in (
        ("max_length", "it counts the prompt too: pass max_new_tokens"),
        ("typical_p epsilon_cutoff eta_cutoff top_h", "draw with temperature, top_k, top_p or min_p"),
        (
            "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate",
            "only what is written is returned: pass it to base.bind(names).generate",
        ),
        ("pad_token_id", "padding is masked, so its id changes nothing: leave it out"),
        ("bos_token_id", "a prompt starts with what its tokens are: pass token ids that start with it"),
        ("token_healing", "prompts are taken as they are: leave it out"),
        (
            "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
            "prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind "
            "target_lookbehind assistant_ensemble_weight speculation_type use_mtp",
            "rows of many adapters have no assistant that guesses ahead: leave it out",
        ),
        (
            "low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups constraints force_words_ids",
            "transformers needs code from elsewhere for it: use greedy search, num_beams or do_sample=True",
        ),
        (
            "continuous_batching_config max_cache_len prefill_chunk_size transformers_version",
            "it does not change what is written: leave it out",
        ),
    )
    for name in names.split()
}


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


def real(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """Return a setting as a float between low and high, both included; raise where it is none."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= high:  # NaN is in none
        raise ConfigError(f"{name} = {value!r}: expected {expected}")
    return float(value)


LEAST, MOST = math.ulp(0.0), math.nextafter(math.inf, 0.0)  # the positive floats


def checked(shape: Shape) -> Shape:
    """Return a shape in plain Python numbers; raise where a value is out of range."""
    greedy = "a positive number; for greedy pass do_sample=False"
    return Shape(
        real("temperature", shape.temperature, LEAST, MOST, greedy),
        None if shape.top_k is None else whole("top_k", shape.top_k, 0),  # 0 keeps all, as in transformers
        None if shape.top_p is None else real("top_p", shape.top_p, LEAST, 1.0, "a number above 0 and up to 1"),
        None if shape.min_p is None else real("min_p", shape.min_p, 0.0, 1.0, "a number from 0 to 1"),
    )


def warpers(shape: Shape) -> list[Any]:
    """Return transformers' own warpers for a shape, in its order."""
    from transformers.generation import logits_process as lp

    shape = checked(shape)
    found: list[Any] = []
    if shape.temperature != 1.0:
        found.append(lp.TemperatureLogitsWarper(shape.temperature))
    if shape.top_k:
        found.append(lp.TopKLogitsWarper(top_k=shape.top_k))
    if shape.top_p is not None and shape.top_p < 1.0:
        found.append(lp.TopPLogitsWarper(top_p=shape.top_p))
    if shape.min_p is not None:
        found.append(lp.MinPLogitsWarper(min_p=shape.min_p))
    return found


def prompts_of(given: Any) -> list[Any]:
    """Return the prompts of a call: one prompt or a list of them was given."""
    if isinstance(given, str) or is_conversation(given):
        return [given]
    try:
        if not isinstance(given, Mapping):
            return list(given)
    except TypeError:
        pass
    raise DataError(
        f"prompts = {short(given)}: expected a text, a conversation, or a list of texts, conversations or ids"
    )


def seeds_of(seed: Any, count: int) -> list[Any] | None:
    """Return a seed for each prompt, None where none is given: one for all or one each was given."""
    if seed is None:
        return None
    try:
        seeds = [seed] * count if isinstance(seed, str) else list(seed)
    except TypeError:  # one number, whatever its type
        seeds = [seed] * count
    if len(seeds) != count:
        raise RouteError(f"{count} prompts but {len(seeds)} seeds")
    return seeds


def encode_prompts(base: Base, prompts: Sequence[Any], names: Sequence[str | None]) -> list[Encoded]:
    """Encode prompts, each through the template of its adapter; token ids are taken as they are.

    Raises:
        DataError: a prompt is neither a text nor a conversation nor token ids that the base knows.
    """
    rows = []
    for number, (prompt, name) in enumerate(zip(prompts, names)):
        if not isinstance(prompt, str) and not is_conversation(prompt):
            rows.append(Encoded(_ids_of(base, prompt, name, number)))
            continue
        if base.tokenizer is None:
            raise ConfigError("this base has no tokenizer: pass Base(model, tokenizer), or prompts of token ids")
        spec: dict[str, Any] = base.adapters[name].task if name is not None else {}
        kind = spec.get("kind", "causal-lm" if isinstance(prompt, str) else "chat")
        with base.encoding:
            ids = get_task(kind).prompt(seen(base, base.tokenizer_of(name)), spec, prompt)
        rows.append(Encoded(tuple(ids) or (pad_id(base.tokenizer),)))
    return rows


def _ids_of(base: Base, prompt: Any, name: str | None, number: int) -> tuple[int, ...]:
    """Return the token ids of a prompt that is given as such."""
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        ids = tuple(operator.index(i) for i in prompt)
    except TypeError:
        flat = hasattr(prompt, "__index__")
        hint = f"; one prompt of token ids is a list in a list: [[{prompt}, ...]]" if flat else ""
        raise DataError(
            f"prompt {number} is {short(prompt)}: expected a text, a conversation or a list of token ids{hint}"
        ) from None
    if not ids:
        raise DataError(f"prompt {number} has no token ids: expected at least one")
    size = vocabulary_size(base)
    if base.tokenizer_of(name) is not base.tokenizer:  # words of the adapter lie behind the base's
        size = max(size, len(base.tokenizer_of(name)))
    for i in ids:
        if not 0 <= i < size:
            raise DataError(f"prompt {number} has token id {i}: expected 0 to {size - 1}, the ids that the base knows")
    return ids


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
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    num_beams = whole("num_beams", num_beams, 1)
    num_return_sequences = whole("num_return_sequences", num_return_sequences, 1)
    if do_sample and num_beams > 1:
        raise UnsupportedError("beam sampling draws from all beams at once, so no row would equal itself alone")
    if num_beams > 1 and num_return_sequences > num_beams:
        raise ConfigError(f"num_return_sequences = {num_return_sequences}: expected at most num_beams = {num_beams}")
    if not do_sample and num_beams == 1 and num_return_sequences > 1:
        raise ConfigError("greedy search has one result: pass do_sample=True or num_beams")
    settings = _checked_settings(base, settings, do_sample, num_beams)
    drawn: list[int] = []
    if do_sample:
        shape = checked(shape)  # before anything is computed
        given = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
        drawn = [sample_seed(whole("seed", seed), k) for seed in given for k in range(num_return_sequences)]
    rows, names = encode_prompts(base, prompts, names), list(names)
    copies, returned = (num_return_sequences, 1) if do_sample else (1, num_return_sequences)
    rows = [row for row in rows for _ in range(copies)]
    names = [name for name in names for _ in range(copies)]
    settings |= {"num_beams": num_beams, "num_return_sequences": returned}
    written: list[list[list[int]]] = [[] for _ in rows]
    for part in batches(base, [len(row.ids) for row in rows], settings):
        samplers = [RowSampler([drawn[i] for i in part], [shape] * len(part))] if do_sample else []
        sequences = write_rows(
            base, [rows[i] for i in part], [names[i] for i in part], max_new_tokens, settings, samplers
        )
        for place, i in enumerate(part):
            written[i] = sequences[place * returned : (place + 1) * returned]
    return [[ids for own in written[i : i + copies] for ids in own] for i in range(0, len(rows), copies)]


def batches(base: Base, lengths: Sequence[int], settings: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Return which prompts are written together: all, or those of one length where padding would count as text.

    Args:
        base: its model's own generation config counts where the settings say nothing.
        lengths: tokens of each prompt.
        settings: fields of transformers' GenerationConfig.

    Returns:
        places in `lengths`, each once.
    """
    own = base.model.generation_config
    for name, off in COUNTS_PADDING.items():
        if base.is_encoder_decoder and not name.startswith("encoder_"):
            continue  # what a decoder has written is never padded in front
        value = (settings or {}).get(name)
        if (getattr(own, name, None) if value is None else value) not in (None, off):
            return [[i for i, other in enumerate(lengths) if other == length] for length in dict.fromkeys(lengths)]
    return [list(range(len(lengths)))]


def write_rows(
    base: Base,
    rows: Sequence[Encoded],
    names: Sequence[str | None],
    max_new_tokens: int,
    settings: dict[str, Any],
    processors: Sequence[Any] = (),
    criteria: Sequence[Any] = (),
) -> list[list[int]]:
    """Continue encoded prompts in one batch of transformers' `generate`, without its sampling; see `batches`.

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

    own = base.model.generation_config
    settings = {
        "num_beams": 1,
        "num_return_sequences": 1,
        "bos_token_id": own.bos_token_id,
        "decoder_start_token_id": own.decoder_start_token_id,
        "eos_token_id": eos_of(base),
        **settings,
    }
    beams, eos = settings["num_beams"], settings["eos_token_id"]
    side = "right" if base.is_encoder_decoder else "left"
    batch = collate(rows, pad_id(base.tokenizer), side, base.device)
    start = 1 if base.is_encoder_decoder else batch["input_ids"].shape[1]
    ends = [end_of(base, name) for name in names]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id(base.tokenizer),
        return_dict_in_generate=False,  # the model's own config may ask for more
        **settings,
    )
    lengths = [len(row.ids) for row in rows]
    route = base.use(names, repeat=beams, prompts=lengths)
    with torch.no_grad(), base._installed.without_checkpointing(), base._installed.fast_products(), route:
        output = base.model.generate(
            **{k: batch[k] for k in ("input_ids", "attention_mask")},
            generation_config=config,
            tokenizer=base.tokenizer,  # reads stop strings
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([*([RowStop(ends, start)] if any(ends) else []), *criteria]),
        )
    stops = set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    per_row = len(output) // len(ends)
    return [
        until(row[start:].tolist(), stops, pad_id(base.tokenizer), ends[i // per_row]) for i, row in enumerate(output)
    ]


def _checked_settings(base: Base, settings: Mapping[str, Any], do_sample: bool, num_beams: int) -> dict[str, Any]:
    """Return the settings that are set, in plain Python numbers; raise where one is unknown, wrong or does nothing.

    transformers keeps unknown ones without a word, and nothing reads them.
    """
    from transformers import GenerationConfig

    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("streamer", "logits_processor", "stopping_criteria", "assistant_model"):
            raise ConfigError(f"{name} is an object that transformers calls: pass it to base.bind(names).generate")
        if name not in fields:
            raise unknown("setting of generate", name, fields)
        if value is None:
            continue
        if name in REFUSED:
            if value is False:
                continue
            raise ConfigError(f"{name} = {value!r} is not taken here: {REFUSED[name]}")
        if name in BEAMS_ONLY and num_beams == 1:
            raise ConfigError(f"{name} = {value!r} has no effect without beams: pass num_beams of at least 2")
        if name == "decoder_start_token_id" and not base.is_encoder_decoder:
            raise ConfigError(f"{name} = {value!r} has no effect: this base has no encoder, its text starts the prompt")
        if name == "watermarking_config" and do_sample:
            raise ConfigError(f"{name} has no effect on tokens that are drawn: pass do_sample=False")
        found[name] = _checked_setting(base, name, value)
    return found


def _checked_setting(base: Base, name: str, value: Any) -> Any:
    """Return one setting as transformers takes it; raise where it would refuse it."""
    from transformers import GenerationConfig
    from transformers.generation import logits_process as lp

    if name in WHOLE:
        return whole(name, value, 0)
    if name in POSITIVE:
        return real(name, value, LEAST, MOST, "a positive number")
    if name in ("length_penalty", "guidance_scale"):
        return real(name, value, -MOST, MOST, "a number")
    if name == "eos_token_id":
        many = isinstance(value, (list, tuple))
        return [whole(name, i, 0) for i in value] if many else whole(name, value, 0)
    if name == "stop_strings":
        return _stop_strings(base, value)
    try:
        if name == "bad_words_ids":
            lp.NoBadWordsLogitsProcessor(value)
        elif name == "sequence_bias":
            lp.SequenceBiasLogitsProcessor(value)
        else:
            GenerationConfig(**{name: value}, num_beams=2)  # beams: no warning about what is theirs
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} = {value!r}: {error}") from error
    return value


def _stop_strings(base: Base, value: Any) -> list[str] | None:
    """Return texts that end a row; raise where this base cannot find them."""
    from transformers.generation.stopping_criteria import StopStringCriteria

    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop_strings = {value!r}: expected a text or a list of texts, none of them empty")
    if base.tokenizer is None:
        raise ConfigError(f"stop_strings = {value!r}: this base has no tokenizer: pass Base(model, tokenizer)")
    try:
        if texts:
            StopStringCriteria(base.tokenizer, list(texts))
    except ValueError as error:  # such as a tokenizer of whole words, whose tokens do not join to a text
        raise ConfigError(
            f"stop_strings = {value!r}: transformers cannot look for them with this tokenizer ({error}): "
            "pass eos_token_id, or cut the texts"
        ) from error
    return list(texts) or None


def eos_of(base: Base) -> Any:
    """Return the token id, or ids, that end a text of a base; None where nothing does."""
    own = base.model.generation_config.eos_token_id
    return own if own is not None else getattr(base.tokenizer, "eos_token_id", None)


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
