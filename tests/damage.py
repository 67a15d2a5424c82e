"""Damage to an adapter folder by somebody with an editor and our own code; `test_store_fuzz.py` does it and looks.

Half of the damage is found by the digest. The other half is sealed again, as somebody with an editor and our own code
could, so that only what the digest stands for is left to find it: structure, names, shapes, values, base and answers.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from onebase.store.disk import sha256_file
from onebase.store.schema import CARD_FILE, CONFIG_FILE, TENSORS_FILE, seal

FILES = (CONFIG_FILE, TENSORS_FILE, CARD_FILE)


@dataclass
class Folder:
    """One copy of a good adapter, to be damaged."""

    path: Path
    rng: random.Random
    marker: Path
    sealed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / CONFIG_FILE).read_text())

    def write(self, config: dict[str, Any], seal_again: bool = True) -> None:
        """Write a config whose file digests and own digest are right again."""
        if seal_again:
            for name in config["files"]:
                if "/" not in name and (self.path / name).is_file():
                    config["files"][name] = sha256_file(self.path / name)
            config = seal({key: value for key, value in config.items() if key != "digest"})
        (self.path / CONFIG_FILE).write_text(json.dumps(config))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Change the tensors, and let the config agree with them."""
        tensors = from_bytes((self.path / TENSORS_FILE).read_bytes())
        change(tensors)
        (self.path / TENSORS_FILE).write_bytes(to_bytes(tensors, {"format": "pt"}))
        config = self.config
        config["tensors"] = {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()
        }
        self.write(config)

    def pick(self, tensors: dict[str, torch.Tensor], matrix: bool = False) -> str:
        return self.rng.choice([n for n, t in tensors.items() if t.numel() > 1 and (t.dim() > 1 or not matrix)])


# -- damage that the digest shows: every function returns what the message must name --------------------------------


def flip_a_bit(f: Folder) -> str:
    name = f.rng.choice(FILES)
    data = bytearray((f.path / name).read_bytes())
    data[f.rng.randrange(len(data))] ^= 1 << f.rng.randrange(8)
    (f.path / name).write_bytes(data)
    return name


def cut_a_file(f: Folder) -> str:
    name = f.rng.choice(FILES)
    data = (f.path / name).read_bytes()
    # not the last byte alone: a config without its last line break says the same
    (f.path / name).write_bytes(data[: f.rng.choice([0, 1, 7, 8, len(data) // 2, len(data) - 2])])
    return name


def grow_a_file(f: Folder) -> str:
    name = f.rng.choice(FILES)
    with open(f.path / name, "ab") as file:
        file.write(f.rng.randbytes(f.rng.choice([1, 8, 4096])))
    return name


def lose_a_file(f: Folder) -> str:
    name = f.rng.choice(FILES)
    (f.path / name).unlink()
    return name


def add_a_file(f: Folder) -> str:
    name = f.rng.choice(["pytorch_model.bin", "extra.txt", "adapter.pkl", ".hidden", "Adapter_Model.safetensors"])
    (f.path / name).write_bytes(f.rng.randbytes(20))
    return name


def a_folder_for_a_file(f: Folder) -> str:
    name = f.rng.choice(FILES)
    (f.path / name).unlink()
    (f.path / name).mkdir()
    return name


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def put_a_pickle(f: Folder) -> str:
    (f.path / TENSORS_FILE).write_bytes(pickle.dumps(Payload(f.marker)))
    if f.rng.random() < 0.5:
        f.write(f.config)
    return TENSORS_FILE


# -- damage with a good digest ---------------------------------------------------------------------------------------


def drop_a_tensor(f: Folder) -> str:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        f.notes.append(f.pick(tensors))
        del tensors[f.notes[-1]]

    f.tensors(change)
    return f.notes[-1]


def add_a_tensor(f: Folder) -> str:
    name = f.rng.choice(["extra", "module.deltas.x.A", "head.other", "../up", "a" * 300])
    f.tensors(lambda tensors: tensors.update({name: torch.zeros(2)}))
    return name


def rename_a_tensor(f: Folder) -> str:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        f.notes.append(f.pick(tensors))
        tensors[f.notes[-1] + "x"] = tensors.pop(f.notes[-1])

    f.tensors(change)
    return f.notes[-1]


def reshape_a_tensor(f: Folder) -> str:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f.pick(tensors, matrix=True)
        f.notes.append(name)
        one = tensors[name]
        tensors[name] = f.rng.choice(
            [one.flatten(), one[None].contiguous(), one[:-1].contiguous(), one[:0].contiguous()]
        )

    f.tensors(change)
    return f.notes[-1]


def poison_a_value(f: Folder) -> str:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        f.notes.append(f.pick(tensors))
        tensors[f.notes[-1]].view(-1)[f.rng.randrange(2)] = f.rng.choice([float("nan"), float("inf"), -float("inf")])

    f.tensors(change)
    return f.notes[-1]


def retype_a_tensor(f: Folder) -> str:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        f.notes.append(f.pick(tensors))
        tensors[f.notes[-1]] = tensors[f.notes[-1]].to(f.rng.choice([torch.int64, torch.bool, torch.uint8]))

    f.tensors(change)
    return f.notes[-1]


def change_the_answers(f: Folder) -> str:
    f.tensors(lambda tensors: [t.mul_(3.0) for n, t in tensors.items() if t.is_floating_point() and "base" not in n])
    return "probe"


def huge_header(f: Folder) -> str:
    data = (f.path / TENSORS_FILE).read_bytes()
    claim = f.rng.choice([2**40, 2**62, 2**64 - 1, 100_000_001])
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    damaged = f.rng.choice([struct.pack("<Q", claim) + data[8:], struct.pack("<Q", len(header)) + header + data[-64:]])
    (f.path / TENSORS_FILE).write_bytes(damaged)
    f.write(f.config)
    return TENSORS_FILE


def other_base(f: Folder) -> str:
    config = f.config
    key, value = f.rng.choice(
        [("fingerprint", "sha256:" + "0" * 64), ("model_type", "gpt2"), ("hidden_size", 7), ("layers", 99)]
    )
    config["base"][key] = value
    f.write(config)
    return {"fingerprint": "weights", "model_type": "model type"}.get(key, key)


def other_tokenizer(f: Folder) -> str:
    config = f.config
    config["tokenizer"]["digest"] = "sha256:" + "1" * 64
    f.write(config)
    return "tokenizer"


def unknown_key(f: Folder) -> str:
    config = f.config
    place = f.rng.choice([config, config["base"], config["method"], config["method"]["settings"], config["tokenizer"]])
    place["surprise"] = f.rng.choice([1, "x", None, [], {"a": 1}])
    f.write(config)
    return "surprise"


def lost_key(f: Folder) -> str:
    config = f.config
    key = f.rng.choice(["method", "task", "base", "tokenizer", "tensors", "files", "probes", "name", "version"])
    del config[key]
    config.setdefault("files", {})
    if key == "files":
        del config["files"]
        f.write(config, seal_again=False)
    else:
        f.write(config)
    return key


def wrong_type(f: Folder) -> str:
    config = f.config
    key = f.rng.choice(["method", "task", "base", "tokenizer", "version", "metrics", "parameters", "probes", "created"])
    config[key] = (
        f.rng.choice([[], 1.5, None, "text", [{}]]) if key not in ("created",) else f.rng.choice([3, None, "now"])
    )
    f.write(config)
    return key


def bad_setting(f: Folder) -> str:
    config = f.config
    key, value = f.rng.choice(
        [("rank", -1), ("rank", "8"), ("rank", 10**9), ("rank", 4.5), ("rank", None), ("alpha", "__import__('os')"),
         ("alpha", -1.0), ("sites", 7), ("sites", "re:("), ("sites", "nowhere"), ("dropout", 1.5), ("ranks", [1])]
    )  # fmt: skip
    config["method"]["settings"][key] = value
    f.write(config)
    return key


def bad_method(f: Folder) -> str:
    config = f.config
    config["method"]["name"] = f.rng.choice(["lorra", "", "os.system", "../lora", "x" * 5000])
    f.write(config)
    return config["method"]["name"][:50] or "method"


def bad_task(f: Folder) -> str:
    config = f.config
    key, value = f.rng.choice(
        [("kind", "classifikation"), ("kind", None), ("labels", []), ("labels", ["a"]), ("labels", "ab"),
         ("labels", [1, 2]), ("labels", ["a", "a"]), ("labels", None), ("pooling", "median"), ("pooling", 3),
         ("max_length", -1), ("max_length", 0), ("max_length", 10**9), ("max_length", "64"), ("template", 5),
         ("template", "no place")]
    )  # fmt: skip
    config["task"][key] = value
    f.write(config)
    return key


def bad_probes(f: Folder) -> str:
    config = f.config
    config["probes"] = f.rng.choice(
        [
            {**config["probes"], "values": [[1.0]]},
            {**config["probes"], "values": "x"},
            {**config["probes"], "values": [[None]]},
        ]
    )
    f.write(config)
    return "probe"


def path_trick(f: Folder) -> str:
    config = f.config
    which = f.rng.randrange(4)
    if which == 0:
        name = f.rng.choice(["../secret", "/etc/passwd", "a/b", "..", ".", "a\\b", ""])
        config["files"][name] = "0" * 64
        f.write(config)
        return "files"
    if which == 1:
        config["name"] = f.rng.choice(["../up", "/abs", "a/b", ".hidden", "", "x" * 65, "a\x00b", "ａ"])
        f.write(config)
        return "name"
    name = f.rng.choice(FILES)
    (f.path / name).unlink()
    (f.path / name).symlink_to(f.rng.choice(["/dev/zero", "/nowhere", "..", str(f.path / name)]))
    return name


def no_json(f: Folder) -> str:
    good = (f.path / CONFIG_FILE).read_text()
    bad = f.rng.choice(
        ["[" * 100_000, "{" * 5000, "null", "[]", '"text"', "", "NaN", good.replace("{", '{"name": "x", ', 1),
         good.replace('"version": 1', '"version": ' + "9" * 5000), '{"a": 1e999}', "\x00" * 100,
         good.replace('"parameters"', '"parameters": Infinity, "x"', 1)]
    )  # fmt: skip
    (f.path / CONFIG_FILE).write_text(bad)
    return CONFIG_FILE


def no_text(f: Folder) -> str:
    (f.path / CONFIG_FILE).write_bytes(f.rng.choice([b"\xff\xfe{}", b"\x80" * 50, f.rng.randbytes(500)]))
    return CONFIG_FILE


def newer_format(f: Folder) -> str:
    config = f.config
    config["format_version"] = f.rng.choice([2, 99, 10**30, -1, 0, "1", 1.0, None])
    f.write(config)
    return "format_version|newer"


DAMAGE = (
    flip_a_bit, flip_a_bit, flip_a_bit, cut_a_file, grow_a_file, lose_a_file, add_a_file, a_folder_for_a_file,
    put_a_pickle, drop_a_tensor, add_a_tensor, rename_a_tensor, reshape_a_tensor, poison_a_value, retype_a_tensor,
    change_the_answers, huge_header, other_base, other_tokenizer, unknown_key, lost_key, wrong_type, bad_setting,
    bad_setting, bad_method, bad_task, bad_task, bad_probes, path_trick, path_trick, no_json, no_text, newer_format,
)  # fmt: skip
