"""AdapterHub's files, both ways, against the library itself in an environment of its own.

ONEBASE_ADAPTERHUB names the python of an environment with the packages adapters and safetensors (it needs
transformers 4, so it cannot be this one); `benchmarks/peers.py` makes such an environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FIRST, VOCABULARY, make, tiny_tokenizer
from safetensors.torch import load_file, save_file

from onebase import Base

LIBRARY = os.environ.get("ONEBASE_ADAPTERHUB", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY, reason="ONEBASE_ADAPTERHUB names no python that has AdapterHub's library"),
]
WORKER = Path(__file__).with_name("adapterhub_worker.py")
NEAR = 1e-5
OURS = {
    "bert": {
        "houlsby": "bottleneck(preset='houlsby', size=8, norms=False)",
        "pfeiffer": "bottleneck(preset='pfeiffer', size=8, norms=False)",
        "parallel": "bottleneck(preset='parallel', size=8, norms=False)",
        "lora": "lora(rank=4, alpha=8, sites=('q', 'v'))",
        "lora-mlp": "lora(rank=2, alpha=4, sites=('q', 'k', 'v', 'up', 'down'))",
        "ia3": "ia3(sites=('k', 'v', 'up'))",
        "prefix": "prefix(length=5, init='random')",
        "prompt": "prompt(length=4, place='embedded')",
        "prompt-after": "prompt(length=3, init='uniform', place='embedded', behind=1)",
    },
    "gpt2": {
        "pfeiffer": "bottleneck(preset='pfeiffer', size=8, norms=False)",
        "prefix": "prefix(length=3, init='random')",
    },
}


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny base, and its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model = make(request.param, "eager")
    model = model if request.param == "bert" else model.base_model
    model.save_pretrained(folder)
    with Base(model, tiny_tokenizer(), id="tiny") as found:
        yield found, folder


def ask(does: str, base: Path, folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Let the library write or read; return what it computed."""
    save_file({"ids": ids}, str(folder / "ids.safetensors"))
    words = [LIBRARY, str(WORKER), does, str(base), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "states.safetensors")


def tokens() -> torch.Tensor:
    return torch.randint(FIRST, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def ours(base: Base, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the states under an adapter, or what its head says."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        if base.adapters[name].head is not None:
            return torch.stack(list(base.outputs(batch, [name] * len(ids))))
        return base.states(batch, [name] * len(ids))


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def test_what_the_library_writes_computes_the_same_here(base: Any, tmp_path: Path) -> None:
    (own, folder), ids = base, tokens()
    theirs = ask("write", folder, tmp_path, ids)
    wrong = {}
    for name, expected in theirs.items():
        pickled, safe = tmp_path / name / "pytorch_adapter.bin", tmp_path / name / "adapter.safetensors"
        if pickled.exists():  # it is refused, and the message names this command
            words = [sys.executable, "-m", "onebase.store.interop.pickle", str(pickled), str(safe)]
            subprocess.run(words, check=True, capture_output=True)
            pickled.unlink()
        own.import_adapter(tmp_path / name, name=name)
        found = gap(ours(own, name, ids), expected)
        plain = (
            gap(ours(own, name, ids), own.states({"input_ids": ids}, None)) if not name.startswith("headed") else 1.0
        )
        if found > NEAR or plain < 1e-3:
            wrong[name] = (found, plain)
        own.remove(name)
    assert not wrong and len(theirs) >= 3


def test_what_is_written_here_computes_the_same_there(base: Any, tmp_path: Path) -> None:
    (own, folder), ids = base, tokens()
    kind, expected = own.anatomy.model_type, {}
    for number, (name, method) in enumerate(OURS[kind].items()):
        adapter = own.add(name, method)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter.module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected[name] = ours(own, name, ids)
        own.export(name, tmp_path / name, to="adapterhub", head=False)
        own.remove(name)
    theirs = ask("read", folder, tmp_path, ids)
    wrong = {name: found for name, found in ((n, gap(theirs[n], expected[n])) for n in expected) if found > NEAR}
    assert not wrong
