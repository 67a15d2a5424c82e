"""Encoder-decoders: T5, mT5, BART."""

from __future__ import annotations

from typing import Any

from onebase.anatomy.rows import Family, StackRow, SubLayer
from onebase.core.site import Ref


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


def _bart_attention(name: str, core: str, heads: int, width: int) -> SubLayer:
    return SubLayer(
        name=name,  # type: ignore[arg-type]
        exit=core,
        residual=Ref(core, 0),
        parts={"q": f"{core}.q_proj", "k": f"{core}.k_proj", "v": f"{core}.v_proj", "o": f"{core}.out_proj"},
        norms={"norm": f"{core}_layer_norm"},
        core=core,
        heads=(heads, width // heads),
    )


_BART_MLP = SubLayer(
    name="mlp",
    exit="fc2",
    residual=Ref("fc1", 0),
    parts={"up": "fc1", "down": "fc2"},
    norms={"norm": "final_layer_norm"},
)


def _bart_stack(config: Any, name: str, *attention: SubLayer) -> StackRow:
    return StackRow(
        name=name,  # type: ignore[arg-type]
        path=name,
        layers="layers",
        embed="embed_tokens",
        sublayers=(*attention, _BART_MLP),
        causal=name == "decoder",
        position_limit=config.max_position_embeddings,
        position_module="embed_positions",
        position_offset=2,  # the first two rows of the table are never read
        feeds="decoder" if name == "encoder" else "",
        layer_dropout=("dropout", "activation_dropout"),
    )


def _bart(config: Any) -> tuple[StackRow, ...]:
    read, write, d = config.encoder_attention_heads, config.decoder_attention_heads, config.d_model
    encoder = _bart_attention("attention", "self_attn", read, d)
    decoder = _bart_attention("attention", "self_attn", write, d)
    cross = _bart_attention("cross", "encoder_attn", write, d)
    return (_bart_stack(config, "encoder", encoder), _bart_stack(config, "decoder", decoder, cross))


ROWS = (
    Family(("t5", "mt5"), _t5, lambda c: (c.num_heads, c.d_kv), "mean"),
    Family(("bart",), _bart, lambda c: (c.encoder_attention_heads, c.d_model // c.encoder_attention_heads), "mean"),
)
