"""Damaged compositions, signatures and stores at URLs: refused by an error of ours, never loaded as something else."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase import Base
from onebase.compose import combine, fuse, stack
from onebase.errors import OnebaseError
from onebase.store import Store
from onebase.store.signing import SIGNATURE_FILE, VARIABLE, make_key, sign

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import make, tiny_tokenizer

from test_store_fuzz import config_of, put_config, reseal

CASES, MANY = 60, 1200
ODD: list[Any] = [
    None, 0, -1, 10**9, 1.5, "", "x", "a", [], [1], {}, {"x": 1}, True, "sha256:" + "0" * 64, ["a"] * 3, "../a", "a@99",
    {"kind": "stack", "parts": []},
]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(make("bert"), tiny_tokenizer(), id="tiny")


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory) -> Path:
    """A store with parts, a composition of each kind and one of compositions."""
    root = tmp_path_factory.mktemp("whole") / "s"
    store = Store(root)
    for number, name in enumerate("abcd"):
        method = "lora(rank=2)" if name in "ab" else "bottleneck(size=3, norms=False)"
        checks.disturb(base.add(name, method, seed=number).module, number)
        base.save(name, store=store)
    for name, composition in {"mix": combine("a", "b", weights=(0.7, 0.3)), "both": stack("a", "c"),
                              "fused": fuse("c", "d"), "outer": stack("mix", "c")}.items():  # fmt: skip
        base.add(name, composition)
        base.save(name, store=store)
    for name in list(base.adapters):
        base.remove(name)
    return root


def answer(base: Base, name: str) -> torch.Tensor:
    with torch.no_grad(), base.use(name):
        return base.model(input_ids=torch.arange(4, 16)[None]).last_hidden_state


def harm(folder: Path, rng: random.Random) -> None:
    """Change the settings of a composition, or a part's files; sealed again, as somebody with our code could."""
    raw = config_of(folder)
    place: Any = raw["method"]["settings"]
    while rng.random() < 0.7:
        inner = place.values() if isinstance(place, dict) else place
        inner = [each for each in inner if isinstance(each, (dict, list)) and each]
        if not inner:
            break
        place = rng.choice(inner)
    if isinstance(place, dict):
        key = rng.choice([*sorted(place), "surprise"])
        if rng.random() < 0.25:
            place.pop(key, None)
        else:
            place[key] = rng.choice(ODD)
    else:
        kind = rng.randrange(3)
        if kind == 0:
            place.append(rng.choice([*ODD, place[0]]))
        elif kind == 1:
            place.pop()
        else:
            place[rng.randrange(len(place))] = rng.choice(ODD)
    put_config(folder, raw)
    if rng.random() < 0.8:
        reseal(folder)


def put_something_else(path: Path, kind: int) -> None:
    """Put a folder, a pipe, a device or odd JSON where a file was, or nothing."""
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.write_bytes(b"[" * 60_000)


@pytest.mark.parametrize("cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)])
def test_damaged_compositions(base: Base, whole: Path, tmp_path, cases) -> None:
    """A composition or a part of it is damaged: it loads where its settings make sense, else an error of ours."""
    wrong: list[str] = []
    refused = 0
    for case in cases:
        rng = random.Random(case)
        root = tmp_path / "s"
        shutil.copytree(whole, root)
        name = ("mix", "both", "fused", "outer")[case % 4]
        victim = name if rng.random() < 0.8 else rng.choice("abcd")
        folder = root / "adapters" / victim / "1"
        if rng.random() < 0.15:
            shutil.rmtree(folder)
        else:
            harm(folder, rng)
        store = Store(root)
        try:
            base.load(name, store=store, name="x")
            answer(base, "x")
            base.remove("x")
        except OnebaseError:
            refused += 1
        except Exception as error:
            wrong.append(f"case {case} {name}, {victim}: {type(error).__name__}: {str(error)[:300]}")
        for ref in ("a", "c", "mix"):  # whatever a config says, removing asks it
            try:
                store.remove(ref)
            except OnebaseError:
                pass
            except Exception as error:
                wrong.append(f"case {case} rm {ref}: {type(error).__name__}: {str(error)[:300]}")
        assert not base.adapters
        shutil.rmtree(root)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    assert refused > len(cases) // 2


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)])
def test_damaged_signatures_where_keys_are_trusted(whole: Path, tmp_path, monkeypatch, cases) -> None:
    """With a trusted key nothing loads but the very bits that it signed."""
    pytest.importorskip("cryptography")
    public = make_key(tmp_path / "mine")
    source = tmp_path / "signed"
    shutil.copytree(whole, source)
    sign(Store(source).resolve("a"), tmp_path / "mine")
    monkeypatch.setenv(VARIABLE, str(public))
    good = {key: t.clone() for key, t in Store(source).resolve("a").tensors().items()}
    signature = (source / "adapters" / "a" / "1" / SIGNATURE_FILE).read_bytes()
    wrong: list[str] = []
    for case in cases:
        rng = random.Random(case)
        root = tmp_path / "s"
        shutil.copytree(source, root)
        folder = root / "adapters" / "a" / "1"
        kind = case % 5
        path = folder / SIGNATURE_FILE
        if kind == 0:
            data = bytearray(signature)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        elif kind == 1:
            raw = json.loads(signature)
            raw[rng.choice([*raw, "surprise"])] = rng.choice(ODD)
            path.write_text(json.dumps(raw))
        elif kind == 2:
            path.unlink()
            put_something_else(path, rng.randrange(5))
        elif kind == 3:  # other tensors under the same signature, sealed again
            data = bytearray((folder / "adapter_model.safetensors").read_bytes())
            data[-rng.randint(1, 100)] ^= 1
            (folder / "adapter_model.safetensors").write_bytes(data)
            reseal(folder)
        else:
            harm(folder, rng)
        try:
            found = Store(root).resolve("a").tensors()
            if any(not torch.equal(t, good[key]) for key, t in found.items()) or found.keys() != good.keys():
                wrong.append(f"case {case}: other tensors than those that were signed")
        except OnebaseError:
            pass
        except Exception as error:
            wrong.append(f"case {case}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(root)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)])
def test_damaged_stores_at_a_url(base: Base, whole: Path, tmp_path, monkeypatch, cases) -> None:
    """Pointers, blobs and aliases are damaged: what is fetched is the adapter, or an error of ours."""
    pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    source = tmp_path / "source"
    store = Store(f"file://{source}")
    for name in ("a", "c"):
        base.load(name, store=Store(whole))
        base.save(name, store=store)
        base.remove(name)
    store.promote("a@1", "prod")
    good = store.resolve("a").tensors()
    every = sorted(path for path in source.rglob("*") if path.is_file())
    wrong: list[str] = []
    for case in cases:
        rng = random.Random(case)
        root = tmp_path / "there"
        shutil.copytree(source, root)
        path = root / rng.choice(every).relative_to(source)
        kind = rng.randrange(4)
        data = bytearray(path.read_bytes())
        if kind == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        elif kind == 1:
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        elif kind == 2:
            path.unlink()
        elif path.suffix == ".json":
            raw = json.loads(data)
            place = rng.choice([raw, *[v for v in raw.values() if isinstance(v, dict)]])
            place[rng.choice([*place, "surprise", "../x"])] = rng.choice(ODD)
            path.write_text(json.dumps(raw))
        there = Store(f"file://{root}")
        there.root = tmp_path / "fetched" / uuid.uuid4().hex
        for ref in ("a@prod", "a", "c@1"):
            try:
                found = there.resolve(ref).tensors()
                if ref != "c@1" and any(not torch.equal(t, good[key]) for key, t in found.items()):
                    wrong.append(f"case {case} {ref}: other tensors")
            except OnebaseError:
                pass
            except Exception as error:
                wrong.append(f"case {case} {ref} {path.relative_to(root)}: {type(error).__name__}: {str(error)[:300]}")
        try:
            there.gc(keep=1)
        except OnebaseError:
            pass
        except Exception as error:
            wrong.append(f"case {case} gc: {type(error).__name__}: {str(error)[:300]}")
        assert not (tmp_path / "x").exists() and not (tmp_path / "there.x").exists()
        shutil.rmtree(root)
        shutil.rmtree(there.root, ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
