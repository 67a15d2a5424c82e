"""Tags that mark entities: what BIO and its kin look like, and which tags are of one type."""

from __future__ import annotations

import re
from collections.abc import Iterable

OUTSIDE = "O"
ENTITY_TAG = re.compile(r"([BIESLU])-(.+)", re.DOTALL)  # prefixes of BIO, BIOES and BILOU


def is_bio(tags: Iterable[str]) -> bool:
    """Say whether tags mark entities: each is O or has a prefix of BIO, BIOES or BILOU, and some have one."""
    distinct = set(tags)
    return all(tag == OUTSIDE or ENTITY_TAG.fullmatch(tag) for tag in distinct) and not distinct <= {OUTSIDE}


def entity_type(tag: str) -> str:
    """Return the type of an entity's tag; any other tag is its own type."""
    match = ENTITY_TAG.fullmatch(tag)
    return match[2] if match else tag
