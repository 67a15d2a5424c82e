"""The bodies that requests may have."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = str
Names = str | list[str]


class Body(BaseModel):
    """A body; unknown fields are an error, because they would be ignored."""

    model_config = ConfigDict(extra="forbid")


class RowBody(Body):
    """A text, with its own adapters."""

    text: str
    pair: str | None = None
    model: Names | None = None


class Classify(Body):
    """Texts for one or several adapters."""

    model: Names | None = None
    input: str | list[str | RowBody]


class Embed(Body):
    """Texts to embed."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Document(Body):
    """A document to rank."""

    text: str


class Rerank(Body):
    """Documents to order by their relevance for a query."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False


class Writing(Body):
    """What completions and chats share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def places(self) -> int | None:
        """How many of the most probable tokens to name in each place; None: no probabilities."""
        raise NotImplementedError


class Completion(Writing):
    """A prompt to continue."""

    prompt: str | list[str] | list[int]
    logprobs: int | None = Field(None, ge=0, le=20)

    def places(self) -> int | None:
        """See `Writing`."""
        return self.logprobs


class Chat(Writing):
    """A conversation to continue."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _alternatives(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs: true")
        return self

    def places(self) -> int | None:
        """See `Writing`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Load(Body):
    """An adapter to load."""

    ref: str
    pin: bool = False
    wait: bool = True


class Promote(Body):
    """A version for an alias."""

    version: int = Field(ge=1)
    alias: str


class Rollback(Body):
    """An alias to put back."""

    alias: str


class LoraLoad(Body):
    """vLLM's body."""

    lora_name: str
    lora_path: str


class LoraUnload(Body):
    """vLLM's body."""

    lora_name: str
