"""The site builds without a warning and leads nowhere else; what it generates is what the code says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onebase.cli.main import app
from onebase.loading import embedded_folder
from onebase.methods import all_methods, method_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
pytest.importorskip("sphinx", reason="the site needs: pip install 'onebase[docs]'")
BUILT_IN_PAGES = {path.stem for path in (DOCS / "methods").glob("*.md")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built as `scripts/test` builds them."""
    if embedded_folder() is None:
        pytest.skip("the embedded base is not installed: pip install 'onebase[demo]'")
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(out / "trees"),
        str(DOCS),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_no_page_loads_or_links_anything_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = re.findall(r"""(?:src|href|action)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)""", page.read_text("utf-8"))
        assert not found, f"{page.name}: {found}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_no_mark_is_left(site):
    for page in site.rglob("*.html"):
        assert "<!-- generate:" not in page.read_text("utf-8"), page  # in code it is written with &lt;


def test_every_public_name_and_command_is_on_the_site(site):
    import onebase
    from onebase import extend

    python, cli = (site / "python.html").read_text("utf-8"), (site / "cli.html").read_text("utf-8")
    for name in [n for n in onebase.__all__ if n not in ("errors", "extend")]:
        assert f'id="onebase.{name}"' in python, name
    for name in [n for n in extend.__all__ if n not in onebase.__all__]:
        assert f'id="onebase.extend.{name}"' in python, name
    for command in app.registered_commands:
        assert f'id="onebase-{command.name}"' in cli, command.name


def test_every_setting_is_on_its_method_page(site):
    import dataclasses

    for name in BUILT_IN_PAGES:
        text = (site / "methods" / f"{name}.html").read_text("utf-8")
        for field in dataclasses.fields(all_methods()[name]):
            assert f">{field.name}</span>" in text, f"{name}.{field.name}"


def test_every_method_has_a_page():
    from onebase.methods.registry import BUILT_IN

    assert BUILT_IN_PAGES == set(BUILT_IN) <= set(method_names())
    for name in BUILT_IN_PAGES:
        assert f"<!-- generate: method {name} -->" in (DOCS / "methods" / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("name", sorted(c.name or "" for c in app.registered_commands))
def test_the_reference_has_the_options_that_the_program_takes(name):
    """Compared with the commands that typer makes of the same declarations in its own way."""
    import typer
    from onebase_docs.cli import commands, option_names

    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    taken = {o for p in command.params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}
    assert option_names(commands()[name]) == taken | {"--help", "-h"}


def test_results_are_those_of_the_files():
    """No figure on a method's page comes from anywhere but benchmarks/results."""
    from onebase_docs import results

    shown = results.of_method("lora")
    runs = [r for r in results.lines("tasks.jsonl") if r["method"] == "lora"]
    assert runs and all(f"| {r['base']:.4f} | {r['value']:.4f} |" in shown for r in runs)
    over = json.loads((results.FOLDER / "forward.json").read_text())["bank"]["lora"]["over_base"]["median"]
    assert f"{100 * (over - 1):+.1f} %" in shown
    assert results.of_method("nothing of this name") == results.NOTHING
    rate = {run["lr"] for run in results.full_runs("cr")}
    assert len(rate) == 1  # one rate for all seeds: the one that validation chose


def test_figures_are_as_the_code_draws_them():
    from onebase_docs.figures import FIGURES, FOLDER

    for name, draw in FIGURES.items():
        assert (FOLDER / f"{name}.svg").read_text("utf-8") == draw().svg(), (
            f"run: python docs/onebase_docs/figures.py ({name})"
        )
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(FIGURES)


def test_plain_text_stays_as_it_is_written():
    from onebase_docs.text import cell, code, escaped

    assert escaped("a_b * <c> [d] |e|") == r"a\_b \* \<c\> \[d\] \|e\|"
    assert escaped("see `x_y` and ``z``") == "see `x_y` and `z`"
    assert code("a|b") == "`a\\|b`" and cell("one\n  two") == "one two"
