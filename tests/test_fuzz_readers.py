"""The fuzzer that goes by coverage, for half a minute, from whole files of each kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

pytestmark = pytest.mark.slow
SEEDS = (
    (0, save({"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.int64)})),
    (1, b'{"format": 1, "name": "reviews", "version": 1, "method": {"name": "lora", "settings": {"rank": 2}}}'),
    (2, b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "rank_pattern": {"query": 3}}'),
    (3, b"dora(rank=2, ranks={'q': 3}, rslora=True) + prefix(length=3)"),
    (4, b"reviews@3"),
    (5, rb"encoder\.layer\.[0-9]+\..*query$"),
    (6, b"\0text,label\ngood one,a\nbad one,b\nx,a\ny,b\n"),
    (6, b'\2{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n'),
)


def test_no_bytes_end_in_another_error_than_ours(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the package atheris is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, (reader, data) in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(bytes([reader]) + data)
    fuzzer = Path(__file__).with_name("fuzz_readers.py")
    limits = ["-max_total_time=30", "-max_len=4096", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([sys.executable, str(fuzzer), *limits, str(corpus)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
