"""Processes that save, promote and remove at once, some of them killed, lose and damage nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onebase.store import Store
from test_store import child_environment, settings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked, and killed by SIGKILL")

# Imports torch once and forks the workers. A worker reports to its own file what it has done, after it was done.
SERVER = """
import json, os, random, signal, sys
import torch, safetensors.torch, filelock
from onebase.errors import StoreError, UnknownNameError
from onebase.store import Store

root, log, config = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
workers, acts, seed = map(int, sys.argv[4:])

def work(number):
    store, rng = Store(root), random.Random(seed * 1000 + number)
    out = os.open(f"{log}/{number}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    say = lambda *words: os.write(out, (" ".join(map(str, words)) + "\\n").encode())
    for act in range(acts):
        try:
            kind = rng.choice(["save", "save", "promote", "promote", "remove", "rollback", "gc"])
            if kind == "save" or act == 0:
                w = float(number * 1000 + act)
                saved = store.save("a", config=config, tensors={"w": torch.full((4,), w)})
                say("saved", saved.version, w)
                continue
            versions = [place.version for place in store._places("a")]
            if not versions:
                continue
            ref = f"a@{rng.choice(versions)}"
            if kind == "promote":
                store.promote(ref, rng.choice(["prod", "next"]))
            elif kind == "remove":
                say("removing", ref[2:])
                store.remove(ref)
            elif kind == "rollback":
                store.rollback("a", rng.choice(["prod", "next"]))
            else:
                store.gc()
        except UnknownNameError as error:
            pass  # another worker removed it first
        except StoreError as error:
            text = str(error)
            assert "is not removed" in text or "named nothing before" in text, text
    say("done")
    os._exit(0)

children = []
for number in range(workers):
    child = os.fork()
    if not child:
        work(number)
    children.append(child)
print(json.dumps(children), flush=True)
sys.stdin.readline()  # who has ended stays a zombie until here, so its id is nobody else's
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps(codes), flush=True)
"""


def storm(tmp_path: Path, workers: int, acts: int, kills: int, rounds: int, seed: int) -> None:
    root, rng = tmp_path / "home", random.Random(seed)
    done, killed, pipe = 0, 0, subprocess.PIPE
    for turn in range(rounds):
        log = tmp_path / f"log{turn}"
        log.mkdir()
        command = [sys.executable, "-c", SERVER, str(root), str(log), json.dumps(settings())]
        command += [str(workers), str(acts), str(seed + turn)]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_environment()) as server:
            assert server.stdin is not None and server.stdout is not None
            children = json.loads(server.stdout.readline())
            for child in rng.sample(children, kills):
                time.sleep(rng.uniform(0.02, 0.15))
                os.kill(child, signal.SIGKILL)
            server.stdin.write("\n")  # only now are those that ended waited for: a reaped one cannot be killed
            server.stdin.flush()
            codes = json.loads(server.stdout.readline())
        assert set(codes) <= {0, -signal.SIGKILL}, codes
        done += codes.count(0)
        killed += codes.count(-signal.SIGKILL)
        check(Store(root), log)
    assert done and killed, f"{done} workers ended and {killed} were killed: nothing was shown"


def check(store: Store, log: Path) -> None:
    saved: dict[int, float] = {}
    removing: set[int] = set()
    for file in log.iterdir():
        for words in map(str.split, file.read_text().splitlines()):
            if words[0] == "saved":
                assert int(words[1]) not in saved, "a number was given twice"
                saved[int(words[1])] = float(words[2])
            elif words[0] == "removing":
                removing.add(int(words[1]))
    listed = {stored.version: stored for stored in store.list()}
    for version, stored in listed.items():
        tensors = stored.tensors()
        if version in saved:
            assert float(tensors["w"][0]) == saved[version]
    lost = saved.keys() - removing - listed.keys()
    assert not lost, f"saved, never removed, and gone: {sorted(lost)}"
    for alias, version in store.aliases("a").items():
        assert version in listed, f"{alias} names version {version}, which does not exist"
        assert store.resolve(f"a@{alias}").version == version
    assert len(store._places("a")) == len(listed)


def test_processes_at_once_and_killed(tmp_path: Path) -> None:
    storm(tmp_path, workers=4, acts=25, kills=2, rounds=2, seed=0)


@pytest.mark.slow
def test_many_processes_at_once_and_killed(tmp_path: Path) -> None:
    storm(tmp_path, workers=8, acts=200, kills=4, rounds=3, seed=100)
