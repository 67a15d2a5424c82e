"""Tiny random models of any text class: the size fields of a config that are known by name, set small.

Sizes are chosen so that the usual divisibilities hold: width 32 = 4 heads of 8, 2 key/value heads, 2 layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOCABULARY, PAD, BOS, EOS = 64, 1, 0, 2
WIDTH, HEADS, KV_HEADS, HEAD, INNER, LAYERS, POSITIONS, EXPERTS = 32, 4, 2, 8, 48, 2, 64, 4

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "padded_vocab_size", "encoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "n_words"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "d_embed", "embedding_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "dim_model", "input_embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "dim_ff", "shared_intermediate_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), INNER),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"), INNER),
    **dict.fromkeys(("block_ff_dim", "mlp_dim", "prefix_dense_intermediate_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_hidden_groups"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "attention_head_dim", "kv_channels", "global_head_dim"), HEAD),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), POSITIONS),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "max_sequence_length"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k", "topk_group"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD),
    "qk_head_dim": 2 * HEAD,
    "rotary_dim": HEAD,
    "topk_group": 1,
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"), 16),
    **dict.fromkeys(("local_attention", "index_topk"), 16),
    **dict.fromkeys(("ssm_state_size", "state_size", "mamba_d_state", "mamba_expand_ratio"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "n_groups", "mamba_n_groups", "mamba_ngroups", "mamba_d_conv"), 2),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "lru_width", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), HEAD),
    "num_kv_shared_layers": 0,
    "mlp_expansion_factor": 2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": None,
    "mask_token_id": 3,
    "sep_token_id": EOS,
    "cls_token_id": BOS,
}
# Lists with an entry per layer are cut to as many layers as there are.
PER_LAYER = (
    "layer_types",
    "attention_layers",
    "layers_block_type",
    "mlp_layer_types",
    "block_types",
    "layer_type_list",
)
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
# What a single class needs beyond the names above, each with the rule of its modelling file that asks for it.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "hidden_size": WIDTH},  # pairs make the layers
    "roberta": {"max_position_embeddings": POSITIONS + PAD + 1},  # positions start after the padding id
    "falcon": {"new_decoder_architecture": False},
    "convbert": {"embedding_size": WIDTH, "head_ratio": 2},
    "esm": {"vocab_list": None, "position_embedding_type": "rotary", "token_dropout": False},
    "xlm": {"max_position_embeddings": POSITIONS},
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    "mpt": {"max_seq_len": POSITIONS},
    "squeezebert": {"q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
                    "intermediate_groups": 1, "output_groups": 1},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "embedding_size": WIDTH, "hidden_size": WIDTH},
    "encoder-decoder": {  # the decoder reads the encoder only where its config says so
        "encoder": BERT,
        "decoder": {**BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "gpt_oss": {"num_local_experts": EXPERTS},
    "phi": {"partial_rotary_factor": 0.5},
}  # fmt: skip


def shrunk(model_type: str) -> Any:
    """Return a tiny config of a model type.

    Raises:
        Exception: whatever the config's class says against the sizes.
    """
    from transformers import AutoConfig

    plain = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **(_sizes(plain) | SPECIAL.get(model_type, {})))


def _sizes(config: Any) -> dict[str, Any]:
    """Return the small values of the fields that a config has, those of nested configs too."""
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    settings = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:
        settings.pop("head_dim", None)  # such classes derive it, and their keys have as many heads as the queries
        settings["num_key_value_heads"] = HEADS
    settings |= dict(_per_layer(config))
    for name in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            settings[name] = {**_sizes(inner), "model_type": inner.model_type}
    return settings


def _per_layer(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the lists with an entry per layer, cut so that every kind of layer that fits is kept."""
    for name in PER_LAYER:
        value = getattr(config, name, None)
        own = getattr(type(config), getattr(config, "attribute_map", {}).get(name, name), None)
        if isinstance(value, list) and value and not isinstance(own, property):
            kinds = list(dict.fromkeys(value))[:LAYERS]
            yield name, (kinds * LAYERS)[:LAYERS]


def text_types() -> list[str]:
    """Return every model type that transformers lists as a text model, sorted."""
    from transformers.models.auto import modeling_auto as auto

    names: set[str] = set()
    for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_ENCODING"):
        names |= set(getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
    return sorted(names)


def build(model_type: str) -> Any:
    """Return a tiny random model: with a language model head where a class has one, else the backbone.

    Every parameter is moved away from its start, so that no gain, bias or position is trivial.
    """
    import torch
    from transformers import AutoModel
    from transformers.models.auto import modeling_auto as auto

    config = shrunk(model_type)
    loader: Any = AutoModel
    if getattr(config, "is_encoder_decoder", False):
        loader = (
            auto.AutoModelForSeq2SeqLM if model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES else AutoModel
        )
    elif (
        model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ):
        loader = auto.AutoModelForCausalLM
    torch.manual_seed(0)
    model = loader.from_config(config)
    size = sum(p.numel() for p in model.parameters())
    if size > 20_000_000:
        raise ValueError(f"{size / 1e6:.0f} million parameters left: its sizes have other names")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.float().eval()
