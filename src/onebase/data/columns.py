"""Which column plays which role: the names people use, and what to say when that is not clear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onebase.data.files import Table
from onebase.data.rows import Kind
from onebase.errors import ConfigError, DataError, unknown

# Per role: the name that wins outright, then names (English, French) that must be the only one of theirs.
_NAMES: dict[str, tuple[str, str]] = {
    "text": (
        "text",
        "sentence review content comment body question utterance query message tweet document passage "
        "description review_text sentence1 premise question1 text1 text_a input texts abstract article "
        "texte avis commentaire phrase contenu critique verbatim corps prémisse premisse phrase1 texte1",
    ),
    "text_pair": (
        "text_pair",
        "sentence2 hypothesis question2 text2 text_b phrase2 texte2 hypothèse hypothese",
    ),
    "label": (
        "label",
        "labels class category sentiment target intent topic rating polarity gold emotion score label_text "
        "label_name stars "
        "étiquette etiquette catégorie categorie classe cible thème theme intention note polarité polarite "
        "libellé libelle",
    ),
    "prompt": ("prompt", "instruction input source question query consigne invite entrée"),
    "completion": ("completion", "response output answer target reply réponse reponse sortie cible"),
    "source": ("source", "src article document dialogue input text texte"),
    "target": ("target", "tgt summary highlights translation output résumé cible"),
    "messages": ("messages", "conversations conversation chat dialog"),
    "anchor": ("anchor", "query question sentence1"),
    "positive": ("positive", "pos answer sentence2"),
    "negative": ("negative", "neg hard_negative"),
    "score": ("score", "label similarity similarity_score rating value target stars note similarité valeur"),
}
# Kind -> the roles of its rows.
ROLES: dict[Kind, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "label"),
    "causal-lm": ("text",),
    "completion": ("prompt", "completion"),
    "seq2seq": ("source", "target"),
    "chat": ("messages",),
    "embeddings": ("anchor", "positive", "negative"),
    "similarity": ("text", "text_pair", "score"),
}
ROLE_NAMES = tuple(dict.fromkeys(role for roles in ROLES.values() for role in roles))
_OPTIONAL = {("classification", "text_pair"), ("embeddings", "negative")}
# Roles that only one kind has.
_OWN_ROLES: dict[str, Kind] = {
    "source": "seq2seq",
    "target": "seq2seq",
    "messages": "chat",
    "anchor": "embeddings",
    "positive": "embeddings",
    "negative": "embeddings",
    "score": "similarity",
}
# Columns that tell the kind, under names that nothing else is called.
_TELLING: dict[str, Kind] = {"messages": "chat", "conversations": "chat", "anchor": "embeddings"}
# Where nobody said what the task is, only these names mean "complete the prompt"; "question" may be a text.
_PLAINLY_COMPLETION = {"prompt", "instruction"}
_NO_CONTENT = {"", "id", "idx", "index", "guid", "uuid", "unnamed: 0"}


def find_columns(table: Table, asked: Mapping[str, str | None], task: Kind | None) -> tuple[Kind, dict[str, str]]:
    """Decide the kind of data and which column plays which role.

    Args:
        table: the rows, normally of the train split.
        asked: role -> column named by the person, None where not named.
        task: the kind named by the person, None where it follows from the columns.

    Returns:
        The kind, and role -> column for text (and text_pair, label), or for prompt and completion.

    Raises:
        UnknownNameError: a named column does not exist.
        ConfigError: a named role has no meaning for this kind.
        DataError: a needed column is missing, or several could be meant.
    """
    given = {role: _existing(table, role, name) for role, name in asked.items() if name is not None}
    kind = task or _kind_of(table, given)
    if kind == "embeddings" and _scored(table, given):
        kind = "similarity"
    roles = ROLES[kind]
    if stray := [role for role in given if role not in roles]:
        raise ConfigError(
            f"{table.name}: the option {_option(stray[0])} ({given[stray[0]]!r}) has no meaning for "
            f"{kind} data, which uses {', '.join(map(_option, roles))}. Leave it out, or pass another task."
        )
    _refuse_one_for_two(table, given)
    found = dict(given)
    for role in ("label", "score", "text_pair", "text", "prompt", "completion", *ROLES["seq2seq"], *ROLES["chat"],
                 *ROLES["embeddings"]):  # fmt: skip
        if role in roles and role not in found and (name := _by_name(table, role, found)):
            found[role] = name
    if kind == "classification":
        _by_content(table, found)
    elif kind == "causal-lm" and "text" not in found and len(rest := _rest(table, found)) == 1:
        found["text"] = rest[0]
    for role in roles:
        if role not in found and (kind, role) not in _OPTIONAL:
            raise _cannot_tell(table, role, list(table.cells), kind)
    return kind, {role: found[role] for role in roles if role in found}


def match_column(table: Table, name: str) -> str | None:
    """Find the column written exactly like `name`, else the only one that differs in case or outer spaces."""
    if name in table.cells:
        return name
    same = [column for column in table.cells if _plain(column) == _plain(name)]
    return same[0] if len(same) == 1 else None


def _existing(table: Table, role: str, name: str) -> str:
    column = match_column(table, name)
    if column is None:
        raise unknown(f"column for {_option(role)} in {table.name}:", name, table.cells)
    return column


def _kind_of(table: Table, given: Mapping[str, str]) -> Kind:
    for role, own in _OWN_ROLES.items():
        if role in given:
            return own
    if given.keys() & {"text", "text_pair", "label"}:
        return "classification"
    if given.keys() & {"prompt", "completion"}:
        return "completion"
    plain = {_plain(column) for column in table.cells}
    for column, own in _TELLING.items():
        if column in plain:
            return own
    if plain & _PLAINLY_COMPLETION and _matches(table, "completion", {}):
        if _NAMES["label"][0] in plain:
            raise DataError(
                f"{table.name}: the columns {', '.join(map(repr, table.cells))} fit two tasks. Pass --task "
                "completion, or --task classification with --text and --label."
            )
        return "completion"
    return "classification"


def _scored(table: Table, given: Mapping[str, str]) -> bool:
    """Say whether rows for embeddings are pairs with a similarity, rather than anchors with what belongs to them."""
    if given.keys() & {"anchor", "positive", "negative"}:
        return False
    names = {_plain(column) for column in table.cells}
    return bool(given.keys() & {"text_pair", "score"}) or (
        "anchor" not in names and "positive" not in names and bool(_matches(table, "score", {}))
        and bool(_matches(table, "text_pair", {}))
    )  # fmt: skip


def _by_name(table: Table, role: str, found: Mapping[str, str]) -> str | None:
    """Return the column whose name says it plays this role, None where no name does."""
    matches = _matches(table, role, found)
    if len(matches) > 1:
        raise _cannot_tell(table, role, matches)
    return matches[0] if matches else None


def _matches(table: Table, role: str, found: Mapping[str, str]) -> list[str]:
    first, others = _NAMES[role]
    free = [column for column in table.cells if column not in found.values()]
    winners = [column for column in free if _plain(column) == first]
    return winners or [column for column in free if _plain(column) in others.split()]


def _by_content(table: Table, found: dict[str, str]) -> None:
    """Fill in text and label where what remains leaves one reading: prose, and few distinct values."""
    rest = _rest(table, found)
    missing = [role for role in ("text", "label") if role not in found]
    if not missing or len(rest) != len(missing):
        return
    if missing == ["text"] and _is_prose(table.cells[rest[0]]):
        found["text"] = rest[0]
    elif missing == ["label"] and _is_few(table.cells[rest[0]]):
        found["label"] = rest[0]
    elif len(missing) == 2:
        prose = [column for column in rest if _is_prose(table.cells[column])]
        few = [column for column in rest if _is_few(table.cells[column])]
        if len(prose) == 1 and len(few) == 1 and prose != few:
            found |= {"text": prose[0], "label": few[0]}
    _refuse_lost_header(table, found)


def _refuse_lost_header(table: Table, found: Mapping[str, str]) -> None:
    """Without a header line the first example would be taken for column names and lost."""
    label = found.get("label")
    if label is not None and label in table.cells[label]:
        raise DataError(
            f"{table.name}: the first line seems to be an example, not a header: its field {label!r} is also "
            "a value of that column. Add a first line with column names, such as: text,label "
            f"(or pass --label {label!r} if that is its name)."
        )


def _is_few(values: Sequence[object]) -> bool:
    """Say whether each distinct value stands on two rows on average, as labels do."""
    return 2 * len({str(value) for value in values}) <= len(values)


def _is_prose(values: Sequence[object]) -> bool:
    """Say whether most values differ and most hold several words."""
    worded = sum(len(value.split()) > 1 for value in values if isinstance(value, str))
    return not _is_few(values) and 2 * worded > len(values)


def _rest(table: Table, found: Mapping[str, str]) -> list[str]:
    return [c for c in table.cells if c not in found.values() and _plain(c) not in _NO_CONTENT]


def _plain(column: str) -> str:
    return column.strip().casefold()


def _option(role: str) -> str:
    return "--" + role.replace("_", "-")


def _refuse_one_for_two(table: Table, given: Mapping[str, str]) -> None:
    for role, column in given.items():
        others = [other for other in given if other != role and given[other] == column]
        if others:
            raise ConfigError(
                f"{table.name}: column {column!r} is named for both {_option(role)} and "
                f"{_option(others[0])}. Name a different column for each."
            )


def _cannot_tell(table: Table, role: str, candidates: Iterable[str], kind: str | None = None) -> DataError:
    columns = ", ".join(repr(column) for column in table.cells)
    if kind is None:
        shown = " or ".join(repr(column) for column in candidates)
        return DataError(
            f"{table.name}: {shown} could be the {role} column. Say which with {_option(role)}; all columns: {columns}."
        )
    unlabelled = f" All {len(table)} rows are unlabelled." if role == "label" else ""
    way_out = " To train a language model on the text alone pass --task causal-lm." if role == "label" else ""
    return DataError(
        f"{table.name}: no column found for the {role} of {kind} data.{unlabelled} Columns: {columns}. "
        f"Say which one to use with {_option(role)} NAME.{way_out}"
    )
