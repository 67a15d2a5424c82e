"""Family rows: one entry per family says where everything is. Adding a family is adding a row."""

from __future__ import annotations

from typing import Any

from onebase.anatomy.rows import Family, StackRow, SubLayer
from onebase.core.site import Ref


def _heads(config: Any) -> tuple[int, int]:
    queries = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return getattr(config, "num_key_value_heads", None) or queries, dim


# -- encoders with the module names of BERT --------------------------------------------------------------------------


def _bert_attention(name: str, path: str) -> SubLayer:
    return SubLayer(
        name=name,  # type: ignore[arg-type]
        exit=f"{path}.output.dropout",
        residual=Ref(f"{path}.output", 1),
        parts={
            "q": f"{path}.self.query",
            "k": f"{path}.self.key",
            "v": f"{path}.self.value",
            "o": f"{path}.output.dense",
        },
        norms={"norm": f"{path}.output.LayerNorm"},
        core=f"{path}.self",
    )


def _bert(config: Any, position_start: int = 0) -> tuple[StackRow, ...]:
    cross = (_bert_attention("cross", "crossattention"),) if getattr(config, "add_cross_attention", False) else ()
    mlp = SubLayer(
        name="mlp",
        exit="output.dropout",
        residual=Ref("output", 1),
        parts={"up": "intermediate.dense", "down": "output.dense"},
        norms={"norm": "output.LayerNorm"},
    )
    return (
        StackRow(
            name="decoder" if config.is_decoder else "encoder",
            layers="encoder.layer",
            embed="embeddings.word_embeddings",
            sublayers=(_bert_attention("attention", "attention"), *cross, mlp),
            causal=config.is_decoder,
            position_start=position_start,
            position_limit=config.max_position_embeddings - position_start,
            pooler="pooler",
        ),
    )


def _roberta(config: Any) -> tuple[StackRow, ...]:
    return _bert(config, position_start=config.pad_token_id + 1)


def _distilbert(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="attention",
        residual=Ref("", 0),
        parts={
            "q": "attention.q_lin",
            "k": "attention.k_lin",
            "v": "attention.v_lin",
            "o": "attention.out_lin",
        },
        norms={"norm": "sa_layer_norm"},
        core="attention",
    )
    mlp = SubLayer(
        name="mlp",
        exit="ffn",
        residual=Ref("ffn", 0),
        parts={"up": "ffn.lin1", "down": "ffn.lin2"},
        norms={"norm": "output_layer_norm"},
    )
    return (
        StackRow(
            name="encoder",
            layers="transformer.layer",
            embed="embeddings.word_embeddings",
            sublayers=(attention, mlp),
            position_limit=config.max_position_embeddings,
        ),
    )


# -- decoders --------------------------------------------------------------------------------------------------------


def _gpt2(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="attn",
        residual=Ref("ln_1", 0),
        parts={
            "q": ("attn.c_attn", 0, 3),
            "k": ("attn.c_attn", 1, 3),
            "v": ("attn.c_attn", 2, 3),
            "o": "attn.c_proj",
        },
        norms={"norm": "ln_1"},
        core="attn",
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp",
        residual=Ref("ln_2", 0),
        parts={"up": "mlp.c_fc", "down": "mlp.c_proj"},
        norms={"norm": "ln_2"},
    )
    return (
        StackRow(
            name="decoder",
            layers="h",
            embed="wte",
            sublayers=(attention, mlp),
            causal=True,
            position_limit=config.max_position_embeddings,
        ),
    )


def _gpt2_refusal(config: Any) -> str:
    if config.reorder_and_upcast_attn and config._attn_implementation in ("eager", "onebase:eager"):
        return "reorder_and_upcast_attn computes attention outside the attention interface; load with sdpa"
    return ""


def _opt(config: Any) -> tuple[StackRow, ...]:
    pre = config.do_layer_norm_before
    attention = SubLayer(
        name="attention",
        exit="self_attn",
        residual=Ref("self_attn_layer_norm", 0) if pre else Ref("", 0),
        parts={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
        },
        norms={"norm": "self_attn_layer_norm"},
        core="self_attn",
    )
    mlp = SubLayer(
        name="mlp",
        exit="fc2",
        residual=Ref("final_layer_norm", 0) if pre else Ref("self_attn_layer_norm", None),
        parts={"up": "fc1", "down": "fc2"},
        norms={"norm": "final_layer_norm"},
    )
    return (
        StackRow(
            name="decoder",
            path="decoder",
            layers="layers",
            embed="embed_tokens",
            sublayers=(attention, mlp),
            causal=True,
            position_limit=config.max_position_embeddings,
            layer_dropout="dropout",
        ),
    )


_LLAMA_PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_LLAMA_MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def _llama(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="self_attn",
        residual=Ref("input_layernorm", 0),
        parts=_LLAMA_PROJECTIONS,
        norms={"norm": "input_layernorm"},
        core="self_attn",
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp",
        residual=Ref("post_attention_layernorm", 0),
        parts=_LLAMA_MLP,
        norms={"norm": "post_attention_layernorm"},
    )
    return (StackRow(name="decoder", layers="layers", embed="embed_tokens", sublayers=(attention, mlp), causal=True),)


def _gemma3(config: Any) -> tuple[StackRow, ...]:
    # Gemma normalises a branch twice; what is added to the residual is the output of the second norm.
    attention = SubLayer(
        name="attention",
        exit="post_attention_layernorm",
        residual=Ref("input_layernorm", 0),
        parts=_LLAMA_PROJECTIONS,
        norms={"norm": "input_layernorm", "post_norm": "post_attention_layernorm"},
        core="self_attn",
    )
    mlp = SubLayer(
        name="mlp",
        exit="post_feedforward_layernorm",
        residual=Ref("pre_feedforward_layernorm", 0),
        parts=_LLAMA_MLP,
        norms={"norm": "pre_feedforward_layernorm", "post_norm": "post_feedforward_layernorm"},
    )
    causal = not config.use_bidirectional_attention
    return (StackRow(name="decoder", layers="layers", embed="embed_tokens", sublayers=(attention, mlp), causal=causal),)


# -- encoder-decoders ------------------------------------------------------------------------------------------------


def _t5_attention(name: str, layer: str, module: str) -> SubLayer:
    core = f"{layer}.{module}"
    return SubLayer(
        name=name,  # type: ignore[arg-type]
        exit=f"{layer}.dropout",
        residual=Ref(layer, 0),
        parts={part: f"{core}.{part}" for part in "qkvo"},
        norms={"norm": f"{layer}.layer_norm"},
        core=core,
    )


def _t5_mlp(config: Any, layer: str) -> SubLayer:
    dense = f"{layer}.DenseReluDense"
    gated = {"gate": f"{dense}.wi_0", "up": f"{dense}.wi_1", "down": f"{dense}.wo"}
    plain = {"up": f"{dense}.wi", "down": f"{dense}.wo"}
    return SubLayer(
        name="mlp",
        exit=f"{layer}.dropout",
        residual=Ref(layer, 0),
        parts=gated if config.is_gated_act else plain,
        norms={"norm": f"{layer}.layer_norm"},
    )


def _t5(config: Any) -> tuple[StackRow, ...]:
    encoder = StackRow(
        name="encoder",
        path="encoder",
        layers="block",
        embed="embed_tokens",
        sublayers=(_t5_attention("attention", "layer.0", "SelfAttention"), _t5_mlp(config, "layer.1")),
        position_start=None,
        feeds="decoder",
    )
    decoder = StackRow(
        name="decoder",
        path="decoder",
        layers="block",
        embed="embed_tokens",
        sublayers=(
            _t5_attention("attention", "layer.0", "SelfAttention"),
            _t5_attention("cross", "layer.1", "EncDecAttention"),
            _t5_mlp(config, "layer.2"),
        ),
        causal=True,
        position_start=None,
    )
    return (encoder, decoder)


ROWS: tuple[Family, ...] = (
    Family(("bert",), _bert, _heads, "mean"),
    Family(("roberta", "xlm-roberta", "camembert"), _roberta, _heads, "mean"),
    Family(("distilbert",), _distilbert, lambda c: (c.n_heads, c.dim // c.n_heads), "mean"),
    Family(("gpt2",), _gpt2, _heads, "last", _gpt2_refusal),
    Family(("opt",), _opt, _heads, "last"),
    Family(("llama", "qwen3"), _llama, _heads, "last"),
    Family(("gemma3_text",), _gemma3, _heads, "last"),
    Family(("t5",), _t5, lambda c: (c.num_heads, c.d_kv), "mean"),
)

FAMILIES: dict[str, Family] = {model_type: row for row in ROWS for model_type in row.model_types}
