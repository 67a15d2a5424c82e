"""ALBERT and ModernBERT: encoders with module names of their own.

ALBERT computes one layer many times with the same weights. A layer here is a set of weights, so a site of ALBERT is a
place in these weights, and an adapter acts at every call of it, as a change of the weights would: `encoder/0` of
albert-base is all of its 12 layers. An adapter of its own for each call would need sites that the weights do not have.
"""

from __future__ import annotations

from typing import Any

from onebase.anatomy.families.common import heads
from onebase.anatomy.rows import Family, StackRow, SubLayer, fused
from onebase.core.site import Ref


def _albert(config: Any) -> tuple[StackRow, ...]:
    attention = SubLayer(
        name="attention",
        exit="attention.output_dropout",
        residual=Ref("attention", 0),
        parts={
            "q": "attention.query",
            "k": "attention.key",
            "v": "attention.value",
            "o": "attention.dense",
        },
        norms={"norm": "attention.LayerNorm"},
        core="attention",
    )
    mlp = SubLayer(
        name="mlp",
        exit="ffn_output",
        residual=Ref("ffn", 0),
        parts={"up": "ffn", "down": "ffn_output"},
        norms={"norm": "full_layer_layer_norm"},
    )
    return (
        StackRow(
            name="encoder",
            layers="encoder.albert_layer_groups.*.albert_layers",
            embed="embeddings.word_embeddings",
            hidden=config.hidden_size,
            sublayers=(attention, mlp),
            position_limit=config.max_position_embeddings,
            pooler="pooler",
            pooler_reads="encoder",
        ),
    )


def _modernbert(config: Any) -> tuple[StackRow, ...]:
    d, inner = config.hidden_size, config.intermediate_size
    attention = SubLayer(
        name="attention",
        exit="attn",
        residual=Ref("attn_norm", 0),  # no norm but the identity in the first layer
        parts={**fused("attn.Wqkv", q=d, k=d, v=d), "o": "attn.Wo"},
        norms={"norm": "attn_norm"},
        core="attn",
    )
    mlp = SubLayer(
        name="mlp",
        exit="mlp",
        residual=Ref("mlp_norm", 0),
        # The half that goes through the activation is what other families call the gate.
        parts={**fused("mlp.Wi", gate=inner, up=inner), "down": "mlp.Wo"},
        norms={"norm": "mlp_norm"},
    )
    return (StackRow(name="encoder", layers="layers", embed="embeddings.tok_embeddings", sublayers=(attention, mlp)),)


ROWS = (
    Family(("albert",), _albert, heads, "mean"),
    Family(("modernbert",), _modernbert, heads, "mean"),
)
