"""What `adapter_config.json` holds: its fields, its digest, and how it is read strictly."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from importlib import metadata
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onebase.errors import CorruptError, OnebaseError, StoreError, nearest
from onebase.store.names import check_name

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

Count = Annotated[int, Field(ge=0)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class MethodInfo(_Strict):
    """The method by its registered name, with every setting."""

    name: str
    settings: dict[str, Any]


class BaseInfo(_Strict):
    """The base the adapter was trained on."""

    id: str
    """Hub id or folder it was loaded from; for people, never compared."""
    fingerprint: str
    """`fingerprint_model` of its tensors: what decides whether the adapter fits."""
    model_type: str
    hidden_size: Count
    layers: Count
    config_digest: str
    parameters: Count


class TokenizerInfo(_Strict):
    """The tokenizer the adapter was trained with."""

    digest: str


class TensorInfo(_Strict):
    """Shape and dtype of one stored tensor; the dtype as torch writes it, e.g. ``bfloat16``."""

    shape: list[Count]
    dtype: str


class AdapterConfig(_Strict):
    """Everything known about one version of one adapter, except its tensors."""

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    library: Literal["onebase"] = "onebase"
    library_version: str
    name: str
    version: Annotated[int, Field(ge=1)]
    created: str
    """UTC, ISO 8601."""
    method: MethodInfo
    task: dict[str, Any]
    """Kind, labels, pooling, max_length, template ...: whatever the head needs."""
    base: BaseInfo
    tokenizer: TokenizerInfo
    provenance: dict[str, Any]
    metrics: dict[str, Any]
    """``{"adapter": {metric: value}, "base": {metric: value}}``, or metrics of the adapter alone."""
    probes: dict[str, Any]
    parameters: Count
    tensors: dict[str, TensorInfo]
    files: dict[str, Hex]
    """sha256 of every other file of the folder."""
    digest: Digest
    """sha256 of this config without this field; through `files` it covers the whole folder."""

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("created")
    @classmethod
    def _in_utc(cls, created: str) -> str:
        if datetime.fromisoformat(created).utcoffset() != timedelta(0):
            raise ValueError("expected a UTC time such as 2025-01-31T12:00:00+00:00")
        return created

    @field_validator("files")
    @classmethod
    def _plain_file_names(cls, files: dict[str, str]) -> dict[str, str]:
        wrong = [f for f in files if not f or f in (".", "..", CONFIG_FILE) or "/" in f or "\\" in f]
        if wrong:
            raise ValueError(f"expected names of files in this folder, got {wrong}")
        return files


def library_version() -> str:
    """Return the installed version of onebase, or ``0+source`` when it runs from a source tree."""
    try:
        return metadata.version("onebase")
    except metadata.PackageNotFoundError:
        return "0+source"


def digest_of(raw: Mapping[str, Any]) -> str:
    """Digest a config as read from or written to JSON.

    Works on the raw mapping rather than on `AdapterConfig`, so that a field which a later
    onebase adds with a default does not change the digest of an older file.

    Args:
        raw: the config; its field ``digest``, if any, is left out.

    Returns:
        ``"sha256:"`` and 64 hex digits.
    """
    body = {key: value for key, value in raw.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return `body` with its ``digest``."""
    return {**body, "digest": digest_of(body)}


def read_json(data: bytes) -> Any:
    """Parse JSON strictly: duplicate keys and NaN, which Python accepts, are errors.

    Args:
        data: UTF-8 text.

    Returns:
        The parsed value.

    Raises:
        ValueError: it is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
        if repeated:
            raise ValueError(f"repeated keys {repeated}")
        return dict(pairs)

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_problems(value: Any, where: str) -> Iterator[str]:
    """Name every part of `value` that JSON cannot hold, or would silently change.

    Args:
        value: settings, metrics and the like.
        where: dotted path of `value`, to begin each message.

    Yields:
        One message per problem.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from json_problems(key, f"a key of {where or 'the config'}")
                yield from json_problems(item, f"{where}.{key}" if where else key)
            else:
                yield f"{where} has the key {key!r}; JSON keys are text, write {str(key)!r}"
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from json_problems(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, which JSON cannot hold; write None where there is no value"
    elif isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
        yield f"{where} is text that is not valid Unicode: {value!r}"
    elif not isinstance(value, str | int | float | None):
        yield f"{where} is a {type(value).__name__}; expected text, numbers, booleans, None, lists or dicts"


def parse_config(raw: object, where: str, error: type[OnebaseError] = CorruptError) -> AdapterConfig:
    """Check a parsed `adapter_config.json`, naming all wrong fields at once.

    Args:
        raw: the parsed JSON.
        where: what is being read, to begin the message.
        error: the exception to raise.

    Returns:
        The config.

    Raises:
        StoreError: a newer onebase wrote it.
        OnebaseError: of the type `error`: a field is missing, unknown or of a wrong type.
    """
    refuse_newer(raw, where)
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as problem:
        lines = "".join(f"\n  - {_explain(dict(item))}" for item in problem.errors(include_url=False))
        raise error(f"{where}: {problem.error_count()} wrong field(s):{lines}") from None


def refuse_newer(raw: object, where: str) -> None:
    """Raise StoreError when a newer onebase wrote `raw`: its fields cannot be judged here."""
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        writer = raw.get("library_version", "a newer version") if isinstance(raw, dict) else ""
        raise StoreError(
            f"{where} has format_version {version}, written by onebase {writer}; this is onebase "
            f"{library_version()}, which reads up to {FORMAT_VERSION}. Upgrade: pip install -U onebase"
        )


def _explain(item: dict[str, Any]) -> str:
    loc: tuple[str | int, ...] = item["loc"]
    field = ".".join(map(str, loc)) or "the file"
    if item["type"] == "extra_forbidden":
        return f"unknown field {field!r}. {nearest(str(loc[-1]), _fields_at(loc[:-1]))}"
    if item["type"] == "missing":
        return f"missing field {field!r}"
    return f"field {field!r}: {item['msg']}, got {_short(item['input'])}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(loc: tuple[str | int, ...]) -> list[str]:
    model: type[BaseModel] = AdapterConfig
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # a key of a free mapping, such as a tensor's name
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        model = next((t for t in inner if issubclass(t, BaseModel)), model)
    return list(model.model_fields)
