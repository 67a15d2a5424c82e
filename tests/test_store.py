"""The store: what is saved comes back bit-equal, and everything wrong is said, at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save as to_bytes

from onebase.errors import (
    ConfigError,
    CorruptError,
    StoreError,
    UnknownNameError,
    UnsupportedError,
)
from onebase.store import (
    AdapterConfig,
    Store,
    Stored,
    digest_config,
    digest_tokenizer,
    fingerprint_model,
    render_card,
)
from onebase.store.disk import claim_number
from onebase.store.names import check_name, clean_name, name_of_path
from onebase.store.schema import digest_of
from onebase.tasks.registry import BUILT_IN

SRC = Path(__file__).resolve().parents[1] / "src"


def settings(**changes: object) -> dict:
    config = {
        "library_version": "0.1.0",
        "method": {"name": "lora", "settings": {"rank": 4, "sites": ["q", "v"]}},
        "task": {"kind": "classification", "labels": ["bad", "gut|ü"], "pooling": "mean", "max_length": 128},
        "base": {
            "id": "org/tiny",
            "fingerprint": "sha256:" + "0" * 64,
            "model_type": "bert",
            "hidden_size": 8,
            "layers": 2,
            "config_digest": "sha256:" + "1" * 64,
            "parameters": 1000,
        },
        "tokenizer": {"digest": "sha256:" + "2" * 64},
        "provenance": {"data": "reviews.csv", "rows": 10, "seed": 0, "command": None},
        "metrics": {"adapter": {"accuracy": 0.91}, "base": {"accuracy": 0.5}},
        "probes": {},
        "parameters": 12,
    }
    return {**config, **changes}


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    slab = torch.randn(2, 6, generator=g)
    return {
        "q.a": slab[0],  # a and b are views of one storage, as in a slab
        "q.b": slab[1].view(2, 3).t(),  # not contiguous
        "half": torch.randn(3, generator=g).bfloat16(),
        "positions": torch.arange(4),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def add(store: Store, name: str = "reviews", **changes: object) -> Stored:
    return store.save(name, config=settings(**changes), tensors=some_tensors())


def reseal(folder: Path, change) -> None:
    """Edit a config as a careful forger would: with a right digest."""
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    change(raw)
    raw["digest"] = digest_of(raw)
    path.write_text(json.dumps(raw))


def test_tensors_come_back_bit_equal(store):
    stored = add(store)
    for found in (stored, store.resolve("reviews"), store.resolve(stored.path)):
        back = found.tensors()
        assert back.keys() == some_tensors().keys()
        for name, tensor in some_tensors().items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)
        found.verify()
        assert found == stored
    assert stored.ref == "reviews@1"
    assert sorted(os.listdir(stored.path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert list((store.root / ".tmp").iterdir()) == []


def test_config_comes_back_with_what_the_store_fills(store):
    stored = add(store)
    raw = json.loads((stored.path / "adapter_config.json").read_text())
    assert raw == stored.config.model_dump() == store.resolve("reviews").config.model_dump()
    assert raw["task"]["labels"] == ["bad", "gut|ü"]
    assert raw["tensors"]["q.b"] == {"shape": [3, 2], "dtype": "float32"}
    assert raw["digest"] == digest_of(raw)
    assert (raw["format_version"], raw["library"], raw["version"]) == (1, "onebase", 1)


def test_everything_wrong_is_in_one_error(store):
    stored = add(store)
    tensors = some_tensors()
    del tensors["flag"]
    tensors["q.c"] = torch.zeros(1)
    tensors["q.a"] = torch.full((7,), float("nan"))
    tensors["half"] = tensors["half"].float()
    (stored.path / "adapter_model.safetensors").write_bytes(
        to_bytes({n: t.clone().contiguous() for n, t in tensors.items()})
    )
    (stored.path / "README.md").unlink()
    (stored.path / "pytorch_model.bin").write_bytes(b"x")
    (stored.path / "nested").mkdir()
    path = stored.path / "adapter_config.json"
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 5'))
    with pytest.raises(CorruptError) as caught:
        store.resolve("reviews").verify()
    message = str(caught.value)
    for part in [
        "reviews@1",
        "it was edited",
        "missing file README.md",
        "unexpected file pytorch_model.bin (looks like a pickle",
        "unexpected folder nested",
        "file adapter_model.safetensors has sha256",
        "missing tensor 'flag'",
        "unexpected tensor 'q.c'. Did you mean",
        "tensor 'q.a' has shape [7], the config says [6]",
        "tensor 'half' has dtype float32, the config says bfloat16",
        "tensor 'q.a' has 7 of 7 values NaN or inf",
        "10 problem(s)",
    ]:
        assert part in message, part
    with pytest.raises(CorruptError):
        stored.tensors()


def test_a_broken_config_does_not_hide_the_rest(store):
    stored = add(store)
    (stored.path / "adapter_config.json").write_text("{")
    (stored.path / "adapter_model.safetensors").write_bytes(b"12345678 no header")
    with pytest.raises(CorruptError, match=r"(?s)not valid JSON.*sha256.*not a readable safetensors file"):
        stored.verify()
    (stored.path / "adapter_config.json").unlink()
    (stored.path / "adapter_model.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"(?s)missing file adapter_config.json.*missing tensor 'q.a'"):
        stored.verify()


def test_a_folder_swapped_for_another_adapter_is_noticed(store):
    first, second = add(store), add(store)
    for name in os.listdir(first.path):
        (first.path / name).write_bytes((second.path / name).read_bytes())
    with pytest.raises(CorruptError, match="another adapter's"):
        first.tensors()
    with pytest.raises(CorruptError, match="copied or renamed"):
        store.resolve("reviews@1")


def test_a_config_without_the_tensors_digest_is_refused(store):
    stored = add(store)
    reseal(stored.path, lambda raw: raw["files"].pop("adapter_model.safetensors"))
    with pytest.raises(CorruptError, match=r"lists no sha256 for adapter_model\.safetensors"):
        store.resolve("reviews").verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(metod={}), "unknown field 'metod'. Did you mean 'method'"),
        (lambda raw: raw["base"].update(layer=2), "unknown field 'base.layer'. Did you mean 'layers'"),
        (lambda raw: raw["tensors"]["half"].update(shap=[]), "'tensors.half.shap'. Did you mean 'shape'"),
        (lambda raw: raw["base"].pop("layers"), "missing field 'base.layers'"),
        (lambda raw: raw.update(parameters="12"), "field 'parameters': .* got '12'"),
        (lambda raw: raw.update(library="peft"), "field 'library'"),
        (lambda raw: raw.update(name="../up"), "field 'name'"),
        (lambda raw: raw.update(created="2025-01-01T00:00:00+02:00"), "expected a UTC time"),
        (lambda raw: raw["files"].update({"../x": "0" * 64}), "names of files in this folder"),
    ],
)
def test_wrong_fields_are_named(store, change, message):
    stored = add(store)
    reseal(stored.path, change)
    with pytest.raises(CorruptError, match=message):
        store.resolve("reviews")


def test_repeated_keys_and_nan_are_not_json(store):
    stored = add(store)
    path = stored.path / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace("0.91", "NaN"))
    with pytest.raises(CorruptError, match="NaN is not JSON"):
        store.resolve("reviews")
    path.write_text(text.replace('"probes"', '"parameters": 1, "probes"'))
    with pytest.raises(CorruptError, match="repeated keys \\['parameters'\\]"):
        store.resolve("reviews")


def test_a_newer_format_says_to_upgrade(store):
    stored = add(store)
    reseal(stored.path, lambda raw: raw.update(format_version=2, library_version="9.0", novelty={}))
    for read in (lambda: store.resolve("reviews"), stored.verify):
        with pytest.raises(StoreError, match=r"format_version 2.*onebase 9\.0.*pip install -U onebase") as caught:
            read()
        assert not isinstance(caught.value, CorruptError)
    with pytest.warns(UserWarning, match="reviews@1 is left out"):
        assert store.list() == []


def test_a_damaged_version_is_never_replaced_by_an_older_one(store):
    add(store)
    (add(store).path / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptError):
        store.resolve("reviews")
    with pytest.warns(UserWarning, match="reviews@2 is left out"):
        assert [s.ref for s in store.list()] == ["reviews@1"]
    assert [v.ref for v in store.remove("reviews@2")] == ["reviews@2"]
    assert store.resolve("reviews").ref == "reviews@1"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a/b", "a\\b", "a@1", "-a", ".a", "a b", "a\n", "a..b", "a.", "ü", "x" * 65),
        *("con", "NUL", "Com1.txt", "lpt9", None, 3),
    ],
)
def test_bad_names(store, name):
    with pytest.raises(ConfigError, match="adapter name"):
        store.save(name, config=settings(), tensors=some_tensors())
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["a", "Reviews-v2.1_x", "0", "console", "x" * 64])
def test_good_names(name):
    assert check_name(name) == name


def test_names_that_differ_only_in_case_are_refused(store):
    add(store, "Reviews")
    with pytest.raises(ConfigError, match=r"only in case.*'Reviews'"):
        add(store, "reviews")


def test_save_says_what_cannot_be_stored(store):
    save = lambda tensors=None, **changes: store.save(  # noqa: E731
        "a", config=settings(**changes), tensors=tensors or some_tensors()
    )
    with pytest.raises(ConfigError, match=r"(?s)task.labels has the key 0.*task.x is a PosixPath.*metrics.f1 is nan"):
        save(metrics={"f1": float("nan")}, task={"labels": {0: "no"}, "x": Path("p")})
    with pytest.raises(ConfigError, match=r"\['version', 'digest'\], which the store fills"):
        save(version=3, digest="")
    with pytest.raises(ConfigError, match=r"unknown field 'tasks'\. Did you mean 'task'"):
        save(tasks={})
    with pytest.raises(StoreError, match="'w' has 1 of 2 values NaN or inf"):
        save({"w": torch.tensor([1.0, float("inf")])})
    with pytest.raises(ConfigError, match="'w': a list"):
        save({"w": [1.0]})
    with pytest.raises(ConfigError, match="on meta"):
        save({"w": torch.zeros(2, device="meta")})
    assert store.list() == []


def test_a_failing_card_leaves_nothing_behind(store):
    def card(config: AdapterConfig) -> str:
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError):
        store.save("a", config=settings(), tensors=some_tensors(), card=card)
    assert store.list() == []
    assert list((store.root / ".tmp").iterdir()) == []
    assert add(store, "a").version == 2  # number 1 was given and is not given again


def test_tuples_are_lists_at_once(store):
    stored = add(store, task={"labels": ("a", "b")})
    assert stored.config.task == {"labels": ["a", "b"]}
    stored.verify()


def test_resolve(store, tmp_path, monkeypatch):
    for _ in range(11):
        add(store)
    add(store, "Other")
    assert store.resolve("reviews").ref == "reviews@11"
    assert store.resolve("reviews@2").ref == "reviews@2"
    assert [s.ref for s in store.list()] == ["Other@1", *(f"reviews@{n}" for n in range(1, 12))]
    with pytest.raises(UnknownNameError, match=r"unknown adapter 'review'. Did you mean 'reviews'"):
        store.resolve("review")
    with pytest.raises(UnknownNameError, match=r"no version '12'. It has: 1, 2, 3, .* 10, 11\."):
        store.resolve("reviews@12")
    with pytest.raises(UnknownNameError, match="no version '02'"):
        store.resolve("reviews@02")
    with pytest.raises(ConfigError, match="ends in '@'"):
        store.resolve("reviews@")
    with pytest.raises(UnknownNameError, match="no adapter folder"):
        store.resolve("./nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in store.resolve("reviews@3").path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    for ref in (str(copy), copy, "./copy"):
        found = store.resolve(ref)
        assert (found.ref, found.path) == ("reviews@3", copy)
        found.verify()
    with pytest.raises(CorruptError, match=r"adapter_config\.json cannot be read"):
        store.resolve(tmp_path)


def test_an_empty_store_has_nothing(store):
    assert store.list() == []
    with pytest.raises(UnknownNameError, match="There are none yet"):
        store.resolve("a")
    with pytest.raises(UnknownNameError):
        store.remove("a")
    assert not store.root.exists()


def test_numbers_are_not_given_again(store):
    for _ in range(3):
        add(store)
    assert [v.ref for v in store.remove("reviews@3")] == ["reviews@3"]
    assert add(store).version == 4
    assert [v.version for v in store.remove("reviews")] == [1, 2, 4]
    assert store.list() == []
    with pytest.raises(UnknownNameError):
        store.resolve("reviews")
    assert add(store).version == 5
    assert list((store.root / ".tmp").iterdir()) == []
    with pytest.raises(ConfigError, match="is a path"):
        store.remove(str(store.resolve("reviews").path))


def test_numbers_of_folders_copied_in_are_respected(store, tmp_path):
    path = add(store).path
    other = Store(tmp_path / "other")
    (other.root / "adapters" / "reviews").mkdir(parents=True)
    path.rename(other.root / "adapters" / "reviews" / "1")
    other.resolve("reviews@1").verify()
    other.remove("reviews")
    assert add(other).version == 2


def test_a_number_taken_meanwhile_is_not_given_again(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # another process claims after this one has looked
    assert [claim_number(tmp_path / "claimed", above=0) for _ in range(3)] == [1, 2, 3]


def test_a_version_that_appears_meanwhile_is_not_replaced(store):
    first = add(store)

    def card(config: AdapterConfig) -> str:
        place = first.path.parent / str(config.version)
        if config.version == 2:  # someone copies a folder to the place of this very save
            shutil.copytree(first.path, place)
        return str(config.version)

    third = store.save("reviews", config=settings(), tensors={}, card=card)
    assert (third.version, (third.path / "README.md").read_text()) == (3, "3")
    third.verify()


def test_stale_work_is_swept_and_fresh_work_kept(store):
    add(store)
    stale, fresh, file = (store.root / ".tmp" / name for name in ("save-old", "save-new", "old-file"))
    stale.mkdir()
    fresh.mkdir()
    (stale / "x").write_text("x")
    file.write_text("x")
    for path in (stale, file):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    add(store)
    assert (stale.exists(), file.exists(), fresh.exists()) == (False, False, True)


def test_root(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "a"))
    assert Store().root == tmp_path / "a"
    monkeypatch.delenv("ONEBASE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "b"))
    assert Store().root == tmp_path / "b" / "onebase"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name != "nt":
        assert Store().root == tmp_path / ".local" / "share" / "onebase"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that cannot be written")
def test_a_disk_that_refuses_is_a_store_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="No version was added"):
            add(Store(tmp_path / "home"))
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_the_root_is_a_store_error(tmp_path):
    (tmp_path / "home").write_text("x")
    with pytest.raises(StoreError, match="No version was added"):
        add(Store(tmp_path / "home"))


SAVER = """
import sys, torch, json
from onebase.store import Store
config = json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for i in range(10):
    tensors = {"w": torch.full((2,), float(i))}
    print(Store(sys.argv[1]).save("reviews", config=config, tensors=tensors).version)
"""


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}


def test_two_processes_save_at_once(store):
    command = [sys.executable, "-c", SAVER, str(store.root), json.dumps(settings())]
    pipe = subprocess.PIPE
    savers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_environment()) for _ in range(2)]
    for saver in savers:
        assert saver.stdout.readline() == "ready\n"
    for saver in savers:
        saver.stdin.write("go\n")
        saver.stdin.flush()
    given = [list(map(int, saver.communicate()[0].split())) for saver in savers]
    assert [saver.returncode for saver in savers] == [0, 0]
    assert sorted(given[0] + given[1]) == list(range(1, 21))
    assert [stored.version for stored in store.list()] == list(range(1, 21))
    for numbers in given:
        for i, number in enumerate(numbers):
            assert torch.equal(store.resolve(f"reviews@{number}").tensors()["w"], torch.full((2,), float(i)))


def test_listing_imports_no_torch(store):
    add(store)
    code = (
        "import sys; from onebase.store import Store; assert len(Store(sys.argv[1]).list()) == 1;"
        "assert not {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(store.root)], check=True, env=child_environment())


def test_stored_is_frozen_and_hashable(store):
    stored = add(store)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.name = "x"  # type: ignore[misc]
    assert {stored, store.resolve("reviews")} == {stored}


# --- card ---


def test_card(store):
    card = (add(store).path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "onebase",
        "base_model": "org/tiny",
        "tags": ["onebase", "adapter", "lora"],
        "pipeline_tag": "text-classification",
        "metrics": ["accuracy"],
    }
    for part in ['base.load("reviews@1")', "| accuracy | 0.91 | 0.5 |", "- rank: `4`", '`["bad", "gut|ü"]`']:
        assert part in card, part


def test_card_does_not_publish_a_local_path(store, tmp_path):
    base = {**settings()["base"], "id": str(tmp_path / "secret" / "my-model")}
    card = render_card(add(store, base=base, metrics={}, task={"kind": "odd"}).config)
    assert "secret" not in card
    assert "base_model" not in card
    assert 'load_base("my-model")' in card
    assert "None were measured" in card


def test_card_with_flat_metrics_and_many_labels(store):
    task = {"kind": "tokens", "labels": [f"l{i}" for i in range(30)]}
    card = render_card(add(store, task=task, metrics={"f1": 0.5, "test": {"f1": 0.25}}).config)
    assert "| f1 | 0.5 | not measured |" in card
    assert "| test.f1 | 0.25 | not measured |" in card
    assert "and 10 more" in card


@pytest.mark.parametrize("kind", sorted(BUILT_IN))
def test_cards_of_all_kinds(store, kind):
    """Every kind has a tag that the hub knows, and a use that its task answers."""
    from onebase.tasks import get_task

    card = render_card(add(store, task={"kind": kind, "labels": []}, metrics={}).config)
    tag = yaml.safe_load(card.split("---\n")[1])["pipeline_tag"]
    assert (tag == "text-generation") == get_task(kind).writes == ("base.generate(" in card)
    assert tag in {
        "feature-extraction", "fill-mask", "image-classification", "question-answering", "sentence-similarity",
        "text-classification", "text-generation", "text-ranking", "token-classification",
    }  # fmt: skip
    compile(card.split("```")[1].removeprefix("python"), "card", "exec")


def test_a_given_card_is_stored_as_it_is(store):
    stored = store.save("a", config=settings(), tensors={}, card="# mine\n")
    assert (stored.path / "README.md").read_bytes() == b"# mine\n"
    stored.verify()


# --- fingerprints ---


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=20, **size)).eval()


def test_a_bf16_copy_has_the_same_fingerprint(bert):
    import copy

    half = copy.deepcopy(bert).bfloat16()
    assert fingerprint_model(half) == fingerprint_model(bert)
    assert fingerprint_model(half.float()) == fingerprint_model(bert)


def test_a_change_of_one_value_changes_the_fingerprint(bert):
    import copy

    model = copy.deepcopy(bert)
    before = fingerprint_model(model)
    with torch.no_grad():
        weight = model.bert.encoder.layer[1].output.dense.bias
        weight[3] += 0.5
    changed = fingerprint_model(model)
    assert changed != before
    weight.data[3] -= 0.5  # unseen by torch's version counter
    assert fingerprint_model(model, recompute=True) == before


def test_names_and_shapes_and_buffers_count():
    def model(shape: tuple[int, ...], name: str = "w", buffer: float = 0.0, persistent: bool = True):
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        module.register_buffer("b", torch.tensor(buffer), persistent=persistent)
        module.register_buffer("n", torch.tensor([1, 2]))
        return fingerprint_model(module)

    kinds = [model((2, 3)), model((3, 2)), model((6,)), model((2, 3), "v"), model((2, 3), buffer=1.0)]
    assert len(set(kinds)) == 5
    assert model((2,), buffer=1.0, persistent=False) == model((2,), buffer=2.0, persistent=False)


def test_tied_tensors_count_once(bert):
    import copy

    untied = copy.deepcopy(bert)
    untied.cls.predictions.decoder.weight = torch.nn.Parameter(untied.cls.predictions.decoder.weight.clone())
    assert fingerprint_model(untied) != fingerprint_model(bert)


def test_meta_tensors_have_no_fingerprint():
    with pytest.raises(UnsupportedError, match="'bias' is on meta"):
        fingerprint_model(torch.nn.Linear(2, 2, device="meta"))


def test_fingerprint_in_inference_mode():
    with torch.inference_mode():
        model = torch.nn.Linear(2, 2)
        before = fingerprint_model(model)
        model.weight += 1
        assert fingerprint_model(model) != before


def test_the_disk_cache_serves_only_the_same_files(bert, tmp_path, monkeypatch):
    from transformers import BertForMaskedLM, BertModel

    from onebase.store import fingerprint

    folder, cache = tmp_path / "model", tmp_path / "cache"
    bert.save_pretrained(folder)
    calls = []
    compute = fingerprint._digest_tensors
    monkeypatch.setattr(fingerprint, "_digest_tensors", lambda tensors: calls.append(1) or compute(tensors))

    def load(kind=BertForMaskedLM, **options: object) -> str:
        return fingerprint_model(kind.from_pretrained(folder, **options), just_loaded=True, cache=cache)

    first = load()
    assert load() == first
    assert len(calls) == 1
    assert first == fingerprint_model(bert, recompute=True)
    assert load(BertModel, add_pooling_layer=False) != first
    assert load(dtype=torch.bfloat16) == first
    assert len(calls) == 4
    fingerprint_model(BertForMaskedLM.from_pretrained(folder), cache=cache)
    assert len(calls) == 5
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert load() == first
    assert len(calls) == 6
    for broken in (
        "{",
        "[]",
        '{"x": 1}',
        json.dumps(dict.fromkeys(json.loads((cache / "fingerprints.json").read_text()), "x")),
    ):
        (cache / "fingerprints.json").write_text(broken)
        assert load() == first
    assert len(calls) == 10


def test_an_unwritable_cache_does_no_harm(bert, tmp_path):
    from transformers import BertForMaskedLM

    bert.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    model = BertForMaskedLM.from_pretrained(tmp_path / "model")
    assert fingerprint_model(model, just_loaded=True, cache=tmp_path / "file") == fingerprint_model(bert)


def test_fingerprint_is_fast():
    model = torch.nn.ParameterList([torch.zeros(1000, 1100) for _ in range(20)])  # 22 M
    start = time.perf_counter()
    fingerprint_model(model)
    assert time.perf_counter() - start < 3  # 0.1 to 0.3 s on an idle core; room for a busy machine


# --- tokenizer and config ---


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_tokenizer_digest_is_blind_to_calls(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    before = digest_tokenizer(tokenizer)
    tokenizer(["good", "good bad"], padding="max_length", truncation=True, max_length=7)
    assert tokenizer.backend_tokenizer.padding is not None
    assert digest_tokenizer(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert digest_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before


def test_tokenizer_digest_sees_words_and_template(tokenizer):
    digests = {digest_tokenizer(tokenizer)}
    tokenizer.chat_template = "{{ messages }}"
    digests.add(digest_tokenizer(tokenizer))
    tokenizer.add_tokens(["new"])
    digests.add(digest_tokenizer(tokenizer))
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    digests.add(digest_tokenizer(tokenizer))
    assert len(digests) == 4


def test_slow_tokenizer_digest(tmp_path):
    from transformers.models.bertweet import BertweetTokenizer

    (tmp_path / "vocab.txt").write_text("good 1\nbad 1\n")
    (tmp_path / "bpe.codes").write_text("")
    make = lambda: BertweetTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))  # noqa: E731
    before = digest_tokenizer(make())
    assert before == digest_tokenizer(make())
    more = make()
    more.add_tokens(["new"])
    assert digest_tokenizer(more) != before


def test_config_digest(bert, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    before = digest_config(bert.config)
    bert.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert digest_config(loaded.config) == before
    assert digest_config(BertConfig(hidden_size=24, num_attention_heads=2)) != before


def test_a_local_base_is_found_again_by_its_fingerprint(tmp_path: Path) -> None:
    from onebase.store import base_folder, remember_base

    folder = tmp_path / "models" / "ours"
    folder.mkdir(parents=True)
    assert base_folder(tmp_path, "sha256:ab") is None
    remember_base(tmp_path, "sha256:ab", folder)
    assert base_folder(tmp_path, "sha256:ab") == folder
    folder.rmdir()
    assert base_folder(tmp_path, "sha256:ab") is None


def test_the_name_of_the_plain_base_is_refused_and_an_old_one_can_be_removed(store, monkeypatch):
    """Servers call the plain base so: an adapter of this name could not be asked."""
    with pytest.raises(ConfigError, match=r"'base' means the plain base.*'my-base'"):
        store.save("base", config=settings(), tensors=some_tensors())
    with monkeypatch.context() as before:
        before.setattr("onebase.store.store.check_new_name", check_name)
        store.save("base", config=settings(), tensors=some_tensors())
    assert [stored.ref for stored in store.list()] == ["base@1"] and store.resolve("base").tensors()
    assert [gone.ref for gone in store.remove("base")] == ["base@1"]
    assert clean_name("base") == "my-base" and name_of_path("base.csv") == "my-base"
