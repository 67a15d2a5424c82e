"""Processes killed at any moment of a save or removal leave only whole versions behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onebase.store import Store
from test_store import child_environment, settings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked to start in milliseconds")

# Imports torch once and forks a child per line read: a child starts in milliseconds, not seconds.
# A line is a number of file events after which the child ends itself as if killed, or 0 to go on for ever.
SERVER = """
import json, os, sys
import numpy, torch, safetensors.torch
from onebase.store import Store

root, config = sys.argv[1], json.loads(sys.argv[2])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}

def work(limit):
    store, seen = Store(root), 0
    oldest = store.list()[:1]
    def count(event, args):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == limit:
                os._exit(9)
    if limit:
        sys.addaudithook(count)
    while True:
        tensors = {"w": torch.from_numpy(numpy.arange(12.0)), "b": torch.from_numpy(numpy.ones(3))}
        saved = store.save("a", config=config, tensors=tensors)
        if limit:
            for old in oldest:
                store.remove(old.ref)
            os._exit(0)
        for old in store.list()[:-3]:
            store.remove(old.ref)

for line in sys.stdin:
    child = os.fork()
    if not child:
        work(int(line))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextmanager
def fork_server(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(root), json.dumps(settings())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_environment()) as server:
        try:
            yield server
        finally:
            server.stdin.close()
            server.wait(timeout=60)


def start(server: subprocess.Popen[str], limit: int = 0) -> int:
    server.stdin.write(f"{limit}\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def ended(server: subprocess.Popen[str]) -> int:
    return int(server.stdout.readline())


def check_whole(store: Store, newest: int) -> int:
    """Every version listed loads, and no number went backwards. Returns the newest."""
    listed = store.list()
    for stored in listed:
        stored.verify()
    if listed:
        assert listed[-1].version >= newest
        assert store.resolve("a") == listed[-1]
    return listed[-1].version if listed else newest


def kill_at_random(root: Path, kills: int) -> None:
    store, rng = Store(root), random.Random(0)
    began = time.perf_counter()
    newest = store.save("a", config=settings(), tensors={}).version
    pace = time.perf_counter() - began  # of one save: a busy machine is given longer, so that kills hit saves
    with fork_server(root) as server:
        for _ in range(kills):
            child = start(server)
            time.sleep(rng.uniform(0, max(0.05, 10 * pace)))  # from none to some ten saves
            os.kill(child, signal.SIGKILL)
            assert os.WTERMSIG(ended(server)) == signal.SIGKILL
            newest = check_whole(store, newest)
    assert newest > kills / 8  # the children did save
    last = store.save("a", config=settings(), tensors={})
    assert last.version > newest


def test_eight_kills(tmp_path):
    kill_at_random(tmp_path, 8)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    kill_at_random(tmp_path, 200)


def test_death_before_every_file_event(tmp_path):
    store, newest = Store(tmp_path), 0
    with fork_server(tmp_path) as server:
        limit, status = 0, 9
        while status == 9:
            limit += 1
            start(server, limit)
            status = os.waitstatus_to_exitcode(ended(server))
            newest = check_whole(store, newest)
            for old in store.list()[:-2]:  # a removal looks at all versions: left alone, each death would add an event
                store.remove(old.ref)
    assert status == 0
    assert 30 < limit < 150  # the events of one save and one removal
    assert newest > 3
