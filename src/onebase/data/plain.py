"""Plain text cut into paragraphs or lines, and CoNLL files of a word and its tags per line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from onebase.data.delimited import LONGEST_FIELD
from onebase.data.splits import FEWEST_ROWS
from onebase.data.table import Opened, Records
from onebase.data.texts import opened_text
from onebase.errors import DataError

CONLL = (".conll", ".conllu", ".bio", ".iob", ".iob2")


def open_text(path: Path, encoding: str | None) -> Opened:
    """Open plain text, in entries that joined by newlines are the file again, blank lines and line ends included.

    Entries are the paragraphs between blank lines; where a file has too few of those to be cut into splits (one
    paragraph per line, with a blank line here and there), they are its lines.

    Raises:
        DataError: nothing but white space, or text that cannot be decoded; also while it is read.
    """
    paragraphs = 0
    for _, entry in _entries(path, encoding, by_line=False):
        paragraphs += bool(entry.strip())
        if paragraphs >= FEWEST_ROWS:
            break
    if not paragraphs:
        raise DataError(f"{path.name}: the file is empty. Expected text; check the export and try again.")
    by_line = paragraphs < FEWEST_ROWS

    def records(skipped: Counter[str]) -> Records:
        for place, entry in _entries(path, encoding, by_line):
            yield place, {"text": entry}

    return Opened(path.name, records, running=True)


def _entries(path: Path, encoding: str | None, by_line: bool) -> Iterator[tuple[int, str]]:
    """Yield (first line, entry). Blank lines stay at the end of the entry before them, leading ones at the start."""
    with opened_text(path, encoding) as stream:
        group: list[str] = []
        place, open_group, holds = 1, False, False
        for number, line in enumerate(_newline_lines(stream.read, path.name), 1):
            blank = not line.strip()
            if group and not (blank or open_group):
                yield place, "\n".join(group)
                group, place, holds = [], number, False
            group.append(line)
            holds = holds or not blank
            open_group = not holds or not (blank or by_line)
        yield place, "\n".join(group)


def _newline_lines(read: Callable[[int], str], name: str) -> Iterator[str]:
    """Yield what stands between newlines; carriage returns stay in the text."""
    rest = ""
    while part := read(1 << 16):
        first, *others = part.split("\n")
        rest += first
        if others:
            yield rest
            yield from others[:-1]
            rest = others[-1]
        if len(rest) > LONGEST_FIELD:
            raise DataError(f"{name}: a line of more than {LONGEST_FIELD // 2**20} million characters. Break it up.")
    yield rest


def open_conll(path: Path, encoding: str | None) -> Opened:
    """Open a file with a word per line, its tag in the last column, and a blank line after each sentence.

    Lines that start with ``-DOCSTART-`` or ``# `` (CoNLL-U's comments) hold no word. Columns are split at tabs where a
    line has one, at white space otherwise.

    Raises:
        DataError: a line without a tag, or with more or fewer columns than the first; also while it is read.
    """

    def records(skipped: Counter[str]) -> Records:
        with opened_text(path, encoding) as stream:
            yield from _sentences(_newline_lines(stream.read, path.name), path.name, skipped)

    return Opened(path.name, records, columns=("tokens", "tags"))


def _sentences(lines: Iterator[str], name: str, skipped: Counter[str]) -> Records:
    words: list[str] = []
    tags: list[str] = []
    width, first = 0, 1
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if line.startswith(("-DOCSTART-", "# ")) and not words:
            skipped["lines of comments or document marks hold no word"] += 1
        elif not line.strip():
            if words:
                yield first, {"tokens": words, "tags": tags}
            words, tags = [], []
        else:
            parts = line.split("\t") if "\t" in line else line.split()
            width = width or len(parts)
            if len(parts) < 2 or len(parts) != width:
                raise DataError(
                    f"{name}: line {number}: {len(parts)} columns in {line[:40]!r}; expected {max(width, 2)}: a word, "
                    "its tag last, and a blank line between sentences."
                )
            first = first if words else number
            words.append(parts[0])
            tags.append(parts[-1])
    if words:
        yield first, {"tokens": words, "tags": tags}
