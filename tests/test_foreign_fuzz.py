"""Damaged folders of PEFT and the AdapterHub: one of our errors each, or an adapter; nothing hangs, runs or grows.

Files of other libraries hold no digest, so a changed value that stays finite is another adapter and not damage. What
must hold of every damage is that nothing else than an error of ours comes of it, soon, in little memory, and that the
base keeps its bits and its list of adapters.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase import Base
from onebase.errors import OnebaseError

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import make, tiny_tokenizer

from damage import Payload

peft = pytest.importorskip("peft", reason="the package peft is not installed (extra 'peft')")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft's own code

CASES, MANY = 180, 2400
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x00", "../x", "(a+)+$",
    [], [1], ["x"], [None], {}, {"x": 1}, {"query": -1}, {"(": 2}, [[["x"]]], "query", "x" * 10_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(make("bert"), tiny_tokenizer(), id="tiny")


@pytest.fixture(scope="module")
def originals(base: Base, tmp_path_factory) -> list[Path]:
    """Whole folders: PEFT's LoRA with a head, IA3, VeRA, prefix, prompt and LoHa, and the AdapterHub's bottleneck."""
    root = tmp_path_factory.mktemp("originals")
    two = {"target_modules": ["query", "value"]}
    configs = {
        "lora": peft.LoraConfig(r=2, init_lora_weights=False, rank_pattern={"query": 3}, **two),
        "ia3": peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **two),
        "vera": peft.VeraConfig(r=4, save_projection=False, init_weights=False, **two),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
        "loha": peft.LoHaConfig(r=2, init_weights=False, **two),
        "shira": peft.ShiraConfig(r=2, init_weights=False, **two),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in configs.items():
            peft.get_peft_model(copy.deepcopy(make("bert")), config).save_pretrained(str(root / name))
    task = {"kind": "classification", "labels": ["a", "b"], "pooling": "first", "max_length": 60, "template": "",
            "pair": False, "head": {"hidden": 32, "activation": "tanh"}}  # fmt: skip
    for name, method, to in (("hub", "bottleneck(preset='pfeiffer', norms=False)", "adapterhub"),
                             ("virtual", "prompt(length=3, place='embedded', leads=True)", "adapterhub"),
                             ("headed", "lora(rank=2)", "peft")):  # fmt: skip
        adapter = base.add(name, method, task=task)
        checks.disturb(adapter.module, 1)
        base.export(name, root / name, to=to, head=to == "adapterhub")
        base.remove(name)
    found = sorted(root.iterdir())
    for folder in found:
        base.import_adapter(folder, name="whole")
        base.remove("whole")
    return found


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and path.name != "README.md")


def settings(folder: Path, rng: random.Random) -> None:
    """Change, lose or add settings, also inner ones."""
    path = rng.choice(files(folder, "config.json"))
    raw = json.loads(path.read_text())
    place = raw
    while rng.random() < 0.6 and (inner := [v for v in place.values() if isinstance(v, dict) and v]):
        place = rng.choice(inner)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*sorted(place), "surprise"])
        if rng.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = rng.choice(VALUES)
    path.write_text(json.dumps(raw))


def other_kind(folder: Path, rng: random.Random) -> None:
    """Call it another method."""
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    kinds = ["LORA", "IA3", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING", "OFT", "POLY", "XLORA", "CPT", "", 3]
    raw["peft_type"] = rng.choice(kinds)
    path.write_text(json.dumps(raw))


def tensors(folder: Path, rng: random.Random) -> None:
    """Lose, rename, reshape, retype or poison tensors."""
    path = rng.choice(files(folder, ".safetensors"))
    found = load_file(path)
    name = rng.choice(sorted(found))
    one = found[name]
    kind = rng.randrange(6)
    if kind == 0:
        del found[name]
    elif kind == 1:
        other = rng.choice([name + ".x", "x", "../" + name, "base_model.model.", name.replace("0", "9")])
        found[other] = found.pop(name)
    elif kind == 2:
        found[name] = rng.choice([one.flatten(), one[None].contiguous(), one[:0].contiguous(), torch.zeros(()),
                                  torch.zeros(1, 1, 1, 1)])  # fmt: skip
    elif kind == 3:
        found[name] = one.to(rng.choice([torch.int64, torch.bool, torch.float16, torch.complex64, torch.uint8]))
    elif kind == 4 and one.is_floating_point():
        one.view(-1)[rng.randrange(one.numel())] = rng.choice([float("nan"), float("inf"), 1e38])
    elif not one.is_floating_point():
        found[name] = one + rng.choice([-1, 10**6, -(10**9)])
    save_file({key: t.contiguous() for key, t in found.items()}, path)


def bits(folder: Path, rng: random.Random) -> None:
    """Flip, cut or add bytes."""
    path = rng.choice([*files(folder, ".json"), *files(folder, ".safetensors")])
    data = bytearray(path.read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 2000))] ^= 1 << rng.randrange(8)
    path.write_bytes(data if kind == 0 else data[: rng.randrange(len(data))] if kind == 1 else data + rng.randbytes(9))


def special(folder: Path, rng: random.Random) -> None:
    """Put something else in the place of a file."""
    path = rng.choice([*files(folder, ".json"), *files(folder, ".safetensors")])
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(rng.choice(["/dev/zero", "/nowhere", "..", str(path)]))
    elif kind == 3:
        path.write_bytes(pickle.dumps(Payload(folder.parent / "executed")))
    elif kind == 4:
        with open(path, "wb") as file:  # a tebibyte of nothing
            header = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(2**40)


def odd_json(folder: Path, rng: random.Random) -> None:
    """Write what is hardly JSON."""
    path = rng.choice(files(folder, "config.json"))
    text = path.read_text()
    path.write_text(rng.choice(["[" * 100_000, "{}", "[]", "null", '"x"', "", text.replace("{", '{"r": 1, ', 1),
                                text.replace("}", ', "r": ' + "9" * 5000 + "}"), "\ufeff" + text]))  # fmt: skip


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    settings, settings, settings, settings, tensors, tensors, tensors, bits, other_kind, special, odd_json,
]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("cases", [range(CASES), pytest.param(range(CASES, MANY), marks=pytest.mark.slow)])
def test_damaged_folders_end_in_an_error_of_ours_or_an_adapter(base: Base, originals, tmp_path, cases) -> None:
    import resource

    before = {key: t.clone() for key, t in base.model.state_dict().items()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong: list[str] = []
    refused = 0
    for case in cases:
        rng = random.Random(case)
        folder = tmp_path / "x"
        shutil.copytree(originals[case % len(originals)], folder)
        damage = DAMAGE[case // len(originals) % len(DAMAGE)]
        damage(folder, rng)
        label = f"case {case} {damage.__name__} of {originals[case % len(originals)].name}"
        began = time.process_time()
        try:
            base.import_adapter(folder, name="damaged")
            base.remove("damaged")
        except OnebaseError as error:
            refused += 1
            if len(str(error)) > 20_000:
                wrong.append(f"{label}: a message of {len(str(error))} characters")
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
        if (taken := time.process_time() - began) > 5:
            wrong.append(f"{label}: took {taken:.1f} s")
        assert not base.adapters, label
        assert not (tmp_path / "executed").exists(), f"{label}: a pickle was opened"
        shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024  # MiB
    assert grown < 400, f"{grown} MiB were allocated for tiny adapters"
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    assert refused > len(cases) // 2
    assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
