"""The contract on a CUDA device: mixed rows, training, generation. Run with: pytest -m gpu"""

from __future__ import annotations

import checks
import pytest
import torch
from families import CASES, make
from methods import every

import onebase as ob
from onebase.base import Base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS = [{"text": f"the {a} cat {b} the mat", "label": b} for a in ("red", "old", "big", "sad") for b in ("sat", "saw")]


@pytest.mark.parametrize("family", list(CASES))
def test_mixed_batch_equals_rows_alone(family, tokenizer):
    """Outputs and gradients of one batch with every method equal each row by itself."""
    with Base(make(family, "").cuda(), tokenizer) as base:
        names = checks.attach(base, every())
        assert {p.device.type for n in names for p in base.adapters[n].module.parameters()} == {"cuda"}
        checks.adapters_are_visible(base, names)
        checks.mixed_equals_alone(base, names)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_gpu_answers_as_the_processor(family, tokenizer):
    """The same adapters give the same values on both devices."""
    found = []
    for device in ("cpu", "cuda"):
        with Base(make(family, "").to(device), tokenizer) as base, torch.no_grad():
            names = checks.attach(base, every())
            rows = checks.draw([*names, None])
            found.append([out.cpu() for out in checks.call_rows(base, rows, "right")])
    assert max(checks.gap(a, b) / checks.size(a) for a, b in zip(*found)) < 1e-4


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix(length=4)", "prompt(length=4)"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_training_learns_and_is_stored(method, dtype, tokenizer, tmp_path):
    """The loss falls, and the stored adapter answers on the processor as on the GPU."""
    model = make("bert", "")
    with Base(model.cuda(), tokenizer) as base:
        run = ob.train(base, ROWS * 8, method, epochs=3, dtype=dtype, seed=1)
        losses = [e["loss"] for e in run.history.epochs if "loss" in e]
        assert all(torch.isfinite(torch.tensor(losses)))
        texts = [row["text"] for row in ROWS]
        there = [a.probabilities for a in base.predict(texts, adapter=run.name)]
        tensors = base.adapters[run.name].tensors()
        assert all(t.device.type == "cuda" for t in tensors.values())
        base.adapters[run.name].module.cpu()
        if base.adapters[run.name].head is not None:
            base.adapters[run.name].head.cpu()
        base.model.cpu()
        here = [a.probabilities for a in base.predict(texts, adapter=run.name)]
    for a, b in zip(there, here):
        assert a.keys() == b.keys()
        assert max(abs(a[k] - b[k]) for k in a) < 1e-4


def test_generation_equals_alone(tokenizer):
    """Greedy texts of a mixed batch equal those of each row by itself."""
    with Base(make("llama", "").cuda(), tokenizer) as base:
        names = [*checks.attach(base, every()), None]
        prompts = ["the red cat", "the old cat sat"] * len(names)
        routed = [name for name in names for _ in range(2)]
        mixed = base.generate(prompts, adapter=routed, max_new_tokens=6)
        alone = [base.generate([p], adapter=[n], max_new_tokens=6)[0] for p, n in zip(prompts, routed)]
    assert mixed == alone
