"""`base.as_model` inside the libraries people train and serve with, each the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import onebase as ob
from onebase.errors import ConfigError, RouteError, UnknownNameError, UnsupportedError
from onebase.methods.registry import parse_method

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import TEXTS, make
from test_as_model import TASK, tiny_data
from transformers import Trainer, TrainingArguments


def arguments(folder: Path, **settings) -> TrainingArguments:
    """Return the settings of a short run on the CPU."""
    return TrainingArguments(
        output_dir=str(folder), logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        dataloader_pin_memory=False, per_device_train_batch_size=5, max_steps=12, learning_rate=2e-2, **settings,
    )  # fmt: skip


def test_trainer_keeps_the_best_and_goes_on_from_a_checkpoint(tokenizer, tmp_path) -> None:
    """The optimizer and the checkpoints hold the adapter only; resume and load_best_model_at_end work."""
    from safetensors.torch import load_file

    data = tiny_data(tokenizer, labels=True)
    settings = {
        "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
        "save_total_limit": 4,
    }  # fmt: skip

    def trainer(base: ob.Base, folder: Path, **more) -> Trainer:
        base.add("a", "lora(rank=2)", task=TASK, seed=3)
        return Trainer(
            base.as_model("a"), arguments(folder, **settings, **more), train_dataset=data, eval_dataset=data[:6]
        )

    with ob.Base(make("bert"), tokenizer) as base:
        before = checks.snapshot(base.model)
        first = trainer(base, tmp_path / "run")
        first.train()
        held = {id(p) for group in first.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in base.adapters["a"].parameters()}
        kept = {key: t.clone() for key, t in base.adapters["a"].tensors().items()}
        scores = {e["step"]: e["eval_loss"] for e in first.state.log_history if "eval_loss" in e}
        assert first.state.best_metric == min(scores.values())
        own = {tuple(t.shape) for t in kept.values()}
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            saved = load_file(folder / "model.safetensors")
            assert {tuple(t.shape) for t in saved.values()} <= own
            assert sum(t.numel() for t in saved.values()) <= sum(t.numel() for t in kept.values())
        base.remove("a")
        again = trainer(base, tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert again.state.global_step == 12
        for key, value in base.adapters["a"].tensors().items():
            assert torch.allclose(value, kept[key], atol=1e-6), key
        base.remove("a")
        assert checks.differences(before, checks.snapshot(base.model)) == []


def test_pipeline_answers_as_the_base_does(tokenizer) -> None:
    """transformers' pipeline over the module gives the probabilities of `predict`."""
    from transformers import pipeline

    texts = ["a cold river", "the old bridge"]
    with ob.Base(make("bert"), tokenizer) as base:
        base.add("a", "lora(rank=2)", task=TASK)
        checks.disturb(base.adapters["a"].head, 1)
        checks.disturb(base.adapters["a"].module, 2)
        model = base.as_model("a")
        model.config.id2label = {0: "a", 1: "b"}
        run = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
        for found, expected in zip(run(texts), base.predict(texts, "a")):
            given = {each["label"]: each["score"] for each in found}
            assert given == pytest.approx(expected.probabilities, abs=1e-5)


# -- sentence-transformers -------------------------------------------------------------------------------------------


def test_sentence_transformers_encodes_under_a_route(tokenizer, tmp_path) -> None:
    """`encode` over the base's own model gives our vectors, adapter by adapter; unrouted it gives the plain base's."""
    parts = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    make("bert").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader = models.Transformer(str(tmp_path), max_seq_length=60)
    encoder = parts.SentenceTransformer(modules=[reader, models.Pooling(32, "mean")], device="cpu")
    texts = [*TEXTS, "a bird", "the road"]
    with ob.Base(reader.auto_model, tokenizer) as base:
        plain = encoder.encode(texts)
        for number, method in enumerate(["lora(rank=2)", "prefix(length=3, init='random')", "prompt(length=2)", "ia3"]):
            checks.disturb(base.add(method, method).module, number)
            with base.use(method):
                found = torch.tensor(encoder.encode(texts, batch_size=3))  # it sorts rows by length
            expected = torch.stack([torch.as_tensor(p.embedding) for p in base.predict(texts, method)])
            assert checks.gap(found, expected) <= 1e-5
            assert checks.gap(found, torch.tensor(plain)) > checks.VISIBLE
        with base.use(["lora(rank=2)"] * 2), pytest.raises(RouteError):
            encoder.encode(texts)  # a list does not fit rows that somebody else sorts and cuts
        assert (encoder.encode(texts) == plain).all()


def test_a_call_of_forward_itself_is_routed(tokenizer) -> None:
    """`model.forward(...)` skips torch's hooks; a stack that is called so answers as the adapter does all the same."""
    with ob.Base(make("bert"), tokenizer) as base:
        names = checks.attach(base, {n: parse_method(m) for n, m in METHODS.items()})
        ids, mask = checks.draw([*names, None]).padded("right")
        call = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad(), base.use([*names, None]):
            assert torch.equal(base.model(**call)[0], base.model.forward(**call)[0])
            assert torch.equal(base.model(**call)[0], base.model.forward(ids, mask)[0])
        own = base.model
        with ob.Base(own, tokenizer) as second, torch.no_grad():  # two bases of one model
            assert torch.equal(own(**call)[0], own.forward(**call)[0])
            checks.attach(second, {"z": parse_method("lora(rank=2)")})
            with second.use("z"):
                assert torch.equal(own(**call)[0], own.forward(**call)[0])
    assert "forward" not in own.__dict__


# -- accelerate ------------------------------------------------------------------------------------------------------


def offloaded(family: str, where: str, folder: Path):
    """Return the model of a family with its weights kept by accelerate, away from where they compute."""
    accelerate = pytest.importorskip("accelerate")
    model = make(family)
    if where == "memory":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model.save_pretrained(folder / "model")
    return type(model).from_pretrained(folder / "model", device_map={"": "disk"}, offload_folder=folder / "kept").eval()


METHODS = {
    "a": "lora(rank=2)", "b": "dora(rank=2)", "c": "prefix(length=2)", "d": "prompt(length=2)", "e": "ia3",
    "f": "bottleneck(size=4)", "g": "bitfit", "h": "layernorm",
}  # fmt: skip


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", ["bert", "bart", "llama", "t5"])
def test_an_offloaded_base_answers_as_a_resident_one(family, where, tokenizer, tmp_path) -> None:
    """Weights that are there only while their module computes: the same fingerprint, answers and gradients."""
    methods = checks.carried(ob.Base(make(family)), {n: parse_method(m) for n, m in METHODS.items()})
    rows = checks.draw([*methods, None])
    with ob.Base(make(family), tokenizer) as base, ob.Base(offloaded(family, where, tmp_path), tokenizer) as away:
        assert all(p.is_meta for p in away.model.parameters())
        assert away.device == torch.device("cpu")
        assert away.fingerprint() == base.fingerprint()
        for each in (base, away):
            checks.attach(each, methods)
        for side in ("left", "right"):
            with torch.no_grad():
                wanted, found = (checks.call_rows(each, rows, side) for each in (base, away))
            assert max(checks.gap(x, y) for x, y in zip(wanted, found)) <= checks.LOGITS
        for each in (base, away):
            checks.call_alone(each, rows.tokens[0], "a").square().sum().backward()
        for one, other in zip(base.adapters["a"].parameters(), away.adapters["a"].parameters()):
            assert checks.gap(one.grad, other.grad) <= checks.GRADIENTS
        stored = base.save("a")
        away.load(stored.ref, name="again")
        if base.has_lm_head:
            texts = [ob_base.generate(TEXTS[:2], ["a", None], max_new_tokens=4) for ob_base in (base, away)]
            assert texts[0] == texts[1]
        with pytest.raises(UnsupportedError, match="offloaded"):
            away.merge("a")


def test_a_base_on_several_devices_is_refused(tokenizer) -> None:
    """An adapter is on one device; where layers compute on others, adding it says so."""
    with ob.Base(make("bert"), tokenizer) as base:
        base.model.encoder.layer[1].to("meta")
        hook = pytest.importorskip("accelerate").hooks.AlignDevicesHook(execution_device=torch.device("cuda:1"))
        base.model.encoder.layer[1].output.dense._hf_hook = hook
        with pytest.raises(UnsupportedError, match="spread over cpu, cuda:1"):
            base.add("a", "lora")


def test_training_on_an_offloaded_base(tokenizer, tmp_path) -> None:
    """`train` gives the values that it gives on a resident base."""
    rows = [{"text": f"{word} {text}", "label": word} for text in TEXTS * 3 for word in ("good", "bad")]
    found = []
    for kept in (False, True):
        with ob.Base(offloaded("bert", "memory", tmp_path) if kept else make("bert"), tokenizer) as base:
            ob.train(base, rows, "lora(rank=2)", name=f"a{kept}", epochs=1, dtype="float32", attention="eager", seed=1)
            found.append({key: t.clone() for key, t in base.adapters[f"a{kept}"].tensors().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(t, found[1][key], atol=1e-5) for key, t in found[0].items())


# -- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_static_cache_writes_the_same(family, tokenizer) -> None:
    """A cache of fixed size changes no token, or is refused; settings that nothing reads are errors."""
    with ob.Base(make(family), tokenizer) as base:
        with pytest.raises(ConfigError, match=r"base\.bind\(names\)\.generate"):
            base.generate(TEXTS[0], streamer=object())
        with pytest.raises(UnknownNameError, match="max_new_tokens"):
            base.generate(TEXTS[0], max_new_token=3)
        methods = {"a": "lora(rank=2)", "b": "ia3", "c": "bottleneck(size=4)", "d": "prefix(length=2, init='random')",
                   "e": "prompt(length=2)"}  # fmt: skip
        names = checks.attach(base, {n: parse_method(m) for n, m in methods.items()})
        for name in names:
            settings = {"max_new_tokens": 6, "return_ids": True}
            wanted = base.generate(TEXTS[:1], name, **settings)
            try:
                found = base.generate(TEXTS[:1], name, cache_implementation="static", **settings)
            except UnsupportedError as error:
                assert "static" in str(error), name
                assert name in ("d", "e")
            else:
                assert found == wanted, name
