"""The direction of imports: a lower layer never imports a higher one; and what importing onebase costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "onebase"
LAYERS = [
    {"clusters", "errors", "devices", "processes"},
    {"core"},
    {"anatomy"},
    {"methods"},
    {"heads", "adapter", "extend", "encode", "pictures", "statistics"},
    {"store", "data", "tasks"},
    {
        "base",
        "build",
        "compose",
        "exchange",
        "merging",
        "image_init",
        "bound",
        "as_model",
        "filling",
        "generation",
        "decoding",
        "rebuild",
        "storing",
        "loading",
        "quantization",
        "words",
    },
    {"training", "evaluation", "examples"},
    {"demo", "support", "comparison"},
    {"serve"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part_of(path: Path) -> str:
    """Return the top-level part of onebase that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the parts of onebase that a file imports at run time (imports for type checkers do not count)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onebase"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("onebase.")}
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_back_edges(path: Path) -> None:
    own = part_of(path)
    assert own in LEVEL, f"{own} has no place in the layers"
    # base.py reaches the modules of its own layer from inside functions
    for other in imports(path) & LEVEL.keys():
        assert LEVEL[other] <= LEVEL[own], f"{path.relative_to(SOURCE)} ({own}) imports {other}, which is above it"


def loaded_after(code: str) -> set[str]:
    """Return the heavy modules that are loaded after running `code` in a fresh interpreter."""
    heavy = "{'torch', 'transformers', 'pandas', 'sklearn', 'scipy', 'datasets'}"
    script = f"import sys\n{code}\nprint(*sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.split())


@pytest.mark.parametrize(
    "code",
    [
        "import onebase; dir(onebase); onebase.__version__",
        "import onebase; onebase.Store; onebase.errors; onebase.load_data",
        "from onebase.methods.registry import method_names; assert 'lora' in method_names()",
        "from onebase.statistics import PairedTest",
    ],
)
def test_nothing_heavy_before_it_is_used(code: str) -> None:
    assert loaded_after(code) == set()
