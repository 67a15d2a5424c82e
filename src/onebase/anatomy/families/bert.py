"""Encoders with the module names of BERT: BERT, RoBERTa, ELECTRA, DeBERTa-v2, MPNet; and DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase.anatomy.families.common import heads, off_interface
from onebase.anatomy.rows import Family, Projection, StackRow, SubLayer
from onebase.core.site import Groupwise, Ref


def _attention(name: str, path: str) -> SubLayer:
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


_MLP = SubLayer(
    name="mlp",
    exit="output.dropout",
    residual=Ref("output", 1),
    parts={"up": "intermediate.dense", "down": "output.dense"},
    norms={"norm": "output.LayerNorm"},
)


def _bert(config: Any, position_start: int = 0) -> tuple[StackRow, ...]:
    cross = (_attention("cross", "crossattention"),) if getattr(config, "add_cross_attention", False) else ()
    decoder = bool(getattr(config, "is_decoder", False))
    return (
        StackRow(
            name="decoder" if decoder else "encoder",
            layers="encoder.layer",
            embed="embeddings.word_embeddings",
            hidden=config.hidden_size,  # ELECTRA's embeddings may be narrower than its states
            sublayers=(_attention("attention", "attention"), *cross, _MLP),
            causal=decoder,
            position_start=position_start,
            position_limit=config.max_position_embeddings - position_start,
            pooler="pooler",
        ),
    )


def _roberta(config: Any) -> tuple[StackRow, ...]:
    return _bert(config, position_start=config.pad_token_id + 1)


def _mpnet(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="attention.dropout",
        residual=Ref("attention", 0),
        parts={part: f"attention.attn.{part}" for part in "qkvo"},
        norms={"norm": "attention.LayerNorm"},
        core="attention.attn",
    )
    start = 2  # MPNet counts from its padding index 1 whatever the config says
    return (
        StackRow(
            name="encoder",
            layers="encoder.layer",
            embed="embeddings.word_embeddings",
            sublayers=(attention, _MLP),
            position_start=start,
            position_limit=config.max_position_embeddings - start,
            pooler="pooler",
        ),
    )


def _deberta(config: Any) -> tuple[StackRow, ...]:
    path = "attention.self"
    parts: Mapping[str, Projection] = {
        "q": f"{path}.query_proj",
        "k": f"{path}.key_proj",
        "v": f"{path}.value_proj",
        "o": "attention.output.dense",
    }
    # With shared keys, q and k also project the embeddings of distances, one table for all rows: an adapter changes
    # that projection too (it is a change of the weights), so it is computed once per adapter.
    shared = Groupwise(path, "disentangled_attention_bias", 2)
    attention = SubLayer(
        name="attention",
        exit="attention.output.dropout",
        residual=Ref("attention.output", 1),
        parts=parts,
        norms={"norm": "attention.output.LayerNorm"},
        core=path,
        groupwise={"q": shared, "k": shared} if getattr(config, "share_att_key", False) else {},
        # keys also meet queries made of distances, which differ from key to key
        cancels=not (config.relative_attention and "p2c" in config.pos_att_type),
    )
    absolute = config.position_biased_input
    return (
        StackRow(
            name="encoder",
            layers="encoder.layer",
            embed="embeddings.word_embeddings",
            hidden=config.hidden_size,
            sublayers=(attention, _MLP),
            position_start=0 if absolute else None,
            position_limit=config.max_position_embeddings if absolute else None,
        ),
    )


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


ROWS = (
    Family(("bert", "electra"), _bert, heads, "mean"),
    Family(("roberta", "xlm-roberta", "camembert"), _roberta, heads, "mean"),
    Family(("mpnet",), _mpnet, heads, "mean", off_interface),
    Family(("deberta-v2",), _deberta, heads, "mean", off_interface),
    Family(("distilbert",), _distilbert, lambda c: (c.n_heads, c.dim // c.n_heads), "mean"),
)
