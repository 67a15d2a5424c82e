"""Which column plays which role: the names people use, and what to say when that is not clear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onebase.data.kinds import KINDS, ROLES, TARGETS
from onebase.data.signatures import fitting_kinds
from onebase.data.table import Table
from onebase.errors import ConfigError, DataError, unknown

NO_CONTENT = {"", "id", "idx", "index", "guid", "uuid", "unnamed: 0"}
Columns = dict[str, tuple[str, ...]]
"""role -> its column; several where a kind has one column per class"""


def find_columns(
    table: Table, asked: Mapping[str, Sequence[str]], task: str | None, apart: Sequence[str] = ()
) -> tuple[str, Columns]:
    """Decide the kind of data and which column plays which role.

    Args:
        table: the rows, or the first of them, normally of the train split.
        asked: role -> columns named by the person.
        task: the kind named by the person, None where it follows from the columns.
        apart: columns that play no role, such as that of the groups.

    Returns:
        The kind, and role -> columns. A kind of "classification" may turn out to be "regression" once the labels are
        read (see `onebase.data.rows.are_scores`).

    Raises:
        UnknownNameError: a named column does not exist.
        ConfigError: a named role has no meaning for this kind.
        DataError: a needed column is missing, or several could be meant.
    """
    given = {role: tuple(_existing(table, role, name) for name in names) for role, names in asked.items()}
    _refuse_one_for_two(table, given)
    kind = task or _kind_of(table, given)
    if kind == "embeddings" and _have_scores(table, given):
        kind = "similarity"
    roles = _roles_of(table, kind, given, apart)
    if "label" in given and "label" not in roles:  # the option --label names the target of every kind of labels
        target = next((role for role in TARGETS if role in roles), None)
        if target is not None and target not in given:
            given[target] = given.pop("label")
    _refuse_strays(table, given, roles + (("answer_start",) if kind == "qa" else ()), kind)
    found = dict(given)
    spare = set(apart)
    # Targets first: a name such as "target" or "tags" that fits two roles is rarely the text.
    for role in sorted(roles, key=lambda role: (ROLES[role].form == "text", role in KINDS[kind].optional, role)):
        if role not in found and (name := by_name(table, role, _taken(found) | spare)):
            found[role] = (name,)
    if kind == "classification":
        _by_content(table, found, spare)
    elif kind == "multilabel" and "labels" not in found:
        found["labels"] = tuple(_indicators(table, _taken(found) | spare))
    elif len(roles) == 1 and not found and len(rest := _rest(table, spare)) == 1:
        found[roles[0]] = (rest[0],)
    if kind == "qa" and "answer_start" not in found and (start := by_name(table, "answer_start", _taken(found))):
        found["answer_start"] = (start,)
    for role in roles:
        if not found.get(role) and role not in KINDS[kind].optional:
            raise _missing(table, role, kind)
    kept = roles + (("answer_start",) if kind == "qa" else ())
    return kind, {role: found[role] for role in kept if role in found}


def match_column(table: Table, name: str) -> str | None:
    """Find the column written exactly like `name`, else the only one that differs in case or outer spaces."""
    if name in table.cells:
        return name
    same = [column for column in table.cells if plain(column) == plain(name)]
    return same[0] if len(same) == 1 else None


def by_name(table: Table, role: str, taken: Iterable[str] = ()) -> str | None:
    """Return the column whose name says it plays this role, None where no name does.

    Raises:
        DataError: several could.
    """
    matches = matching(table.cells, role, taken)
    if len(matches) > 1:
        columns = ", ".join(repr(column) for column in table.cells)
        shown = " or ".join(repr(column) for column in matches)
        raise DataError(
            f"{table.name}: {shown} could be the {role} column. Say which with {option(role)}; all columns: {columns}."
        )
    return matches[0] if matches else None


def matching(columns: Iterable[str], role: str, taken: Iterable[str] = ()) -> list[str]:
    """Return the columns whose names fit a role: the one with its first name, else all with another of its names."""
    free = [column for column in columns if column not in taken]
    winners = [column for column in free if plain(column) == ROLES[role].first]
    return winners or [column for column in free if plain(column) in ROLES[role].names.split()]


def plain(column: str) -> str:
    """Return a column name without what people vary."""
    return column.strip().casefold()


def option(role: str) -> str:
    """Return how a role's column is named on the command line."""
    if role in ("text", "text_pair", "label", "prompt", "completion"):
        return "--" + role.replace("_", "-")
    return f"--column {role}=NAME"


def _existing(table: Table, role: str, name: str) -> str:
    column = match_column(table, name)
    if column is None:
        raise unknown(f"column for {option(role)} in {table.name}:", name, table.cells)
    return column


def _kind_of(table: Table, given: Mapping[str, Sequence[str]]) -> str:
    kinds = fitting_kinds(table, given)
    if len(kinds) > 1:
        shown = ", ".join(map(repr, table.cells))
        count = "two" if len(kinds) == 2 else f"{len(kinds)}"
        raise DataError(
            f"{table.name}: the columns {shown} fit {count} tasks: {' and '.join(kinds)}. Pass the one that you mean: "
            f"{', or '.join('--task ' + kind for kind in kinds)}."
        )
    return kinds[0]


def _have_scores(table: Table, given: Mapping[str, Sequence[str]]) -> bool:
    """Say whether texts for embeddings are pairs with a score, rather than anchors with positives."""
    triplet = ("anchor", "positive", "negative")
    if set(triplet) & set(given) or {"anchor", "positive"} & {plain(column) for column in table.cells}:
        return False
    named = {"score" if role == "label" else role for role in given}
    taken = {column for columns in given.values() for column in columns}
    return all(role in named or matching(table.cells, role, taken) for role in KINDS["similarity"].roles)


def _roles_of(table: Table, kind: str, given: Columns, apart: Iterable[str]) -> tuple[str, ...]:
    """Return the roles of a kind, or the others that the person named or that alone have columns."""
    roles, other = KINDS[kind].roles, KINDS[kind].other
    if not other or (named := set(given) - {"label"}) & set(roles):
        return roles
    lacking = any(not matching(table.cells, role, apart) for role in roles)
    return other if named & set(other) or (lacking and all(matching(table.cells, r, apart) for r in other)) else roles


def _by_content(table: Table, found: Columns, spare: set[str]) -> None:
    """Fill in text and label where what remains leaves one reading: prose, and few distinct values."""
    rest = _rest(table, _taken(found) | spare)
    missing = [role for role in ("text", "label") if role not in found]
    if not missing or len(rest) != len(missing):
        return
    if missing == ["text"] and _is_prose(table.cells[rest[0]]):
        found["text"] = (rest[0],)
    elif missing == ["label"] and _is_few(table.cells[rest[0]]):
        found["label"] = (rest[0],)
    elif len(missing) == 2:
        prose = [column for column in rest if _is_prose(table.cells[column])]
        few = [column for column in rest if _is_few(table.cells[column])]
        if len(prose) == 1 and len(few) == 1 and prose != few:
            found |= {"text": (prose[0],), "label": (few[0],)}
    _refuse_lost_header(table, found)


def _refuse_lost_header(table: Table, found: Columns) -> None:
    """Without a header line the first example would be taken for column names and lost."""
    label = found.get("label", ("",))[0]
    if label and label in table.cells[label]:
        raise lost_header(table, label)


def lost_header(table: Table, label: str) -> DataError:
    """Build the error for a file whose first example stands where column names are expected."""
    return DataError(
        f"{table.name}: the first line seems to be an example, not a header: its field {label!r} is also "
        "a value of that column. Add a first line with column names, such as: text,label "
        f"(or pass --label {label!r} if that is its name)."
    )


def _indicators(table: Table, taken: Iterable[str]) -> list[str]:
    """Return the columns of zeros and ones: one per class."""
    return [column for column in _rest(table, set(taken)) if set(map(str, table.cells[column])) <= {"0", "1"}]


def _is_few(values: Sequence[object]) -> bool:
    """Say whether each distinct value stands on two rows on average, as labels do."""
    return 2 * len({str(value) for value in values}) <= len(values)


def _is_prose(values: Sequence[object]) -> bool:
    """Say whether most values differ and most hold several words."""
    worded = sum(len(value.split()) > 1 for value in values if isinstance(value, str))
    return not _is_few(values) and 2 * worded > len(values)


def _rest(table: Table, taken: set[str]) -> list[str]:
    return [c for c in table.cells if c not in taken and plain(c) not in NO_CONTENT]


def _taken(found: Columns) -> set[str]:
    return {column for columns in found.values() for column in columns}


def _refuse_one_for_two(table: Table, given: Columns) -> None:
    for role, columns in given.items():
        others = [other for other in given if other != role and set(given[other]) & set(columns)]
        if others:
            raise ConfigError(
                f"{table.name}: column {columns[0]!r} is named for both {option(role)} and "
                f"{option(others[0])}. Name a different column for each."
            )
        if len(columns) > 1 and role not in ("labels", "label"):
            raise ConfigError(
                f"{table.name}: {role} is one column, but {len(columns)} are named: {', '.join(columns)}."
            )


def _refuse_strays(table: Table, given: Columns, roles: Sequence[str], kind: str) -> None:
    if stray := [role for role in given if role not in roles]:
        raise ConfigError(
            f"{table.name}: the option {option(stray[0])} ({', '.join(given[stray[0]])!r}) has no meaning for "
            f"{kind} data, which uses {', '.join(map(option, roles))}. Leave it out, or pass another task."
        )


def _missing(table: Table, role: str, kind: str) -> DataError:
    columns = ", ".join(repr(column) for column in table.cells)
    unlabelled = f" All {len(table)} rows are unlabelled." if role == "label" else ""
    way_out = " To train a language model on the text alone pass --task causal-lm." if role == "label" else ""
    header = ""
    if any(len(column) > 60 or len(column.split()) > 6 for column in table.cells):
        header = " The first line looks like an example: add a line of column names before it, such as: text,label."
    return DataError(
        f"{table.name}: no column found for the {role} of {kind} data.{unlabelled} Columns: {columns[:500]}.{header} "
        f"Say which one to use with {option(role)}{'' if '=' in option(role) else ' NAME'}.{way_out}"
    )
