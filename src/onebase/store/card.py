"""The model card of an adapter: README.md with the front matter that the Hub reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from onebase.store.schema import AdapterConfig

# Kinds of tasks -> pipeline tags of huggingface.co/tasks, which no longer has text2text-generation.
PIPELINES = {
    "causal-lm": "text-generation",
    "chat": "text-generation",
    "classification": "text-classification",
    "completion": "text-generation",
    "embeddings": "feature-extraction",
    "features": "feature-extraction",
    "image-classification": "image-classification",
    "masked-lm": "fill-mask",
    "multilabel": "text-classification",
    "qa": "question-answering",
    "regression": "text-classification",
    "rerank": "text-ranking",
    "seq2seq": "text-generation",
    "similarity": "sentence-similarity",
    "tokens": "token-classification",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LABELS_SHOWN = 20  # a reader scans that many; the config has all


def render_card(config: AdapterConfig) -> str:
    """Write the README.md of an adapter.

    Args:
        config: the adapter's config; ``files`` and ``digest`` are not used, so they may be provisional.

    Returns:
        Markdown with YAML front matter.
    """
    return "\n".join([*_front_matter(config), "", *_body(config)]) + "\n"


def _front_matter(config: AdapterConfig) -> Iterator[str]:
    """Yield YAML, whose scalars are written as JSON strings: quoted, they never change type."""
    yield "---"
    yield "library_name: onebase"
    if _on_hub(config.base.id):
        yield f"base_model: {_quote(config.base.id)}"
    yield "tags:"
    yield from (f"- {_quote(tag)}" for tag in ("onebase", "adapter", config.method.name))
    if tag := PIPELINES.get(str(config.task.get("kind"))):
        yield f"pipeline_tag: {tag}"
    adapter, _ = _metrics(config)
    if adapter:
        yield "metrics:"
        yield from (f"- {_quote(name)}" for name in adapter)
    yield "---"


def _body(config: AdapterConfig) -> Iterator[str]:
    base = config.base
    kind = str(config.task.get("kind", "unnamed"))
    size = f"{base.model_type}, {base.layers} layers, {base.parameters:,} parameters"
    yield f"# {config.name}"
    yield ""
    yield (
        f"A {_code(config.method.name)} adapter of {config.parameters:,} parameters "
        f"for the task {_code(kind)}, trained over the frozen base {_code(_base_name(base.id))} ({size}). "
        f"The base itself is not in this folder."
    )
    yield from ("", "## Method", "")
    yield from _items({"name": config.method.name, **config.method.settings})
    yield from ("", "## Task", "")
    yield from _items(config.task)
    yield from ("", "## Metrics", "")
    yield from _metric_table(config)
    yield from ("", "## Use", "", "```python", "import onebase as ob", "")
    yield f"base = ob.load_base({_quote(_base_name(base.id))})"
    yield f'base.load("{config.name}@{config.version}")'
    yield _use(kind, config.name, bool(config.task.get("pair")))
    yield from ("```", "", "## Limits", "")
    yield f"- It fits only the base with the fingerprint {_code(base.fingerprint)}; any other is refused."
    yield "- It was trained on one data set; measure it on your own texts before relying on it."
    yield "- Whatever the base cannot represent, or has learned wrongly, an adapter rarely repairs."


def _use(kind: str, name: str, pair: bool) -> str:
    if kind == "qa":
        return f'base.predict(["some question"], pairs=["its context"], adapter="{name}")'
    if kind == "masked-lm":
        return f'base.fill(["some [MASK] text"], adapter="{name}")  # or the mask token of your base'
    if kind == "rerank":
        return f'base.predict(["some query"], pairs=["a document"], adapter="{name}")'
    if kind == "chat":
        return f'base.generate([{{"role": "user", "content": "some text"}}], adapter="{name}")'
    if PIPELINES.get(kind) == "text-generation":
        return f'base.generate(["some text"], adapter="{name}")'
    if kind == "image-classification":
        return f'base.predict(["some/picture.jpg"], adapter="{name}")'
    second = ', pairs=["a second text"]' if pair else ""
    return f'base.predict(["some text"], adapter="{name}"{second})'


def _items(values: Mapping[str, Any]) -> Iterator[str]:
    if not values:
        yield "Nothing is recorded."
    for key, value in values.items():
        yield f"- {key}: {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > LABELS_SHOWN:
        shown = value[:LABELS_SHOWN] if isinstance(value, list) else dict([*value.items()][:LABELS_SHOWN])
        return f"{_code(_quote(shown))} and {len(value) - LABELS_SHOWN} more"
    return _code(value if isinstance(value, str) else _quote(value))


def _metric_table(config: AdapterConfig) -> Iterator[str]:
    adapter, base = _metrics(config)
    if not adapter and not base:
        yield "None were measured."
        return
    yield "| metric | this adapter | the base's own |"
    yield "|---|---|---|"
    for name in dict.fromkeys([*adapter, *base]):
        yield f"| {_cell(name)} | {_number(adapter.get(name))} | {_number(base.get(name))} |"


def _metrics(config: AdapterConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``{"adapter": {...}, "base": {...}}``, or take metrics without "adapter" as the adapter's."""
    rest = dict(config.metrics)
    base = rest.pop("base", {})
    if set(rest) == {"adapter"} and isinstance(rest["adapter"], dict):
        rest = rest["adapter"]
    return dict(_flat(rest)), dict(_flat(base if isinstance(base, dict) else {"base": base}))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    """Quote text as Markdown code with a fence longer than any run of backticks in it."""
    line = text.replace("\n", "\\n")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _quote(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _on_hub(base_id: str) -> bool:
    return bool(HUB_ID.fullmatch(base_id)) and not os.path.exists(base_id)


def _base_name(base_id: str) -> str:
    """Name a base for readers elsewhere: a local path is of no use to them and says where someone lives."""
    return base_id if _on_hub(base_id) else re.split(r"[/\\]", base_id.rstrip("/\\"))[-1]
