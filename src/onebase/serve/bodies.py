"""The bodies that requests may have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(max_length=300)]
Names = Name | list[Name]


class Body(BaseModel):
    """A body; unknown fields are an error, because they would be ignored."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _characters(cls, values: Any) -> Any:
        """Refuse halves of characters, which JSON can write and neither tokenizers nor answers can."""
        left = [values]
        while left:
            one = left.pop()
            if isinstance(one, str) and not one.isascii():
                try:
                    one.encode()
                except UnicodeEncodeError:
                    raise ValueError("a text has half of a character (a lone surrogate)") from None
            elif isinstance(one, dict):
                left += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                left += one
        return values


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

    model: Name
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Document(Body):
    """A document to rank."""

    text: str


class Rerank(Body):
    """Documents to order by their relevance for a query."""

    model: Name
    query: str
    documents: list[str | Document]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "logit_bias": ({},), "echo": (False,), "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,), "metadata": ({},),
    "service_tier": ("auto", "default"), "use_beam_search": (False,), "ignore_eos": (False,), "min_tokens": (0,),
    "skip_special_tokens": (True,), "stop_token_ids": ([],), "best_of": (),
}  # fmt: skip
"""Fields of OpenAI's and vLLM's that are not supported -> values that change no answer; None is always one."""


class Writing(Body):
    """What completions and chats share; a field that is not supported may have a value that changes nothing."""

    model: Name
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

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        """Leave out what changes nothing: clients send every field that they know."""
        if not isinstance(values, dict):
            return values
        copies = values.get("n") or 1
        same = {**NEUTRAL, "best_of": (copies,), "top_k": (0, -1)}

        def says(name: str, value: Any) -> bool:
            if value is None:
                known = cls.model_fields.get(name)
                return name in same if known is None else not known.is_required()
            return value in same.get(name, ())

        return {name: value for name, value in values.items() if not says(name, value)}

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
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs: true")
        return self

    def places(self) -> int | None:
        """See `Writing`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Load(Body):
    """An adapter to load."""

    ref: Name
    pin: bool = False
    wait: bool = True


class Promote(Body):
    """A version for an alias."""

    version: int = Field(ge=1)
    alias: Name


class Rollback(Body):
    """An alias to put back."""

    alias: Name


class LoraLoad(Body):
    """vLLM's body."""

    lora_name: Name
    lora_path: Name


class LoraUnload(Body):
    """vLLM's body."""

    lora_name: Name
