"""An environment with `adapters` and transformers 4, which borrows torch and accelerate from this one."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGES = ("adapters>=1.2", "scikit-learn")
BORROWED = ("torch", "accelerate")  # torch is large; accelerate would install another one


def make_environment(folder: Path) -> str:
    """Return the Python of an environment in `folder`, which is made where it is missing."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        borrow(Path(site))
        (folder / "ready").touch()
    return str(python)


def borrow(site: Path) -> None:
    """Link torch, accelerate and what they need into another environment, as far as it has none of its own."""
    for name in sorted(_needed()):
        found = distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            source, target = Path(str(found.locate_file(top))), site / top
            if source.exists() and not target.exists():
                target.symlink_to(source)


def _needed() -> set[str]:
    found: set[str] = set()
    waiting = list(BORROWED)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or ()
        except PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        waiting += [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in requires if "extra ==" not in text]
    return found
