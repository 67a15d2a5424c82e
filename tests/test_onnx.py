"""Merged encoders as ONNX: onnxruntime computes what the attached adapter does, for any number of rows and tokens."""

from __future__ import annotations

import checks
import pytest
import torch
from families import FIRST, VOCABULARY, make

from onebase import Base
from onebase.errors import UnsupportedError

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="the extra 'onnx' is not installed")

EQUAL = 1e-4


@pytest.mark.filterwarnings("ignore")  # of the exporter's own code
@pytest.mark.parametrize("method", ["lora(rank=2)", pytest.param("dora(rank=2) + bitfit", marks=pytest.mark.slow)])
def test_onnxruntime_answers_as_the_adapter_does(tokenizer, tmp_path, method):
    from onebase.store.interop.onnx import FILE, answers_of

    with Base(make("bert"), tokenizer) as base:
        checks.disturb(base.add("x", method).module, 1)
        before = {k: t.clone() for k, t in base.model.state_dict().items()}
        done = base.export("x", tmp_path / "out", to="onnx")
        assert done.gap <= EQUAL * max(1.0, done.size) and (tmp_path / "out" / "tokenizer.json").is_file()
        assert all(torch.equal(before[k], t) for k, t in base.model.state_dict().items())
        for rows, tokens in ((1, 3), (3, 11), (2, 30)):
            ids = torch.randint(FIRST, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(rows))
            mask = torch.ones_like(ids)
            mask[-1, tokens - 1 :] = 0
            theirs = answers_of(tmp_path / "out" / FILE, [(ids, mask)])[0]
            for route, near in (("x", True), (None, False)):
                with torch.no_grad(), base.use(route):
                    ours = checks.values(base.model(input_ids=ids, attention_mask=mask))
                gap = checks.gap(theirs[mask.bool()], ours[mask.bool()])
                assert (gap <= EQUAL * checks.size(ours)) is near


def test_what_cannot_be_written_says_so(tokenizer, tmp_path):
    with Base(make("gpt2"), tokenizer) as base:
        base.add("x", "lora(rank=2)")
        with pytest.raises(UnsupportedError, match="optimum-cli"):
            base.export("x", tmp_path / "out", to="onnx")
        with pytest.raises(UnsupportedError, match="convert_lora_to_gguf"):
            base.export("x", tmp_path / "out", to="gguf")
    with Base(make("bert"), tokenizer) as base:
        base.add("x", "prompt(length=2)")
        with pytest.raises(UnsupportedError, match="no weight of the base holds"):
            base.export("x", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()
