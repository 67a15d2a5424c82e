"""Change and damage under load: every answer must be the offline answer of the digest that it names.

Adapters are loaded, promoted, rolled back, withdrawn, removed, stored anew and damaged at random while clients ask.
What may be refused is refused with a status that says so (404, 409, 422, 429, 503); a 500, or an answer that is not
what `base.predict` gives for the version it names, ends the run as failed. Memory is read every few seconds; its slope
is that of the second half, when everything has been loaded once. Device and memory hold a few adapters only, so that
versions come and go all the time, and what is kept does not grow with what was stored.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from serving import METHODS, TASK, free_port, make_texts, running, serve_words

KEY = "the-key-of-this-run"
REFUSALS = {400, 404, 409, 422, 429, 503}
TEXTS, CLIENTS, PAUSE, SAMPLE = 12, 4, 0.3, 5.0


class World:
    """A store, its server and what every version answers.

    Args:
        base: computes what is right.
        home: of the store.
        port: of the server.
    """

    def __init__(self, base: Any, home: Path, port: int):
        from onebase.store import Store

        self.base, self.store, self.port = base, Store(home), port
        self.texts = make_texts(base.tokenizer, TEXTS)
        self.right: dict[str, list[dict[str, float]]] = {}  # digest -> per text
        self.names: list[str] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.over = threading.Event()

    def add(self, name: str, method: str, seed: int) -> None:
        """Store the next version of an adapter, and remember what it answers."""
        import torch

        adapter = self.base.add("made", method, task=TASK, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for values in adapter.tensors().values():
                values += 0.05 * torch.randn(values.shape, generator=generator)
        answers = [one.probabilities for one in self.base.predict(self.texts, "made")]
        digest_known = self.base.save("made", as_name=name, store=self.store)
        self.right[digest_known.digest] = answers
        self.base.remove("made")
        if name not in self.names:
            self.names.append(name)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return status and answer of a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}, method=method,
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def memory(self) -> int:
        """Return the server's resident bytes."""
        return int(self.ask("GET", "/v1/stats")[1]["process"]["rss_bytes"])

    def warm_up(self) -> int:
        """Have every adapter answer, in batches of several sizes; return the memory without adapters after that."""
        for count in (1, 4, 8):
            for name in self.names:
                self.ask("POST", "/v1/classify", {"model": name, "input": self.texts[:count]})
        bare = self.unload_all()
        for name in self.names:
            self.expect("POST", "/v1/adapters", {"ref": name})
        return bare

    def unload_all(self) -> int:
        """Unload every adapter; return the memory after that."""
        for name in self.names:
            self.expect("DELETE", f"/v1/adapters/{name}")
        time.sleep(SAMPLE)
        return self.memory()

    def client(self, seed: int) -> None:
        """Ask until it is over."""
        chance = random.Random(seed)
        while not self.over.is_set():
            place, name = chance.randrange(TEXTS), chance.choice(self.names)
            ref = chance.choice([name, name, f"{name}@prod", f"{name}@{chance.randrange(1, 4)}"])
            try:
                status, answer = self.ask("POST", "/v1/classify", {"model": ref, "input": self.texts[place]})
            except OSError as error:
                self.failed.append(f"{ref}: {error}")
                continue
            if status != 200:
                self.counts[f"refused {status}"] += 1
                if status not in REFUSALS:
                    self.failed.append(f"{ref}: {status} {str(answer)[:300]}")
                continue
            self.counts["answers"] += 1
            one = answer["data"][0]
            right = self.right.get(one["digest"])
            if right is None or any(abs(right[place][k] - v) > 1e-3 for k, v in one["probabilities"].items()):
                self.wrong.append(f"{ref} answered by {one['ref']} {one['digest']}: {one['probabilities']}")

    # -- change ------------------------------------------------------------------------------------------------------

    def change(self, chance: random.Random, number: int) -> None:
        """Do one thing that a server must bear."""
        name = chance.choice(self.names)
        versions = [stored.config.version for stored in self.store.list() if stored.name == name]
        version = chance.choice(versions or [1])
        what = chance.choice(["load", "promote", "promote", "rollback", "withdraw", "remove", "damage", "store"])
        self.counts[what] += 1
        if what == "store":
            self.add(name, chance.choice(list(METHODS.values())), 1000 + number)
        elif what == "load":
            self.expect("POST", "/v1/adapters", {"ref": f"{name}@{version}"})
        elif what == "promote":
            self.expect("POST", f"/v1/adapters/{name}/promote", {"version": version, "alias": "prod"})
        elif what == "rollback":
            self.expect("POST", f"/v1/adapters/{name}/rollback", {"alias": "prod"})
        elif what == "withdraw":
            self.expect("DELETE", f"/v1/adapters/{name}")
            time.sleep(PAUSE)
            self.expect("POST", "/v1/adapters", {"ref": name})
        elif what == "remove" and len(versions) > 2:
            self.expect("DELETE", f"/v1/adapters/{name}@{version}?remove=true")
        elif what == "damage":
            self.damage(f"{name}@{version}", chance)

    def damage(self, ref: str, chance: random.Random) -> None:
        """Change bytes of a file, have it loaded anew, and put the bytes back."""
        folder = self.store.root / "adapters" / ref.replace("@", "/")
        files = sorted(file for file in folder.glob("*") if file.suffix in (".safetensors", ".json"))
        if not files:
            return
        file = chance.choice(files)
        whole = file.read_bytes()
        place = chance.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            self.expect("DELETE", f"/v1/adapters/{ref}")
            self.expect("POST", "/v1/adapters", {"ref": ref})
            time.sleep(PAUSE)
        finally:
            if file.parent.is_dir():
                file.write_bytes(whole)
        self.expect("POST", "/v1/adapters", {"ref": ref})

    def expect(self, method: str, path: str, body: Any = None) -> None:
        """Ask for a change; whatever is said must be no failure of the server."""
        status, answer = self.ask(method, path, body)
        self.counts[f"{method.lower()} {status}"] += 1
        if status >= 400 and status not in REFUSALS:
            self.failed.append(f"{method} {path}: {status} {str(answer)[:300]}")


def slope(samples: list[tuple[float, int]]) -> float:
    """Return bytes per second by least squares."""
    if len(samples) < 2:
        return 0.0
    mean_t, mean_b = (sum(column) / len(samples) for column in zip(*samples))
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    return sum((t - mean_t) * (b - mean_b) for t, b in samples) / spread


def soak(minutes: float, adapters: int) -> dict[str, Any]:
    """Run for so long.

    Args:
        minutes: of change.
        adapters: names; each begins with three versions.

    Returns:
        counts, what was wrong, memory at both ends, its slope, and what it is without adapters before and after.
    """
    import onebase as ob

    with ob.load_base("minilm") as base, tempfile.TemporaryDirectory() as folder:
        world = World(base, Path(folder), free_port())
        methods = list(METHODS.values())
        for number in range(adapters):
            for version in range(3):
                world.add(f"a{number:02d}", methods[number % len(methods)], 10 * number + version)
            world.store.promote(f"a{number:02d}@1", "prod")
        environment = {"ONEBASE_HOME": folder, "ONEBASE_API_KEY": KEY}
        with running([*serve_words(world.port), "--device-mb", "4", "--memory-mb", "4"], world.port, **environment):
            bare = world.warm_up()
            clients = [threading.Thread(target=world.client, args=(seed,)) for seed in range(CLIENTS)]
            for client in clients:
                client.start()
            began, chance, number, samples = time.monotonic(), random.Random(0), 0, []
            try:
                while time.monotonic() - began < 60 * minutes:
                    world.change(chance, number)
                    number += 1
                    now = time.monotonic() - began
                    if not samples or now - samples[-1][0] >= SAMPLE:
                        samples.append((now, world.memory()))
                    time.sleep(PAUSE)
            finally:
                world.over.set()
                for client in clients:
                    client.join()
            unloaded = world.unload_all()
    ends = [samples[0][1] >> 20, samples[-1][1] >> 20]
    late = [sample for sample in samples if sample[0] > 30 * minutes]
    return {
        "minutes": minutes, "changes": number, "counts": dict(sorted(world.counts.items())),
        "wrong": world.wrong[:20], "failed": world.failed[:20], "rss_mib": ends,
        "rss_percent_per_10_minutes": round(100 * slope(late) * 600 / late[0][1], 3),
        "rss_mib_without_adapters": {"before": bare >> 20, "after": unloaded >> 20},
    }  # fmt: skip
