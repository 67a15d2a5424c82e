"""The families under test: tiny random models, one row per case, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.gptj import modeling_gptj

VOCABULARY = 64
BOS, PAD, EOS, FIRST = 0, 1, 2, 4  # FIRST: the first id that is an ordinary word
WINDOW = 4  # Gemma's sliding window; test sequences are longer

TEXTS = (
    "the cold river runs under the old bridge and the road",
    "a small bird sings in the tall tree before the rain comes down",
    "we walk along the river and talk about the work of the day",
    "nothing was easy and yet it worked in the end",
    "good bad fine awful great poor warm cold dry wet",
)

SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}
COMMON = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
T5 = {
    **SPECIAL,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
}
OPT = {**SPECIAL, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    **SPECIAL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    "max_position_embeddings": 64,
}
MODERNBERT = {
    **COMMON,
    "cls_token_id": BOS,
    "sep_token_id": EOS,
    "local_attention": 2 * WINDOW,
    "layer_types": ["full_attention", "sliding_attention"],
}
FALCON = {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
DEBERTA = {**COMMON, "type_vocab_size": 2, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ROBERTA = {**COMMON, "max_position_embeddings": 64 + PAD + 1}


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        build: makes the model; seeded by `make`.
        writes: has an LM head and generates.
        positions: tokens that fit its learned positions, or None.
        attention: the implementations that transformers has for it.
        refuses: part of a site -> what the error says when a method needs that part.
        checkpoints: transformers can checkpoint its layers.
        full: every test of the suite is in the default run; else only those that mix a batch, the rest is slow.
    """

    build: Callable[[], nn.Module]
    writes: bool = False
    positions: int | None = 64
    attention: tuple[str, ...] = ("eager", "sdpa")
    refuses: Mapping[str, str] = field(default_factory=dict)
    checkpoints: bool = True
    full: bool = False


PRESENT: dict[str, Case] = {
    "bert": Case(lambda: tf.BertModel(tf.BertConfig(**COMMON))),
    "bert-decoder": Case(lambda: tf.BertLMHeadModel(tf.BertConfig(**COMMON, is_decoder=True)), writes=True),
    "distilbert": Case(
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(**SPECIAL, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64)
        )
    ),
    "roberta": Case(lambda: tf.RobertaModel(tf.RobertaConfig(**ROBERTA))),
    "xlm-roberta": Case(lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**ROBERTA))),
    "camembert": Case(lambda: tf.CamembertModel(tf.CamembertConfig(**ROBERTA))),
    "gpt2": Case(
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        writes=True,
    ),
    "opt": Case(
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=32)),
        writes=True,
    ),
    "opt-post": Case(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False)
        ),
        writes=True,
    ),
    "llama": Case(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, num_key_value_heads=2)), writes=True, positions=None
    ),
    "qwen3": Case(
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8)),
        writes=True,
        positions=None,
    ),
    "gemma3": Case(
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **COMMON,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        writes=True,
        positions=None,
    ),
    "t5": Case(
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, feed_forward_proj="relu")),
        writes=True,
        positions=None,
    ),
    "t5-gated": Case(
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
        writes=True,
        positions=None,
    ),
}

OFF = {"kv": "attention interface"}  # attention that no prefix reaches
EXPERTS = dict.fromkeys(("gate", "up", "down", "hidden"), "experts")
EAGER = ("eager",)

MORE: dict[str, Case] = {
    "qwen2": Case(
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**COMMON, num_key_value_heads=2)), writes=True, positions=None
    ),
    "mistral": Case(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=WINDOW)),
        writes=True,
        positions=None,
    ),
    "modernbert": Case(lambda: tf.ModernBertModel(tf.ModernBertConfig(**MODERNBERT)), positions=None),
    "electra": Case(lambda: tf.ElectraModel(tf.ElectraConfig(**COMMON, embedding_size=16))),
    "electra-wide": Case(lambda: tf.ElectraModel(tf.ElectraConfig(**COMMON, embedding_size=32))),
    "albert": Case(
        lambda: tf.AlbertModel(
            tf.AlbertConfig(
                **{**COMMON, "num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2, inner_group_num=2
            )
        ),
        checkpoints=False,
    ),
    "bart": Case(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART, scale_embedding=True, init_std=0.15)), writes=True
    ),
    "mt5": Case(
        # mT5's logits are not scaled down as T5's are; at random they would be ten times as large
        lambda: tf.MT5ForConditionalGeneration(
            tf.MT5Config(**T5, feed_forward_proj="gated-gelu", initializer_factor=0.2)
        ),
        writes=True,
        positions=None,
    ),
    "deberta-v2": Case(
        lambda: tf.DebertaV2Model(
            tf.DebertaV2Config(
                **DEBERTA,
                position_biased_input=False,
                share_att_key=True,
                position_buckets=8,
                norm_rel_ebd="layer_norm",
                conv_kernel_size=3,
            )
        ),
        positions=None,
        attention=EAGER,
        refuses=OFF,
    ),
    "deberta-v2-absolute": Case(
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(**DEBERTA, embedding_size=16)), attention=EAGER, refuses=OFF
    ),
    "phi3": Case(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**COMMON, num_key_value_heads=2)), writes=True, positions=None
    ),
    "gpt-neox": Case(lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON)), writes=True, positions=None),
    "gpt-neox-sequential": Case(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON, use_parallel_residual=False)),
        writes=True,
        positions=None,
    ),
    "gemma2": Case(
        lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(
                **COMMON,
                num_key_value_heads=2,
                head_dim=8,
                query_pre_attn_scalar=8,
                attn_logit_softcapping=1.0,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        writes=True,
        positions=None,
        attention=EAGER,
    ),
    "mpnet": Case(
        lambda: tf.MPNetModel(tf.MPNetConfig(**{**COMMON, "max_position_embeddings": 64 + 2})),
        attention=EAGER,
        refuses=OFF,
        checkpoints=False,
    ),
    "olmo2": Case(
        lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**COMMON, num_key_value_heads=2)), writes=True, positions=None
    ),
    "gptj": Case(
        lambda: tf.GPTJForCausalLM(
            tf.GPTJConfig(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, rotary_dim=4)
        ),
        writes=True,
        # on transformers' attention interface since 5.24
        **({} if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS") else {"attention": EAGER, "refuses": OFF}),
    ),
    "falcon": Case(lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON)), writes=True, positions=None, refuses=OFF),
    "falcon-new": Case(
        lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
        writes=True,
        positions=None,
        refuses=OFF,
    ),
    "falcon-sequential": Case(
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True)
        ),
        writes=True,
        positions=None,
        refuses=OFF,
    ),
    "bloom": Case(
        lambda: tf.BloomForCausalLM(
            tf.BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
        ),
        writes=True,
        positions=None,
        attention=EAGER,
        refuses=OFF,
    ),
    "mixtral": Case(
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        ),
        writes=True,
        positions=None,
        refuses=EXPERTS,
    ),
}
CASES: dict[str, Case] = {name: replace(case, full=True) for name, case in PRESENT.items()} | MORE


def listed(names: Iterable[str]) -> list[Any]:
    """Return names for `parametrize`: those outside the default run are marked slow."""
    return [pytest.param(name, marks=() if CASES[name].full else pytest.mark.slow) for name in names]


def pairs(names: Iterable[str], always: bool = False) -> list[Any]:
    """Return (family, attention) for `parametrize`; with `always`, one attention of each is in the default run."""
    found = []
    for name in names:
        case = CASES[name]
        for attention in case.attention:
            default = case.full or (always and attention == case.attention[-1])
            marks = () if default else pytest.mark.slow
            found.append(pytest.param(name, attention, marks=marks, id=f"{name}-{attention}"))
    return found


NAMES = tuple(CASES)
FAMILIES = listed(CASES)
WRITING = tuple(name for name, case in CASES.items() if case.writes)
WRITERS = listed(WRITING)
ATTENTION = ("eager", "sdpa")


def make(family: str, attention: str = "", seed: int = 0) -> Any:
    """Build a family's model with every parameter away from its start, so that no gain, bias or position is trivial.

    Args:
        family: name of a case.
        attention: an implementation that the case has; its last one by default.
        seed: of all parameters.
    """
    torch.manual_seed(seed)
    model = CASES[family].build()
    attention = attention or CASES[family].attention[-1]
    model.set_attn_implementation(attention)
    # transformers ignores the request for families off its attention interface; Falcon reads the config in its forward
    model.config._attn_implementation = attention
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer() -> Any:
    """Train a word-level tokenizer on a few lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=60,
    )
