"""A filter as LogQL means what it means to SQLite, whose globs the store uses."""

from __future__ import annotations

import re
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.query import logql
from skyrl_otel.query.filters import Filter, parse_grep

_texts = st.text(st.sampled_from("ab-^]. \n*?[(|\\é"), max_size=6)


@given(pattern=_texts, text=_texts)
def test_a_glob_matches_what_sqlite_matches(pattern: str, text: str) -> None:
    db = sqlite3.connect(":memory:")
    try:
        (expected,) = db.execute("SELECT ? = ? OR ? GLOB ?", (text, pattern, text, pattern)).fetchone()
    finally:
        db.close()
    assert bool(re.fullmatch(logql.glob(pattern), text)) == bool(expected)


@given(text=st.text())
def test_a_string_is_one_string(text: str) -> None:
    quoted = logql.quote(text)
    assert quoted[0] == quoted[-1] == '"'
    assert '"' not in re.sub(r"\\.", "", quoted[1:-1])
    assert "\n" not in quoted


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), '{skyrl_run_id="r"}'),
        (Filter(channel="infra"), '{skyrl_run_id="r", skyrl_channel!="progress"}'),
        (Filter(channel="progress", rank=3), '{skyrl_run_id="r", skyrl_channel="progress"} | skyrl_rank="3"'),
        (
            Filter(stream="stderr", grep=parse_grep("nan loss")),
            '{skyrl_run_id="r"} |= "nan loss" | log_iostream="stderr"',
        ),
        (Filter(grep=parse_grep("nan|inf")), '{skyrl_run_id="r"}'),
        (Filter(role="p*"), r'{skyrl_run_id="r"} | skyrl_role=~"(?s:p\\*|p.*)"'),
    ],
)
def test_queries(wanted: Filter, expected: str) -> None:
    assert logql.of(wanted, "r") == expected
