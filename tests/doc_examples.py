"""Examples of the documentation: found in the pages, and run as a reader would run them.

A fence of ``python`` or ``bash`` is an example. Comments above it say how it is run:

    <!-- slow -->              with the slow tests
    <!-- needs: torchao -->    where this module is installed
    <!-- server -->            in the background, until the page is over
    <!-- not run: reason -->   never
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash")
FENCE = re.compile(
    r"^(?P<marks>(?:<!-- [^\n]+ -->\n)*)```(?P<language>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
INCLUDE = re.compile(r"^```(?P<language>\{include\} [^\n]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (slow|server|needs|not run)(?:: (.+))? -->")
SHELL = set("|<>;&$`")  # words that hold one of these outside quotes are the shell's business
SECONDS = 1800  # of one command that is run in a shell, on a machine that does other things too


@dataclass(frozen=True)
class Example:
    """One fence.

    Attributes:
        page: path from the root.
        line: of the fence, from 1.
        language: python, bash, or another.
        body: the text.
        marks: name -> what stands behind the colon, '' where nothing does.
    """

    page: str
    line: int
    language: str
    body: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        """Where it is: page:line."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is an example that is run at all."""
        return self.language in LANGUAGES and "not run" not in self.marks

    @property
    def slow(self) -> bool:
        """Whether it is run with the slow tests only."""
        return "slow" in self.marks or "server" in self.marks

    @property
    def missing(self) -> str:
        """The module that it needs and that is not installed, or ''."""
        from importlib.util import find_spec

        needed = self.marks.get("needs", "")
        return needed if needed and find_spec(needed) is None else ""


def included(page: Path, fence: re.Match[str]) -> str:
    """Return the text that an include of a page stands for."""
    text = (page.parent / fence["language"].partition(" ")[2]).read_text(encoding="utf-8")
    for key, value in re.findall(r'^:(start-after|end-before): "(.*)"$', fence["body"], re.MULTILINE):
        before, found, after = text.partition(value.replace("\\n", "\n"))
        assert found, f"{page}: {key} is not in the text"
        text = after if key == "start-after" else before
    return text


def text_of(page: Path) -> str:
    """Return a page with what it includes."""
    return INCLUDE.sub(lambda fence: included(page, fence), page.read_text(encoding="utf-8"))


def examples(page: Path) -> list[Example]:
    """Return every fence of a page, in order; those that it includes have the lines of the whole text."""
    text = text_of(page)
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + fence["marks"].count("\n") + 1
        marks = {mark[1]: mark[2] or "" for mark in MARK.finditer(fence["marks"])}
        found.append(Example(str(page.relative_to(ROOT)), line, fence["language"], fence["body"], marks))
    return found


def commands(body: str) -> Iterator[str]:
    """Yield the commands of a bash example: one per line, with continued lines joined and comments left out."""
    for line in body.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def words_of(command: str) -> list[str] | None:
    """Return the arguments of a call of onebase, or None where a shell has to read it, or it starts its like."""
    words = shlex.split(command, comments=True)
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition(" #")[0])
    plain = words[:1] == ["onebase"] and "--processes" not in words and not SHELL & set(bare)
    return words[1:] if plain else None


class Reader:
    """Runs the examples of one page in a folder, in order; Python examples share their names."""

    def __init__(self, folder: Path, home: Path):
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        source = str(ROOT / "src")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = {
            **os.environ, "ONEBASE_HOME": str(home), "PATH": path, "PYTHONPATH": source, "PIP_NO_INDEX": "1",
        }  # fmt: skip
        self.servers: list[subprocess.Popen[bytes]] = []

    def run(self, example: Example) -> None:
        """Run an example; raises AssertionError with its place where it fails."""
        if example.language == "python":
            exec(compile(example.body, example.place, "exec", dont_inherit=True), self.names)
            return
        for command in commands(example.body):
            if "server" in example.marks:
                self._serve(command)
            elif (words := words_of(command)) is not None:
                self._call(words, example.place)
            elif not command.startswith("pip install"):  # what it installs is there, or `needs` says that it is not
                self._shell(command, example.place)

    def _call(self, words: list[str], place: str) -> None:
        """Call the program in this process, which has torch loaded already."""
        from typer.testing import CliRunner

        from onebase.cli.main import app

        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{place}: onebase {shlex.join(words)}: code {done.exit_code}\n{done.output}"

    def _shell(self, command: str, place: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=self.environment, timeout=SECONDS,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{place}: {command}\n{done.stdout}\n{done.stderr}"
        assert '"error":' not in done.stdout, f"{place}: {command}\n{done.stdout}"  # of a server

    def _serve(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        port = words[words.index("--port") + 1]
        program = [sys.executable, "-m", *words]
        self.servers.append(subprocess.Popen(program, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL))
        for _ in range(SECONDS):
            assert self.servers[-1].poll() is None, f"{command}: ended with {self.servers[-1].returncode}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        raise AssertionError(f"{command}: not ready after {SECONDS} s")

    def close(self) -> None:
        """Stop what was started."""
        for server in self.servers:
            server.terminate()
            server.wait(60)
