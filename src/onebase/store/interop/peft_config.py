"""What the settings of a PEFT file mean here: which change the function, and which only say how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onebase.core.patterns import safe_pattern

# Settings that say where the file comes from or how it was trained; the function of the stored tensors is the same.
HISTORY = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying",
    "lora_dropout", "vera_dropout", "init_ia3_weights", "init_weights", "d_initial", "fan_in_fan_out",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    "prefix_projection",
}  # fmt: skip
# Settings that are read: what they state is carried, or refused with a reason, or compared with the tensors.
TARGETS = {"target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"}
VIRTUAL = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
           "modules_to_save"}  # fmt: skip
READ: dict[str, set[str]] = {
    "LORA": TARGETS | {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
                       "init_lora_weights", "bias"},
    "IA3": TARGETS | {"feedforward_modules"},
    "VERA": TARGETS | {"r", "projection_prng_key", "save_projection", "bias"},
    "LN_TUNING": TARGETS,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
}  # fmt: skip
# Kinds of values of the settings that are read; None stands for a setting that is left out.
NUMBER, WHOLE, LISTED = (int, float), (int, type(None)), (str, list, type(None))
KINDS: dict[str, Any] = {
    "r": int, "lora_alpha": NUMBER, "projection_prng_key": int, "num_virtual_tokens": int, "token_dim": WHOLE,
    "num_layers": WHOLE, "num_attention_heads": WHOLE, "num_transformer_submodules": WHOLE,
    "rank_pattern": (dict, type(None)), "alpha_pattern": (dict, type(None)), "target_modules": LISTED,
    "exclude_modules": LISTED, "feedforward_modules": LISTED, "layers_to_transform": (int, list, type(None)),
    "use_dora": bool, "use_rslora": bool, "save_projection": bool, "task_type": (str, type(None)),
    "peft_version": (str, type(None)),
}  # fmt: skip
SIZES = {"r", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"}  # at least 1
# Methods of PEFT that are neither a change of weights nor a form that onebase has, and what they are instead.
NO_FORM = {
    "ADAPTION_PROMPT": "learned tokens that every layer attends to through a gate of their own",
    "CARTRIDGE": "a trained KV cache that stands in for a long text, with positions of its own",
    "CPT": "virtual tokens made from the tokens of examples, with a projection at every call",
    "LILY": "experts that a router weighs token by token",
    "MULTITASK_PROMPT_TUNING": "virtual tokens that depend on a task number in every call",
    "POLY": "skills that a task number in every call mixes",
    "SHADOW": "a second, smaller network beside the base",
    "XLORA": "LoRAs that are weighed token by token from the states of a first pass",
}
# Starts that keep the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base's own weights.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield every setting of a PEFT config that cannot be carried over."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        yield f"peft_type {str(kind)[:80]!r}: expected the name of a method, such as LORA"
        return
    if kind not in READ:
        why = f"it is {NO_FORM[kind]}, which no method here computes" if kind in NO_FORM else "the installed peft does "
        why += "" if kind in NO_FORM else "not know it as a change of weights either"
        yield f"peft_type {kind!r}: {why}; onebase reads {', '.join(READ)}, and what peft can merge into weights"
        return
    yield from kind_problems(config)
    for key, value in config.items():
        if key in READ[kind] or key in HISTORY:
            continue
        if value is not None and value is not False and value not in ({}, [], ""):
            yield f"{key} = {value!r}: onebase has nothing that does this; only files that leave it off can be read"
    if config.get("bias", "none") != "none":
        yield f"bias = {config['bias']!r}: trained biases of the base; only 'none' can be read"
    start = config.get("init_lora_weights", True)
    if not any(start is known or start == known for known in HARMLESS_STARTS):
        yield (
            f"init_lora_weights = {start!r}: this start changes the base's own weights, so the file fits a base that "
            "is not the checkpoint; convert it when saving (path_initial_model_for_weight_conversion)"
        )


def kind_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield every setting whose value is not of the kind that PEFT writes."""
    for key, value in config.items():
        expected = KINDS.get(key, object)
        names = " or ".join(k.__name__ for k in (expected if isinstance(expected, tuple) else (expected,)))
        fits = isinstance(value, expected) and not (isinstance(value, bool) and expected not in (bool, object))
        if key in SIZES and fits and value is not None and value < 1:
            fits, names = False, "at least 1"
        if isinstance(value, list) and key in KINDS:
            inner = int if key == "layers_to_transform" else str
            fits, names = fits and all(type(each) is inner for each in value), f"a list of {inner.__name__}"
        if key in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
            inner = int if key == "rank_pattern" else NUMBER
            numbers = all(isinstance(v, inner) and not isinstance(v, bool) and v > 0 for v in value.values())
            fits, names = fits and numbers, "numbers above 0 by pattern"
        if not fits:
            yield f"{key} = {str(value)[:80]!r}: expected {names}"


def pattern_value(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's path, as PEFT looks them up."""
    for key, value in values.items():
        if safe_pattern(rf"(.*\.)?({key})$").match(path):
            return value
    return default


def targeted(wanted: Any, path: str) -> bool:
    """Whether `target_modules` (a list of endings, or one regular expression) names a module."""
    if isinstance(wanted, str):
        return safe_pattern(wanted).fullmatch(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted or ())
