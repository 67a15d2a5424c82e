"""Other decoders: GPT-2, OPT, GPT-J, GPT-NeoX, Falcon, BLOOM.

GPT-J, GPT-NeoX and Falcon add attention and MLP to the residual at once: both branches read and extend the same
tensor, the layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase.anatomy.families.common import heads, off_interface
from onebase.anatomy.rows import Family, Projection, StackRow, SubLayer, fused
from onebase.core.site import Ref


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
            layer_dropout=("dropout",),
        ),
    )


def _gptj(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="attn",
        residual=Ref("", 0),
        parts={"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj"},
        norms={"norm": "ln_1"},  # read by both branches
        core="attn",
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp",
        residual=Ref("", 0),
        parts={"up": "mlp.fc_in", "down": "mlp.fc_out"},
        norms={},
    )
    return (
        StackRow(
            name="decoder",
            layers="h",
            embed="wte",
            sublayers=(attention, mlp),
            causal=True,
            position_limit=config.max_position_embeddings,  # rows of a table of sines
        ),
    )


def _gpt_neox(config: Any) -> tuple[StackRow, ...]:
    count, dim = heads(config)
    parallel = config.use_parallel_residual
    attention = SubLayer(
        name="attention",
        exit="post_attention_dropout",
        residual=Ref("input_layernorm", 0),
        parts={**fused("attention.query_key_value", count, q=dim, k=dim, v=dim), "o": "attention.dense"},
        norms={"norm": "input_layernorm"},
        core="attention",
    )
    mlp = SubLayer(
        name="mlp",
        exit="post_mlp_dropout",
        residual=Ref("input_layernorm" if parallel else "post_attention_layernorm", 0),
        parts={"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        norms={"norm": "post_attention_layernorm"},
    )
    return (StackRow(name="decoder", layers="layers", embed="embed_in", sublayers=(attention, mlp), causal=True),)


def _falcon_qkv(config: Any) -> Mapping[str, Projection]:
    """Return q, k and v: per group of queries, after all queries (one key head), or per head."""
    path, queries = "self_attention.query_key_value", config.num_attention_heads
    dim = config.hidden_size // queries
    if config.new_decoder_architecture:
        return fused(path, config.num_kv_heads, q=queries // config.num_kv_heads * dim, k=dim, v=dim)
    if config.multi_query:
        return fused(path, q=queries * dim, k=dim, v=dim)
    return fused(path, queries, q=dim, k=dim, v=dim)


def _falcon(config: Any) -> tuple[StackRow, ...]:
    # What the layer itself decides by: with the new architecture and without parallel_attn, the modelling file has
    # no sequential form, it adds both branches at once.
    parallel = config.parallel_attn or config.new_decoder_architecture
    norms_of_parallel = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    two = config.parallel_attn and norms_of_parallel == 2
    first = {"norm": "ln_attn" if two else "input_layernorm"}
    second = {"norm": "ln_mlp"} if two else {} if config.parallel_attn else {"norm": "post_attention_layernorm"}
    attention = SubLayer(
        name="attention",
        exit="self_attention",
        residual=Ref("", 0),
        parts={**_falcon_qkv(config), "o": "self_attention.dense"},
        norms=first,
        core="self_attention",
        cancels=bool(config.alibi),  # its config states how positions turn keys also where none do
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp",
        residual=Ref("", 0) if parallel else Ref("post_attention_layernorm", 0),
        parts={"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        norms=second,
    )
    return (
        StackRow(
            name="decoder",
            layers="h",
            embed="word_embeddings",
            sublayers=(attention, mlp),
            causal=True,
            position_start=None if config.alibi else 0,  # distances count real tokens already
            layer_dropout=("config.hidden_dropout", "config.attention_dropout"),
        ),
    )


def _falcon_heads(config: Any) -> tuple[int, int]:
    dim = config.hidden_size // config.num_attention_heads
    if config.multi_query and not config.new_decoder_architecture:
        return 1, dim
    return config.num_kv_heads, dim


def _falcon_refusal(config: Any) -> str:
    if config.new_decoder_architecture and not config.parallel_attn:
        return (
            "new_decoder_architecture without parallel_attn leaves a norm unused and asks for one that does not exist"
        )
    return ""


def _bloom(config: Any) -> tuple[StackRow, ...]:
    count = config.n_head
    dim = config.hidden_size // count
    # The residual is added inside the modules: what is added leaves their last projection.
    attention = SubLayer(
        name="attention",
        exit="self_attention.dense",
        residual=Ref("self_attention", 1),
        parts={
            **fused("self_attention.query_key_value", count, q=dim, k=dim, v=dim),
            "o": "self_attention.dense",
        },
        norms={"norm": "input_layernorm"},
        core="self_attention",
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp.dense_4h_to_h",
        residual=Ref("mlp", 1),
        parts={"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        norms={"norm": "post_attention_layernorm"},
    )
    return (
        StackRow(
            name="decoder",
            layers="h",
            embed="word_embeddings",
            sublayers=(attention, mlp),
            causal=True,
            position_start=None,  # distances count real tokens already
        ),
    )


def _bloom_refusal(config: Any) -> str:
    if config.pretraining_tp > 1 and config.slow_but_exact:
        return (
            "slow_but_exact reads the weights of its projections without calling them, so they cannot be tapped: "
            "load with slow_but_exact=False"
        )
    return ""


ROWS = (
    Family(("gpt2",), _gpt2, heads, "last", _gpt2_refusal),
    Family(("opt",), _opt, heads, "last"),
    Family(("gptj",), _gptj, heads, "last", off_interface),
    Family(("gpt_neox",), _gpt_neox, heads, "last"),
    Family(("falcon",), _falcon, _falcon_heads, "last", off_interface, _falcon_refusal),
    Family(("bloom",), _bloom, lambda c: (c.n_head, c.hidden_size // c.n_head), "last", off_interface, _bloom_refusal),
)
