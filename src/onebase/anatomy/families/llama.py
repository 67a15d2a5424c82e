"""Decoders with the module names of LLaMA: LLaMA, Qwen, Mistral, Mixtral, Phi-3, OLMo 2, Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase.anatomy.families.common import heads
from onebase.anatomy.rows import Family, Projection, StackRow, SubLayer, Untapped, fused
from onebase.core.site import Ref

_PROJECTIONS: Mapping[str, Projection] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_MLP: Mapping[str, Projection] = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_FUSED_EXPERTS = (
    "the experts of this base are parameters of one module, not linear maps that could be tapped: choose attention "
    "parts (for example lora(sites=('q', 'k', 'v', 'o'))), or bottleneck, which acts on what the experts add up to"
)


def _stack(attention: SubLayer, mlp: SubLayer, causal: bool = True) -> tuple[StackRow, ...]:
    return (StackRow(name="decoder", layers="layers", embed="embed_tokens", sublayers=(attention, mlp), causal=causal),)


def _pre_norm(
    parts: Mapping[str, Projection] = _PROJECTIONS,
    mlp: Mapping[str, Projection] = _MLP,
    exits: tuple[str, str] = ("self_attn", "mlp"),
    head_norms: Mapping[str, str] | None = None,
) -> tuple[StackRow, ...]:
    """Return a stack that normalises before each branch."""
    return _stack(
        SubLayer(
            name="attention",
            exit=exits[0],
            residual=Ref("input_layernorm", 0),
            parts=parts,
            norms={"norm": "input_layernorm", **(head_norms or {})},
            core="self_attn",
        ),
        SubLayer(
            name="mlp",
            exit=exits[1],
            residual=Ref("post_attention_layernorm", 0),
            parts=mlp,
            norms={"norm": "post_attention_layernorm"},
        ),
    )


def _llama(config: Any) -> tuple[StackRow, ...]:
    return _pre_norm()


def _qwen3(config: Any) -> tuple[StackRow, ...]:
    return _pre_norm(head_norms=_HEAD_NORMS)


def _mixtral(config: Any) -> tuple[StackRow, ...]:
    return _pre_norm(mlp={part: Untapped("mlp.experts", _FUSED_EXPERTS) for part in _MLP})


def _phi3(config: Any) -> tuple[StackRow, ...]:
    kv, dim = heads(config)
    qkv = fused("self_attn.qkv_proj", q=config.num_attention_heads * dim, k=kv * dim, v=kv * dim)
    inner = config.intermediate_size
    return _pre_norm(
        {**qkv, "o": "self_attn.o_proj"},
        {**fused("mlp.gate_up_proj", gate=inner, up=inner), "down": "mlp.down_proj"},
        ("resid_attn_dropout", "resid_mlp_dropout"),
    )


def _olmo2(config: Any) -> tuple[StackRow, ...]:
    # Only what leaves a branch is normalised: the residual is the branch's own input.
    return _stack(
        SubLayer(
            name="attention",
            exit="post_attention_layernorm",
            residual=Ref("self_attn", 0),
            parts=_PROJECTIONS,
            norms={"norm": "post_attention_layernorm", **_HEAD_NORMS},
            core="self_attn",
        ),
        SubLayer(
            name="mlp",
            exit="post_feedforward_layernorm",
            residual=Ref("mlp", 0),
            parts=_MLP,
            norms={"norm": "post_feedforward_layernorm"},
        ),
    )


def _gemma3(config: Any) -> tuple[StackRow, ...]:
    return _gemma(config, _HEAD_NORMS)


def _gemma(config: Any, head_norms: Mapping[str, str] | None = None) -> tuple[StackRow, ...]:
    # Gemma 2 and 3 normalise a branch twice; what is added to the residual is the output of the second norm.
    return _stack(
        SubLayer(
            name="attention",
            exit="post_attention_layernorm",
            residual=Ref("input_layernorm", 0),
            parts=_PROJECTIONS,
            norms={"norm": "input_layernorm", "post_norm": "post_attention_layernorm", **(head_norms or {})},
            core="self_attn",
        ),
        SubLayer(
            name="mlp",
            exit="post_feedforward_layernorm",
            residual=Ref("pre_feedforward_layernorm", 0),
            parts=_MLP,
            norms={"norm": "pre_feedforward_layernorm", "post_norm": "post_feedforward_layernorm"},
        ),
        causal=not getattr(config, "use_bidirectional_attention", False),
    )


ROWS = (
    Family(("llama", "mistral", "qwen2"), _llama, heads, "last"),
    Family(("qwen3",), _qwen3, heads, "last"),
    Family(("mixtral",), _mixtral, heads, "last"),
    Family(("phi3",), _phi3, heads, "last"),
    Family(("olmo2",), _olmo2, heads, "last"),
    Family(("gemma2",), _gemma, heads, "last"),
    Family(("gemma3_text",), _gemma3, heads, "last"),
)
