"""docs/support.md: a table of families and methods, with the reasons against in a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onebase.support.trial import YES, Trial

HEAD = """# Support

Which model families of transformers {version} carry which methods. Written by `python -m onebase.support`: every class
is built tiny and random, and every method is tried. *yes* means that a fresh adapter leaves the base's answers as they
are (where the method starts there), that a moved one shows, and that each row of one mixed batch equals that row alone
to 1e-4. A number is a reason in the list below: adding the adapter raises with it. *Row* families have a written
anatomy; the others are discovered in the loaded model, and what cannot be proven there is refused. *Unpadded* families
answer differently to padded rows on that side, so such a batch raises.

"""


def render(trials: Iterable[Trial], methods: Sequence[str], version: str) -> str:
    """Return the page.

    Args:
        trials: one per model type.
        methods: names of the columns.
        version: of transformers.
    """
    found = sorted(trials, key=lambda t: t.model_type)
    carried = [t for t in found if t.source]
    reasons = sorted({why for t in carried for why in t.methods.values() if why != YES})
    numbers = {why: str(i + 1) for i, why in enumerate(reasons)}
    lines = [f"| family | anatomy | {' | '.join(methods)} | unpadded |", "|---" * (len(methods) + 3) + "|"]
    for t in carried:
        cells = [YES if t.methods[m] == YES else f"[{numbers[t.methods[m]]}]" for m in methods]
        lines.append(f"| {t.model_type} | {t.source} | {' | '.join(cells)} | {', '.join(t.padding)} |")
    full = sum(all(why == YES for why in t.methods.values()) for t in carried)
    text = HEAD.format(version=version)
    text += f"{len(found)} families: {len(carried)} carry adapters, {full} of them every method.\n\n"
    text += "\n".join(lines) + "\n\n## Reasons\n\n"
    text += "".join(f"{i}. {why}\n" for why, i in numbers.items())
    text += "\n## Families without adapters\n\n"
    return text + "".join(f"- {t.model_type}: {t.reason}\n" for t in found if not t.source)


def read(text: str) -> dict[str, dict[str, str]]:
    """Read a page back: family -> anatomy, padding and one entry per method, with reasons in place of numbers."""
    lines = text.splitlines()
    reasons = {line.split(". ", 1)[0]: line.split(". ", 1)[1] for line in lines if line[:1].isdigit() and ". " in line}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    if not rows:
        return {}
    head, *body = rows
    return {
        row[0]: {name: reasons[cell[1:-1]] if cell.startswith("[") else cell for name, cell in zip(head[1:], row[1:])}
        for row in body
    }
