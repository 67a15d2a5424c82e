"""Everything that depends on the device: which one is taken, how much is computed at once, where bfloat16 can pay.

The CPU is what is tested all the time, CUDA where there is a card. Apple's MPS and Windows are written for but
untested: nothing outside of this file asks for a kind of device, and nothing on the way from data to adapter calls what
only POSIX has.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from onebase.errors import ConfigError

# Rows per forward in training on the CPU: rows are sorted by length within an effective batch, so smaller pieces mean
# less padding, and below this the fixed cost of a call shows.
CPU_ROWS = 16
# Tokens per forward in training where rows are packed, so that there is no padding: enough for the matrix products to
# run at full speed, few enough for what a layer computes to stay in the cache. 512, 1024 and 2048 were alike.
PACKED_TOKENS = 1024
# What the number of packed tokens is a multiple of on a CPU, whose matrix products are compiled for each shape.
PACKED_MULTIPLE = 32
# Most threads that answer rows of a served base on a CPU at the same time.
ANSWERING = 4
# Padded tokens of a micro-batch that several jobs share. On a CPU larger ones gain nothing: the matrices are long
# enough. The others are guesses for cards with 16 GB and for laptops.
SHARED_TOKENS = {"cpu": CPU_ROWS * 64, "cuda": 16384, "mps": 4096}


def choose_device(name: str | None) -> torch.device:
    """Return the device asked for; without a wish a CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: it is none, or it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ConfigError(f"device = {name!r}: expected cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: no CUDA device is there, or torch was installed without CUDA")
    return device


def answering_threads(device: torch.device, alone: bool) -> tuple[int, int]:
    """Return how many threads answer rows at the same time, and how many threads each of them computes with.

    On two cores two threads with one core each answer 20 % more texts of 128 tokens than one with both, and twice as
    many where texts come one by one: most of what is computed then is too small to be cut.

    Args:
        device: of the base.
        alone: nothing else computes with the base.
    """
    cores = torch.get_num_threads()
    count = min(cores, ANSWERING) if device.type == "cpu" and alone else 1
    return count, max(1, cores // count)


def keep_memory(shared: bool = False) -> None:
    """Ask the C library to keep freed memory for the next forward, where it has a function for that (glibc).

    Otherwise the pages of what a layer computes are returned and taken anew in every layer of a larger batch: 20,000
    page faults in a forward of 32 texts of 128 tokens, a tenth of its time. It holds for the whole process, which keeps
    up to 256 MiB that nobody uses; `give_back_memory` returns what is free.

    Args:
        shared: new threads take memory from where the others do, so that what one frees another has.
    """
    option = _of_libc("mallopt")
    if option is not None:
        option(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest that is taken
        option(-1, 256 << 20)  # M_TRIM_THRESHOLD: bytes that may be free at the end of the heap
        if shared:
            option(-8, 1)  # M_ARENA_MAX


def give_back_memory() -> None:
    """Ask the C library to return freed memory to the system, where it has a function for that (glibc)."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Any:
    """Return a function of the C library of this process, or None where it has none of that name."""
    import ctypes

    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def packed_tokens(device: torch.device) -> int | None:
    """Return tokens per forward in training where rows are packed; None: as many as an optimizer step has."""
    return PACKED_TOKENS if device.type == "cpu" else None


def packed_multiple(device: torch.device) -> int:
    """Return what the number of tokens of packed rows is brought to a multiple of."""
    return PACKED_MULTIPLE if device.type == "cpu" else 1


def micro_rows(device: torch.device, asked: int) -> int:
    """Return rows per forward in training."""
    return min(asked, CPU_ROWS) if device.type == "cpu" else asked


def shared_tokens(device: torch.device) -> int:
    """Return padded tokens of a shared micro-batch."""
    return SHARED_TOKENS.get(device.type, SHARED_TOKENS["cpu"])


def measures_attention(device: torch.device) -> bool:
    """Whether the attention implementation is worth measuring: fused kernels are always faster on a GPU."""
    return device.type == "cpu"


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 can pay: a GPU that has it, or a processor with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
