"""Shared by every test: one thread, quiet libraries, no network, and a tiny real tokenizer."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP processes on few cores slow each other tenfold
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest.register_assert_rewrite("checks")


@pytest.fixture(scope="session", autouse=True)
def quiet_torch():
    """One thread, and no progress reports from transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """No test reaches the store of the person who runs it."""
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "onebase-home"))


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of at most 64 tokens with BOS 0, PAD 1, EOS 2, UNK 3."""
    from families import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="module")
def browser():
    """The Chromium of the system, driven by playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()
