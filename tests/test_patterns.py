"""Regular expressions of files: what people write is taken, what could take for ever is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.core.patterns import safe_pattern
from onebase.errors import ConfigError

GOOD = [
    r".*attention\.self\.(query|key)", r".*\.(q|k)_proj", r"^encoder/0/attention/q$", r"(.*\.)?(layer\.0\..*)$",
    r"model\.layers\.([0-9]|1[0-5])\.(self_attn|mlp)\..*", r"[^]*+]x", r"a\*\+", r"(?:a|b){2,3}", "",
    r".*\.(" + "|".join(f"layers\\.{i}\\.q_proj" for i in range(500)) + ")",
]  # fmt: skip
BAD = {
    r"(a+)+$": "repeats something that repeats", r"((.*x)*y)*": "repeats", r"(.*)*": "repeats",
    r"(a|b*){2,}c": "repeats", r"([a-z]+)*!": "repeats", r".*.*.*.*.*.*.*x": "7 unlimited",
    r"(a)\1": "refers back", "(": "no regular expression",
    "a" * 100_001: "100001 characters",
}  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_what_people_write_is_taken(text: str) -> None:
    assert safe_pattern(text).pattern == text


@pytest.mark.parametrize("text", BAD)
def test_what_could_take_for_ever_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=BAD[text]):
        safe_pattern(text)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of sets in sets, which a later Python may read otherwise
@given(st.text(alphabet="ab.*+?(){},[]^|\\12-", max_size=24))
def test_whatever_is_taken_is_quick(text: str) -> None:
    """No expression that passes takes longer than a moment on a name that it nearly matches."""
    try:
        pattern = safe_pattern(text)
    except ConfigError:
        return
    assert re.compile(text) == pattern
    began = time.process_time()
    pattern.search("ab" * 12 + "!")
    assert time.process_time() - began < 1.0
