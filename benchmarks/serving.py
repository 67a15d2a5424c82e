"""What a server of many adapters does: throughput and latency against the base alone and a server that switches.

    python benchmarks/serving.py                                   # everything, writes results/serving.json
    python benchmarks/serving.py --adapters 4 --seconds 3 --clients 4 --only lora --dry     # to try it
    python benchmarks/serving.py --only many                       # 1,000 adapters, memory for a tenth of them
    python benchmarks/serving.py --dtype bfloat16                  # as the first, where the processor has bfloat16
    python benchmarks/serving.py --soak 30                         # half an hour of change and damage, see soak.py

For each method, and for all four mixed, a store of adapters is made on the embedded base (random values: what they
answer does not matter, how long it takes does), a real server is started on it, and its answers are compared with
`base.predict` first. Then

- throughput: so many clients ask one text each, again and again; answers per second;
- latency: requests arrive at random times (Poisson), at LOAD of what this server just did, whatever it does now; from
  the planned arrival to the answer, so that a request that had to wait to be sent has waited.

Texts have 128 tokens and differ; which adapter is asked follows Zipf's law. "switching" and "peft-mixed" are servers of
the same kind around PEFT, with LoRA of the same size and the dtype of the others: the first answers one request at a
time, `set_adapter` before each; the second what waits, up to 32 rows, in one batch with `adapter_names`. "processes" is
a server of this project for each of eight adapters, against one server of the same eight ("together").
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "serving.json"
METHODS = {
    "lora": "lora(rank=8, sites='paper')",
    "houlsby": "bottleneck(size=32)",
    "prefix": "prefix(length=10)",
    "prompt": "prompt(length=10)",
}
MIXED, MANY, PROCESSES = "mixed", "many", "processes"
PEERS = ("switching", "peft-mixed")
EIGHT = 8  # adapters of "processes": each holds a base of its own
LOAD = 0.7
TASK = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 128}
TOKENS, ZIPF, CHECKED = 128, 1.0, 4
NEAR = {"float32": 1e-4, "bfloat16": 2e-2}  # most that a probability may differ from that of `base.predict`


# -- what is served ----------------------------------------------------------------------------------------------------


def make_store(base: Any, home: Path, methods: Sequence[str], count: int) -> list[str]:
    """Store adapters of the methods in turn, with values away from their start; return their names."""
    import torch

    from onebase.store import Store

    store, names = Store(home), [f"a{i:03d}" for i in range(count)]
    for seed, name in enumerate(names):
        adapter = base.add("made", methods[seed % len(methods)], task=TASK, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for values in adapter.tensors().values():
                values += 0.02 * torch.randn(values.shape, generator=generator)
        base.save("made", as_name=name, store=store)
        base.remove("made")
    return names


def make_texts(tokenizer: Any, count: int, seed: int = 0) -> list[str]:
    """Return different texts of TOKENS tokens, made of words that are one token each."""
    chance = random.Random(seed)
    words = sorted(word for word, i in tokenizer.get_vocab().items() if word.isalpha() and i > 1500)
    words = [word for word in chance.sample(words, min(4000, len(words))) if len(tokenizer(word)["input_ids"]) == 3]
    return [" ".join(chance.choices(words, k=TOKENS - 2)) for _ in range(count)]


def popular(names: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Draw names by Zipf's law: the k-th is asked 1/k as often as the first."""
    weights = [1 / (k + 1) ** ZIPF for k in range(len(names))]
    return random.Random(seed).choices(list(names), weights, k=count)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def running(words: Sequence[str], port: int, **environment: str) -> Iterator[int]:
    """Run a server as a process of its own until the block ends; gives its id."""
    process = subprocess.Popen([sys.executable, *words], env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with code {process.returncode}") from None
                time.sleep(0.25)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


# -- asking ------------------------------------------------------------------------------------------------------------


class Client:
    """Asks and waits, over one connection to each server: bare HTTP, so that measuring costs little.

    Args:
        port: of the server on this machine, or of the server of each adapter.
    """

    def __init__(self, port: int | Mapping[str, int]):
        self.port = port
        self.streams: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def ask(self, body: dict[str, Any], path: str = "/v1/classify") -> tuple[int, bytes]:
        """Return status and body of the answer; connects anew where the server has closed an idle connection."""
        port = self.port if isinstance(self.port, int) else self.port[body["model"]]
        fresh = port not in self.streams
        try:
            return await self._ask(port, body, path)
        except (asyncio.IncompleteReadError, ConnectionError):
            if fresh:
                raise
            self.streams.pop(port)[1].close()
            return await self._ask(port, body, path)

    async def _ask(self, port: int, body: dict[str, Any], path: str) -> tuple[int, bytes]:
        if port not in self.streams:
            self.streams[port] = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = self.streams[port]
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = next(
            int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
        )
        return int(head.split()[1]), await reader.readexactly(length)

    def close(self) -> None:
        """Hang up."""
        for _, writer in self.streams.values():
            writer.close()


def requests_of(names: Sequence[str], texts: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return bodies: adapters by popularity, texts in turn."""
    return [{"model": n, "input": texts[i % len(texts)]} for i, n in enumerate(popular(names, count))]


async def throughput(
    port: int | Mapping[str, int], bodies: Sequence[dict[str, Any]], clients: int, seconds: float
) -> dict[str, float]:
    """Ask with so many clients at once; return answers per second."""
    place, done, until = 0, 0, time.perf_counter() + seconds

    async def one() -> None:
        nonlocal place, done
        client = Client(port)
        while time.perf_counter() < until:
            place += 1
            status, answer = await client.ask(bodies[place % len(bodies)])
            assert status == 200, answer
            done += 1
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return {"per_second": round(done / (time.perf_counter() - began), 2), "answers": done}


async def latency(
    port: int | Mapping[str, int], bodies: Sequence[dict[str, Any]], rate: float, seconds: float
) -> dict[str, float]:
    """Ask at random times, `rate` a second; return milliseconds from the planned time to the answer."""
    chance, took, idle = random.Random(1), [], []
    refused = 0

    async def one(body: dict[str, Any], planned: float) -> None:
        nonlocal refused
        client = idle.pop() if idle else Client(port)
        status, _ = await client.ask(body)
        took.append((time.perf_counter() - planned) * 1e3)
        refused += status != 200
        idle.append(client)

    start, at, tasks = time.perf_counter(), 0.0, []
    for body in bodies:
        at += chance.expovariate(rate)
        if at > seconds:
            break
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(body, start + at)))
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    shown = {f"{p}_ms": round(value, 2) for p, value in percentiles(took).items()}
    return {"rate": round(rate, 2), "answers": len(took), "refused": refused, **shown}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}


def measure(port: int | Mapping[str, int], names: Sequence[str], texts: Sequence[str], args: Any) -> dict[str, Any]:
    """Measure a server; every adapter is asked once before."""

    async def warm() -> None:
        client = Client(port)
        for name in names:
            assert (await client.ask({"model": name, "input": texts[0]}))[0] == 200
        client.close()

    asyncio.run(warm())
    return under_load(port, names, texts, args, args.seconds)


def under_load(
    port: int | Mapping[str, int], names: Sequence[str], texts: Sequence[str], args: Any, seconds: float
) -> dict[str, Any]:
    """Measure throughput for so many seconds, then latency at a part of it."""
    bodies = requests_of(names, texts, 100_000)
    found: dict[str, Any] = {"throughput": asyncio.run(throughput(port, bodies, args.clients, seconds))}
    found["latency"] = asyncio.run(latency(port, bodies, LOAD * found["throughput"]["per_second"], args.seconds))
    return found


def check(base: Any, home: Path, port: int, names: Sequence[str], texts: Sequence[str], near: float) -> float:
    """Compare answers with `base.predict` in float32; return the largest difference of a probability."""
    from onebase.store import Store

    async def asked() -> list[dict[str, Any]]:
        client = Client(port)
        answers = [await client.ask({"model": n, "input": texts[0]}) for n in names[:CHECKED]]
        client.close()
        return [json.loads(answer)["data"][0] for _, answer in answers]

    worst = 0.0
    for name, answer in zip(names, asyncio.run(asked())):
        base.load(name, store=Store(home))
        wanted = base.predict(texts[0], name)[0].probabilities
        base.remove(name)
        worst = max(worst, *(abs(wanted[label] - answer["probabilities"][label]) for label in wanted))
    assert worst < near, worst
    return worst


# -- servers around PEFT -----------------------------------------------------------------------------------------------


def peft_server(kind: str, port: int, count: int, dtype: str) -> None:
    """Serve LoRA adapters of PEFT: one request after the other, or what waits in mixed batches."""
    import queue
    import threading
    from concurrent.futures import Future

    import torch
    import uvicorn
    from fastapi import FastAPI
    from peft import LoraConfig, get_peft_model

    import onebase as ob

    base = ob.load_base("minilm", dtype=dtype)
    tokenizer, config = base.tokenizer, LoraConfig(r=8, target_modules=["query", "value"])
    model = get_peft_model(base.model, config, adapter_name="a000").eval()
    for i in range(1, count):
        model.add_adapter(f"a{i:03d}", config)
    heads = {f"a{i:03d}": torch.nn.Linear(base.anatomy.hidden_size, 2) for i in range(count)}
    lock, app = threading.Lock(), FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    def answer(names: list[str], texts: list[str], **more: Any) -> list[dict[str, float]]:
        batch = tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch, **more).last_hidden_state.float().mean(1)
            found = [heads[name](state).softmax(-1).tolist() for name, state in zip(names, states)]
        return [{"bad": bad, "good": good} for bad, good in found]

    def alone(name: str, text: str) -> dict[str, float]:
        with lock:
            model.set_adapter(name)
            return answer([name], [text])[0]

    waiting: queue.Queue[tuple[str, str, Future[dict[str, float]]]] = queue.Queue()

    def batches() -> None:
        while True:
            part = [waiting.get()]
            while len(part) < 32 and not waiting.empty():
                part.append(waiting.get())
            names = [name for name, _, _ in part]
            for (_, _, future), one in zip(part, answer(names, [text for _, text, _ in part], adapter_names=names)):
                future.set_result(one)

    if kind == "peft-mixed":
        threading.Thread(target=batches, daemon=True).start()

    @app.post("/v1/classify")
    async def classify(body: dict[str, Any]) -> dict[str, Any]:
        name, text = body["model"], body["input"]
        if kind == "peft-mixed":
            future: Future[dict[str, float]] = Future()
            waiting.put((name, text, future))
            chances = await asyncio.wrap_future(future)
        else:
            chances = await asyncio.to_thread(alone, name, text)
        return {"data": [{"probabilities": chances, "label": max(chances, key=lambda label: chances[label])}]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


# -- the program -------------------------------------------------------------------------------------------------------


def serve_words(port: int, dtype: str = "float32") -> list[str]:
    """Return the command of a server of the embedded base."""
    return ["-m", "onebase", "serve", "-b", "minilm", "--dtype", dtype, "--port", str(port)]


def run(args: Any) -> dict[str, Any]:
    """Measure every case; `of_base` is the throughput over that of the base alone, measured around it."""
    import onebase as ob

    chosen = args.only or [MIXED, *METHODS, *PEERS, PROCESSES, MANY]
    cases: dict[str, Any] = {}
    with ob.load_base("minilm") as base:
        texts = make_texts(base.tokenizer, 256)
        with tempfile.TemporaryDirectory() as folder:
            before = served(base, Path(folder) / "base", ["base"], texts, args)
            for case in chosen:
                if case in PEERS:
                    cases[case] = of_peft(case, texts, args)
                elif case == PROCESSES:
                    cases[case] = each_its_own(base, Path(folder) / case, texts, args)
                elif case == MANY:
                    cases[case] = many(base, Path(folder) / case, texts, args)
                else:
                    home = Path(folder) / case
                    methods = list(METHODS.values()) if case == MIXED else [METHODS[case]]
                    cases[case] = served(base, home, make_store(base, home, methods, args.adapters), texts, args)
                after = served(base, Path(folder) / "base", ["base"], texts, args)
                mean = (before["throughput"]["per_second"] + after["throughput"]["per_second"]) / 2
                cases[case]["base_per_second"] = [b["throughput"]["per_second"] for b in (before, after)]
                cases[case]["of_base"] = round(cases[case]["throughput"]["per_second"] / mean, 3)
                before = after
                print(case, json.dumps(cases[case]), flush=True)
    return cases


def served(base: Any, home: Path, names: Sequence[str], texts: Sequence[str], args: Any) -> dict[str, Any]:
    """Start a server of the adapters in a store and measure it."""
    home.mkdir(exist_ok=True)
    port = free_port()
    with running(serve_words(port, args.dtype), port, ONEBASE_HOME=str(home)):
        found = {}
        if list(names) != ["base"]:
            found["worst_difference"] = check(base, home, port, names, texts, NEAR[args.dtype])
        return found | measure(port, names, texts, args)


def of_peft(kind: str, texts: Sequence[str], args: Any) -> dict[str, Any]:
    """Measure a server around PEFT."""
    port, names = free_port(), [f"a{i:03d}" for i in range(args.adapters)]
    words = ["--peft", kind, "--port", str(port), "--adapters", str(args.adapters), "--dtype", args.dtype]
    with running([__file__, *words], port):
        return measure(port, names, texts, args)


def each_its_own(base: Any, home: Path, texts: Sequence[str], args: Any) -> dict[str, Any]:
    """Measure a server per adapter, and one server of all of them; with the memory of either."""
    home.mkdir()
    names = make_store(base, home, list(METHODS.values()), EIGHT)
    ports = {name: free_port() for name in names}
    with contextlib.ExitStack() as stack:
        for port in ports.values():
            stack.enter_context(running(serve_words(port, args.dtype), port, ONEBASE_HOME=str(home)))
        found = measure(ports, names, texts, args)
        held = sum(get(port, "/v1/stats")["process"]["rss_bytes"] for port in ports.values())
    port = free_port()
    with running(serve_words(port, args.dtype), port, ONEBASE_HOME=str(home)):
        together = measure(port, names, texts, args)
        one = get(port, "/v1/stats")["process"]["rss_bytes"]
    return found | {"rss_mib": held >> 20, "adapters": EIGHT, "together": together | {"rss_mib": one >> 20}}


def many(base: Any, home: Path, texts: Sequence[str], args: Any) -> dict[str, Any]:
    """Serve ten times as many adapters as fit on the device: how often they are there, and what a load takes."""
    home.mkdir()
    names = make_store(base, home, list(METHODS.values()), 10 * args.adapters)
    held = sum(file.stat().st_size for file in home.rglob("*.safetensors")) / 10
    port = free_port()
    words = [*serve_words(port, args.dtype), "--device-mb", str(max(1, round(held / 2**20)))]
    with running(words, port, ONEBASE_HOME=str(home)):
        found = under_load(port, names, texts, args, 2 * args.seconds)
        tiers = get(port, "/v1/stats")["tiers"]
        loaded = [one["loaded_ms"] for one in get(port, "/v1/adapters")["data"] if one["loaded_ms"] is not None]
    asked = tiers["hits"] + tiers["misses"]
    return found | {
        "adapters": len(names), "device_adapters": tiers["device"]["adapters"],
        "hit_rate": round(tiers["hits"] / asked, 3), "loads": tiers["loads"], "load_failures": tiers["load_failures"],
        "evictions": tiers["evictions"],
        "load_ms": percentiles(loaded),
    }  # fmt: skip


def get(port: int, path: str) -> Any:
    """Return what a path of the server says."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return json.loads(answer.read())


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=[MIXED, *METHODS, *PEERS, PROCESSES, MANY])
    parser.add_argument("--dtype", choices=list(NEAR), default="float32", help="of the base that serves")
    parser.add_argument("--dry", action="store_true", help="write no file")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--peft", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peft:
        peft_server(args.peft, args.port, args.adapters, args.dtype)
        return
    settings = {
        "adapters": args.adapters,
        "seconds": args.seconds,
        "clients": args.clients,
        "tokens": TOKENS,
        "zipf": ZIPF,
        "dtype": args.dtype,
    }
    if args.soak:
        from soak import soak

        result = {"soak": soak(args.soak, min(args.adapters, 12))}
    else:
        result = {"settings": settings, "methods": METHODS, "cases": run(args)}
        if args.dtype != "float32":
            result = {args.dtype: result}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "threads": os.environ.get("OMP_NUM_THREADS")}  # fmt: skip
    print(json.dumps(result, indent=2))
    if not args.dry:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        own, before = (r if args.dtype == "float32" else r.get(args.dtype, {}) for r in (result, kept))
        if "cases" in own and args.only:  # the others stay as they were
            own["cases"] = before.get("cases", {}) | own["cases"]
        RESULTS.write_text(json.dumps(kept | {"machine": machine} | result, indent=2) + "\n")
    if args.soak and (result["soak"]["wrong"] or result["soak"]["failed"]):
        raise SystemExit("answers were wrong or requests failed")


if __name__ == "__main__":
    main()
