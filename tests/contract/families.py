"""The families under test: tiny random models, one row per case, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

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
ROBERTA = {**COMMON, "max_position_embeddings": 64 + PAD + 1}


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        build: makes the model; seeded by `make`.
        writes: has an LM head and generates.
        positions: tokens that fit its learned positions, or None.
    """

    build: Callable[[], nn.Module]
    writes: bool = False
    positions: int | None = 64


CASES: dict[str, Case] = {
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
FAMILIES = tuple(CASES)
WRITERS = tuple(name for name, case in CASES.items() if case.writes)
ATTENTION = ("eager", "sdpa")


def make(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """Build a family's model with every parameter away from its start, so that no gain, bias or position is trivial."""
    torch.manual_seed(seed)
    model = CASES[family].build()
    model.set_attn_implementation(attention)
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
