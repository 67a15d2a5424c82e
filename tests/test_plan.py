"""Planning: costs from a config alone, a plain answer where there are no weights, memory as training really uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from onebase.cli.main import app
from onebase.comparison.planning import plan
from onebase.errors import ConfigError, UnsupportedError
from onebase.loading import embedded_folder

CONFIG = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
METHODS = ["lora(rank=4)", "bottleneck", "dora", "prompt(length=5)", "prefix(length=3)", "bitfit"]


@pytest.fixture
def folder(tmp_path):
    """A base of which only the config is there."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_counts_are_those_of_real_adapters(folder) -> None:
    from onebase.comparison.footprint import read_config, shallow

    found = plan(folder, tasks=5, methods=METHODS, batch=4, length=16)
    real = shallow(read_config(folder)[0], 3)
    values = sum(p.numel() for p in real.model.parameters())
    head = 2 * (32 + 1)
    assert found.values == values and found.layers == 3
    assert found.costs[0].parameters == values + head
    for cost, method in zip(found.costs[1:], METHODS, strict=True):
        assert not cost.refused
        if not method.startswith("prompt"):  # without a tokenizer no prompt can be started from words
            assert cost.parameters == real.add("a", method).count() + head, method
            real.remove("a")
        assert cost.total == 4 * values + 5 * cost.file
        assert cost.training is not None and cost.training > cost.weights
    assert found.costs[0].total == 5 * 4 * (values + head)


def test_a_hosted_model_gets_a_plain_answer() -> None:
    for name in ("gpt-4o", "claude-3", "gemini-2"):
        with pytest.raises(UnsupportedError, match="weights"):
            plan(name)


def test_full_fine_tuning_can_be_asked_for(folder) -> None:
    for others in ([], ["ia3"]):
        found = plan(folder, methods=["full", *others], length=16)
        assert [cost.method for cost in found.costs] == ["full fine-tuning", *others]


def test_numbers_are_checked(folder) -> None:
    with pytest.raises(ConfigError, match="tasks = 0"):
        plan(folder, tasks=0)
    with pytest.raises(ConfigError, match="at most 64 tokens"):
        plan(folder, length=65)


def test_command(folder) -> None:
    done = CliRunner().invoke(app, ["plan", "-b", folder, "--tasks", "20", "-m", "lora", "--length", "16", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [cost["method"] for cost in document["costs"]] == ["full fine-tuning", "lora"]
    done = CliRunner().invoke(app, ["plan", "-b", folder, "-m", "lora, ia3", "--length", "16"])
    assert "full fine-tuning" in done.stdout and "ia3" in done.stdout and "memory to train" in done.stdout


REAL = """
import resource, sys
import torch, transformers, pandas, scipy.stats, sklearn.linear_model
import transformers.models.bert.modeling_bert
import onebase as ob, onebase.training, onebase.evaluation
torch.set_num_threads(1)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
base = ob.load_base("minilm")
words = "alpha beta river stone green house".split()
text = lambda i: " ".join(words[(i * i // 7 + j * j + (i >> j % 8)) % 6] for j in range(62))
ob.train(base, [{"text": text(i), "label": "ab"[i % 2]} for i in range(200)], sys.argv[1], epochs=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prompt", "bitfit"])
def test_memory_is_what_training_uses(method) -> None:
    if embedded_folder() is None:
        pytest.skip("the embedded base is not installed (extra 'demo')")
    done = subprocess.run([sys.executable, "-c", REAL, method], capture_output=True, text=True, check=True)
    cost = plan("minilm", methods=[method], length=64).costs[1]
    assert cost.training == pytest.approx(float(done.stdout.split()[-1]), rel=0.2)
