"""Damaged adapter folders: each is refused by an error that names the cause; nothing hangs, runs or grows.

Every kind of damage is done twice: with the digests left as they were, and with all of them recomputed by a careful
forger, so that structure, names, shapes, values and settings are what must catch it.

Not damage, and so not here: a changed value that keeps the tensor finite and the answers within the tolerance of the
probes, with recomputed digests. That is a valid adapter with other weights, as if somebody had trained it.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from families import make, tiny_tokenizer
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from transformers import BertConfig, BertModel

from damage import DAMAGE as EDITED
from damage import Folder
from onebase.base import Base
from onebase.errors import OnebaseError
from onebase.store import Store
from onebase.store.schema import CARD_FILE, CONFIG_FILE, TENSORS_FILE, digest_of

CASES, MANY = 500, 2500  # of each of the two catalogues of damage: by default, and in the slow run, 5,000 together
MARK = "executed-by-a-pickle"
Damage = Callable[[Path, random.Random], str]  # does it and returns a pattern that the message must have


@pytest.fixture(scope="module")
def base(tokenizer) -> Base:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=64, max_position_embeddings=40, **size)).eval()
    return Base(model, tokenizer, id="tiny")


@pytest.fixture(scope="module")
def originals(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two whole adapters, of LoRA with a classification head and of prefix."""
    store, found = Store(tmp_path_factory.mktemp("originals")), []
    task = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 32, "template": ""}
    for name, method in (("lora", "lora(rank=2)"), ("prefix", "prefix(length=3)")):
        adapter = base.add(name, method, task={**task, "pair": False})
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        found.append(base.save(name, store=store).path)
        base.remove(name)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def put_config(folder: Path, raw: Any) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(raw), encoding="utf-8")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = config_of(folder)
    change(raw)
    put_config(folder, raw)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return from_bytes((folder / TENSORS_FILE).read_bytes())


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor], *, described: bool) -> None:
    """Write tensors; `described` makes the config say the same, as a forger would."""
    (folder / TENSORS_FILE).write_bytes(to_bytes({n: t.contiguous() for n, t in tensors.items()}))
    if described:
        shapes = {n: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for n, t in tensors.items()}
        edit(folder, lambda raw: raw.update(tensors=shapes))


def reseal(folder: Path) -> None:
    """Recompute the sha256 of every listed file and the digest, where there still is a config to do so in."""
    try:
        raw = config_of(folder)
        for name in raw["files"]:
            if (folder / name).is_file():
                raw["files"][name] = sha256((folder / name).read_bytes()).hexdigest()
        raw["digest"] = digest_of(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    put_config(folder, raw)


# --- damage to tensors ---


def on_tensors(change: Callable[[dict[str, torch.Tensor], str, random.Random], str | None]) -> Damage:
    def damage(folder: Path, rng: random.Random) -> str:
        tensors = tensors_of(folder)
        name = rng.choice(sorted(tensors))
        pattern = change(tensors, name, rng)
        put_tensors(folder, tensors, described=rng.random() < 0.5)
        return re.escape(pattern or name)

    return damage


def drop(tensors, name, rng):
    del tensors[name]


def add(tensors, name, rng):
    new = rng.choice(["extra", "deltas.encoder/9/attention/q.a", "../x", "/etc/x", "con", "ü" * 50, "head.weight2"])
    tensors[new] = torch.zeros(rng.randint(0, 3))
    return repr(new)[1:-1]


def rename(tensors, name, rng):
    tensors[rng.choice([name + "x", name.upper(), "../" + name])] = tensors.pop(name)


def reshape(tensors, name, rng):
    tensors[name] = rng.choice([tensors[name].flatten()[None, None], torch.zeros(7, 5), torch.zeros(0)])


def poison(tensors, name, rng):
    name = rng.choice([n for n, t in sorted(tensors.items()) if t.is_floating_point()])
    bad = tensors[name].clone()
    bad.view(-1)[rng.randrange(bad.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    tensors[name] = bad
    return name


def retype(tensors, name, rng):
    tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool, torch.int8]))


# --- damage to bytes ---


def flip_config(folder: Path, rng: random.Random) -> str:
    """One bit of the JSON: no JSON, or other fields, or another value of the kind that only a digest protects."""
    data = bytearray((folder / CONFIG_FILE).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / CONFIG_FILE).write_bytes(data)
    return "adapter_config|field|digest"


def flip_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice([TENSORS_FILE, CARD_FILE])
    data = bytearray((folder / file).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / file).write_bytes(data)
    return re.escape(file)


def flip_header(folder: Path, rng: random.Random) -> str:
    """One high bit in the header's length, which then points beyond the file or into the values."""
    data = bytearray((folder / TENSORS_FILE).read_bytes())
    data[rng.randrange(1, 8)] ^= 1 << rng.randrange(8)
    (folder / TENSORS_FILE).write_bytes(data)
    return re.escape(TENSORS_FILE)


def cut(folder: Path, rng: random.Random) -> str:
    file = rng.choice([TENSORS_FILE, CONFIG_FILE])
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data) - 2)])])
    return re.escape(file)


def append(folder: Path, rng: random.Random) -> str:
    file = rng.choice([TENSORS_FILE, CONFIG_FILE])
    with open(folder / file, "ab") as out:
        out.write(b"x" * rng.choice([1, 8, 100_000]))
    return re.escape(file)


def giant_header(folder: Path, rng: random.Random) -> str:
    length = rng.choice([2**63, 2**64 - 1, 10**8 + 1, 10**9, 10**12])
    (folder / TENSORS_FILE).write_bytes(struct.pack("<Q", length) + b"{}" * 10)
    return re.escape(TENSORS_FILE)


def giant_sparse(folder: Path, rng: random.Random) -> str:
    file = rng.choice([TENSORS_FILE, CONFIG_FILE])
    with open(folder / file, "r+b") as out:
        out.truncate(rng.choice([2**36, 2**40]))
    return f"{re.escape(file)}.* bytes"


def deep_header(folder: Path, rng: random.Random) -> str:
    head = b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    (folder / TENSORS_FILE).write_bytes(struct.pack("<Q", len(head)) + head)
    return re.escape(TENSORS_FILE)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (MARK,))


def pickled(folder: Path, rng: random.Random) -> str:
    (folder / TENSORS_FILE).write_bytes(pickle.dumps(Bomb()))
    return re.escape(TENSORS_FILE)


def extra_pickle(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["pytorch_model.bin", "x.pt", "adapter.PKL", "a.pickle"])
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    if rng.random() < 0.5:
        edit(folder, lambda raw: raw["files"].update({name: "0" * 64}))
    return re.escape(name)


def extra(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["notes.txt", ".hidden", "adapter_Config.json", "ü.json"])
    if rng.random() < 0.3:
        (folder / name).mkdir()
    else:
        (folder / name).write_text("{}")
    return re.escape(name)


def missing(folder: Path, rng: random.Random) -> str:
    file = rng.choice([TENSORS_FILE, CONFIG_FILE, CARD_FILE])
    (folder / file).unlink()
    return re.escape(file)


def special(folder: Path, rng: random.Random) -> str:
    """In place of a file: a link to a file outside or a device, a pipe that blocks readers, or a folder."""
    file = rng.choice([TENSORS_FILE, CONFIG_FILE, CARD_FILE])
    path, kind = folder / file, rng.choice(["link", "device", "pipe", "loop", "folder"])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": "/etc/hosts", "device": "/dev/zero", "loop": path}[kind])
    return re.escape(file)


# --- damage to the config ---


def listed_name(folder: Path, rng: random.Random) -> str:
    names = [
        "../x",
        "..",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "x:y",
        "con",
        "NUL.txt",
        "readme.MD",
        "a\0b",
        "",
        " x",
    ]
    name = rng.choice([*names, "\u202ex", "x" * 300, CONFIG_FILE, "Adapter_Model.safetensors"])
    edit(folder, lambda raw: raw["files"].update({name: "0" * 64}))
    return "field 'files'"


def adapter_name(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["../up", "/abs", "a/b", "con", "", "x" * 65, "a\0", "..", None, 3, ["a"]])
    edit(folder, lambda raw: raw.update(name=name))
    return "field 'name'"


WRONG = [None, "text", 1.5, [], {}, [[]], True, -1]
PLACES = [
    "library", "library_version", "version", "created", "method", "method.name", "method.settings", "task", "base",
    "base.fingerprint", "base.hidden_size", "base.layers", "base.parameters", "tokenizer", "tokenizer.digest",
    "parameters", "tensors", "files", "format_version",
]  # fmt: skip


def at(raw: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    *path, last = place.split(".")
    for part in path:
        raw = raw[part]
    return raw, last


def wrong_type(folder: Path, rng: random.Random) -> str:
    place = rng.choice(PLACES)

    def change(raw):
        owner, key = at(raw, place)
        owner[key] = rng.choice([value for value in WRONG if type(value) is not type(owner[key])])

    edit(folder, change)
    return re.escape(place)


def lost_or_unknown_key(folder: Path, rng: random.Random) -> str:
    place = rng.choice([p for p in PLACES if p not in ("format_version", "library")])
    if rng.random() < 0.5:
        place += "x"

    def change(raw):
        owner, key = at(raw, place)
        if key in owner:
            del owner[key]
        else:
            owner[key] = 1

    edit(folder, change)
    return re.escape(place)


SETTINGS = {
    "task.kind": [None, 3, "classificatoin", "../x", "x" * 10_000, [], {}],
    "task.labels": [None, "bad", [1, 2], ["a", "a"], [None], {}, ["a"], ["a", "b", "c"], [["a"]]],
    "task.max_length": [0, -5, 10**12, "32", 1.5, None, True, 10**400],
    "task.pooling": [None, 3, "medium", [], {}],
    "task.template": [3, None, []],
    "task.pair": ["no", 1, None],
    "method.name": ["lorra", "", "../x", "os.system", "x" * 10_000],
    "method.settings": [{"rnk": 4}, {"rank": "2"}, {"rank": 10**9}, {"rank": -1}, {"length": 10**12}, {"sites": 3}],
    "tokenizer.digest": ["sha256:" + "0" * 64, ""],
    "base.fingerprint": ["sha256:" + "0" * 64, ""],
    "base.model_type": ["gpt2", ""],
    "base.hidden_size": [17, 10**18],
    "base.layers": [3, 10**30],
    "probes": [{"values": 3}, {"values": [[1.0]]}, {"values": "x"}, {"values": [["a"]]}, {"values": [[1e30] * 8] * 4}],
}
SAID = {"base.fingerprint": "weights", "tokenizer.digest": "tokenizer", "base.model_type": "model type",
        "base.hidden_size": "hidden_size", "base.layers": "layers", "probes": "probe", "method.name": "method",
        "method.settings": "method|setting", "task.labels": "labels|head"}  # fmt: skip


def setting(folder: Path, rng: random.Random) -> str:
    place = rng.choice(sorted(SETTINGS))

    def change(raw):
        owner, key = at(raw, place)
        owner[key] = rng.choice(SETTINGS[place])

    edit(folder, change)
    return SAID.get(place, place)


def odd_json(folder: Path, rng: random.Random) -> str:
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    value = rng.choice(
        ["[" * 100_000 + "]" * 100_000, "[" * 200 + "]" * 200, '{"a":' * 500 + "1" + "}" * 500, "1" * 10_000, "1e999",
         "-1e999", "NaN", "-Infinity", '"\\ud800"', '{"a":1,"a":2}', "{'a':1}", "01", "0x10"]
    )  # fmt: skip
    text = text.replace('"metrics": {}', '"metrics": {"x": ' + value + "}")
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return re.escape(CONFIG_FILE)


def no_object(folder: Path, rng: random.Random) -> str:
    data = rng.choice([b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"\x00" * 50, b"\xef\xbb\xbf{}", b"true"])
    (folder / CONFIG_FILE).write_bytes(data)
    return re.escape(CONFIG_FILE)


def described_shapes(folder: Path, rng: random.Random) -> str:
    """Only the config's description is wrong: sizes nobody has, dtypes that do not exist."""
    name = rng.choice(sorted(config_of(folder)["tensors"]))
    key, value = rng.choice(
        [("shape", [10**6, 10**6]), ("shape", [10**30]), ("shape", [-1]), ("shape", "x"), ("shape", [2**63] * 40),
         ("dtype", "float33"), ("dtype", "__class__"), ("dtype", None), ("dtype", "uint8"), ("shape", [1.5])]
    )  # fmt: skip
    edit(folder, lambda raw: raw["tensors"][name].update({key: value}))
    return re.escape(name)


def newer(folder: Path, rng: random.Random) -> str:
    edit(folder, lambda raw: raw.update(format_version=rng.choice([2, 10**9, 0, -1, 10**30])))
    return "format_version"


ON_TENSORS = [on_tensors(change) for change in (drop, add, rename, reshape, poison, retype)]
DAMAGE: list[Damage] = [
    *ON_TENSORS, flip_header, cut, append, giant_header, giant_sparse, deep_header, pickled, extra_pickle, extra,
    missing, special, listed_name, adapter_name, wrong_type, lost_or_unknown_key, setting, setting, setting, odd_json,
    no_object, described_shapes, newer,
]  # fmt: skip
STALE_ONLY: list[Damage] = [flip_config, flip_file]  # resealed, most flips are another adapter, whole and valid


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)])
def test_every_damaged_folder_is_refused_by_name(base: Base, originals, tmp_path: Path, monkeypatch, cases) -> None:
    monkeypatch.chdir(tmp_path)
    wrong: list[str] = []
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        rng = random.Random(case)
        kinds = [(damage, sealed) for damage in DAMAGE for sealed in (False, True)] + [(d, False) for d in STALE_ONLY]
        damage, sealed = kinds[case % len(kinds)]
        folder = tmp_path / "case" / "1"
        shutil.copytree(rng.choice(originals), folder)
        pattern = damage(folder, rng)
        # a tebibyte is not hashed, a pipe not read, and JSON written anew would be without its oddity
        if sealed and damage not in (giant_sparse, special, odd_json):
            reseal(folder)
        elif not sealed:
            pattern += f"|{re.escape(CONFIG_FILE)} has digest"  # an edited config is named, and trusted no further
        label = f"case {case} {getattr(damage, '__name__', damage)} sealed={sealed}"
        started = time.perf_counter()
        try:
            base.load(str(folder), name="damaged")
            wrong.append(f"{label}: loaded")
            base.remove("damaged")
        except OnebaseError as error:
            if not re.search(pattern, str(error), re.DOTALL):
                wrong.append(f"{label}: {pattern!r} is not in {str(error)[:400]!r}")
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
        if (taken := time.perf_counter() - started) > 5:
            wrong.append(f"{label}: took {taken:.1f} s")
        assert not base.adapters, label
        shutil.rmtree(tmp_path / "case")
    assert not (tmp_path / MARK).exists(), "a pickle was opened"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024  # MiB
    assert grown < 400, f"{grown} MiB were allocated for tiny adapters"
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Base, Path]:
    """A base, and the folder of a stored adapter that loads on it."""
    base = Base(make("bert"), tiny_tokenizer())
    task = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 16, "template": ""}
    adapter = base.add("reviews", "lora(rank=2)", task=task)
    checks.disturb(adapter.module, 1)
    checks.disturb(adapter.head, 2)
    stored = base.save("reviews", store=Store(tmp_path_factory.mktemp("store")))
    base.remove("reviews")
    base.load(str(stored.path))
    base.remove("reviews")
    return base, stored.path


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)])
def test_damaged_folders_are_refused(good, tmp_path, cases):
    """Each with one of our errors that names the file, tensor, key or check; the base stays as it was."""
    base, source = good
    accepted = []
    for number in cases:
        rng = random.Random(number)
        path = tmp_path / f"{number}"
        shutil.copytree(source, path)
        damage = EDITED[number % len(EDITED)]
        folder = Folder(path, rng, tmp_path / "executed")
        cause = damage(folder)
        where = f"folder {number}, {damage.__name__}"
        try:
            base.load(str(path))
        except OnebaseError as error:
            found = str(error)
            assert any(word in found for word in cause.split("|")), f"{where}: {cause!r} is not named in {found[:500]}"
            assert len(found) < 20_000, f"{where}: a message of {len(found)} characters"
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        else:
            accepted.append(where)
            base.remove("reviews")
        assert not base.adapters, where
        assert not folder.marker.exists(), f"{where}: something was executed"
        shutil.rmtree(path)
    assert not accepted
