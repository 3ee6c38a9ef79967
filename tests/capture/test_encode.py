"""Any record, our bytes, the official protobuf classes: the same record."""

from __future__ import annotations

import logging
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_otel.capture import encode
from skyrl_otel.capture.encode import STANDARD
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import Records
from skyrl_otel.capture.taker import make_take
from skyrl_otel.spool import frames
from tests.capture.frames import Taken, decode

any_text = st.text(st.characters(codec=None))  # lone surrogates too
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text, st.binary())
keys = any_text.filter(lambda key: key not in STANDARD and key != "extra")
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(any_text, inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=20,
)


def clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def expected(value: Any) -> Any:
    """What arrives of a value."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bool) or value is None or isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else value
    if isinstance(value, dict):
        return {clean(key): expected(item) for key, item in value.items()}
    return [expected(item) for item in value]


def nan_as_text(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, list):
        return [nan_as_text(item) for item in value]
    return {key: nan_as_text(item) for key, item in value.items()} if isinstance(value, dict) else value


class Caught(Records):
    """Keeps frames instead of writing them."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.frames: list[bytes] = []

    def rescue(self, frame: bytes, error: OSError | None) -> bool:  # fd -1: every frame comes here
        self.frames.append(frame)
        return True


def through(record: logging.LogRecord) -> Taken:
    caught = Caught()
    assert make_take(caught, Levels({}))(record)
    [frame] = frames.scan(caught.frames[0])
    assert isinstance(frame, frames.Frame)
    return decode(frame.payload)


@settings(deadline=None, max_examples=60)
@given(
    name=any_text,
    level=st.integers(0, 70),
    message=any_text,
    path=any_text,
    line=st.integers(0, 1 << 40),
    function=any_text,
    extra=st.dictionaries(keys, values, max_size=5),
    created=st.floats(0, 1.7e9),
)
def test_a_record_comes_back(
    name: str, level: int, message: str, path: str, line: int, function: str, extra: dict[str, Any], created: float
) -> None:
    record = logging.LogRecord(name, level, path, line, message, (), None, function)
    record.__dict__.update(extra)
    record.created = created
    first, got = through(record), through(record)  # the second time its keys are known, and take the short way
    assert nan_as_text(first.attributes) == nan_as_text(got.attributes)
    assert (got.scope, got.body, got.level) == (clean(name), clean(message), clean(logging.getLevelName(level)))
    assert 0 <= got.severity <= 24
    stated = int(created * 1e9)
    assert got.raw.time_unix_nano == stated if stated else got.raw.time_unix_nano > 1e18
    assert got.raw.observed_time_unix_nano == got.raw.time_unix_nano
    attributes = dict(got.attributes)
    assert attributes.pop("code.file.path") == clean(path) and attributes.pop("code.line.number") == line
    assert attributes.pop("code.function.name") == clean(function)
    assert attributes.pop("thread.id") == record.thread and attributes.pop("thread.name") == record.threadName
    # Keys that differ in a lone surrogate alone become one; the last stands.
    assert nan_as_text(attributes) == {clean(key): expected(value) for key, value in extra.items()}


plain_values = st.one_of(
    st.integers(-2, 1 << 64),
    st.integers(0, 3000),
    st.floats(),
    st.booleans(),
    any_text,
    st.none(),
    st.text(min_size=90),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.dictionaries(st.sampled_from(["step", "phase", "é", "k" * 120]), plain_values), max_size=8))
def test_the_same_keys_with_other_values_of_any_type_and_length(extras: list[dict[str, Any]]) -> None:
    for extra in extras:
        record = logging.LogRecord("n", 20, "p", 1, "m", (), None, "f")
        record.__dict__.update(extra)
        record.message, record.asctime = "added by a formatter", "and so was this"
        attributes = nan_as_text(through(record).attributes)
        own = {key: value for key, value in attributes.items() if not key.startswith(("code.", "thread."))}
        assert own == {key: nan_as_text(expected(value)) for key, value in extra.items()}
        assert [type(own[key]) for key in extra] == [type(nan_as_text(expected(value))) for key, value in extra.items()]
        # In the order in which the program gave them.
        assert list(own) == list(extra)


def test_a_loguru_key_by_a_formatters_name_makes_no_extra_of_that() -> None:
    assert b"message" in encode.attributes({"message": "loguru's own"}, ["message"])
    record = logging.LogRecord("n", 20, "p", 1, "m", (), None, "f")
    record.message = "loguru's own"
    assert "message" not in through(record).attributes


def test_extras_stand_behind_what_logging_sets() -> None:
    """What `plain_extras` relies on, of the Python at hand; and where somebody has changed it, they are found too."""
    record = logging.getLogger("n").makeRecord("n", 20, "p", 1, "m", (), None, "f", {"one": 1, "two": 2})
    assert list(record.__dict__)[-2:] == ["one", "two"]
    assert set(list(record.__dict__)[:-2]) <= STANDARD
    last = list(record.__dict__)[-3]
    value = record.__dict__.pop(last)
    record.__dict__.update({last: value, "three": 3})
    for _ in range(2):
        got = through(record).attributes
        assert (got["one"], got["two"], got["three"]) == (1, 2, 3)


def test_what_ray_sets_in_each_record_is_no_extra() -> None:
    import ray  # noqa: F401  it sets the factory

    for extra in ({}, {"one": 1}, {"one": 1}):
        record = logging.getLogger("n").makeRecord("n", 20, "p", 1, "m", (), None, "f", extra)
        assert "_ray_timestamp_ns" in record.__dict__
        got = through(record).attributes
        assert "_ray_timestamp_ns" not in got and got.get("one") == extra.get("one")
        if extra:
            assert b"one" in encode.attributes(record.__dict__, ["one"])
            assert encode.plain_extras(record.__dict__), "the quick way"


def test_levels_are_opentelemetrys() -> None:
    numbers = {}
    for level in (5, 10, 11, 15, 20, 25, 30, 39, 40, 50, 51, 60):
        numbers[level] = decode(b"\x0a\x00\x12" + encode.field(b"", encode.severity(level, "L"))).severity
    assert numbers == {5: 1, 10: 5, 11: 6, 15: 8, 20: 9, 25: 12, 30: 13, 39: 16, 40: 17, 50: 21, 51: 22, 60: 24}


def test_what_is_huge_is_bounded() -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    wide = [list(range(500)) for _ in range(500)]
    record = logging.LogRecord("n", 20, "p", 1, "x" * (40 << 20), (), None, "f")
    record.__dict__.update(deep=deep, wide=wide, text="y" * (5 << 20))
    got = through(record)
    assert got.body.endswith(f" [cut: {40 << 20} bytes]") and len(got.body) < 17 << 20
    assert len(got.attributes["text"]) < 2 << 20 and "<list>" in str(got.attributes["deep"])
    ten = "z" * (10 << 20)
    assert through(logging.LogRecord("n", 20, "p", 1, ten, (), None, "f")).body == ten


Shape = Callable[[], dict[str, Any]]
HUGE: dict[str, Shape] = {
    "long strings": lambda: {"list": ["x" * 700_000] * 100},
    "long strings of three bytes": lambda: {f"k{n}": "€" * 700_000 for n in range(100)},
    "long bytes": lambda: {f"k{n}": bytes(3 << 20) for n in range(100)},
    "many numbers": lambda: {"wide": [[[1.5] * 1000] * 1000] * 1000},
    "many keys": lambda: {f"key {n}": n for n in range(200_000)},
    "long keys": lambda: {"k" * (5 << 20) + str(n): 1 for n in range(20)},
    "long keys within": lambda: {"map": {"k" * (5 << 20) + str(n): 1 for n in range(20)}},
    "a long list": lambda: {"list": [None] * 20_000_000},
    "big integers": lambda: {"list": [1 << (1 << 23)] * 100},
}


@pytest.mark.parametrize("kind", HUGE)
def test_no_record_is_more_than_a_reader_takes(kind: str) -> None:
    extra = HUGE[kind]()
    tracemalloc.start()
    got = everything_long(extra)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20, "it is not all encoded to be cut"
    assert len(got.attributes) > 5 and got.scope.startswith("n" * 4096)


def everything_long(extra: dict[str, Any]) -> Taken:
    """A record in which all else is too long as well."""
    long = "z" * (2 << 20)
    error = ValueError(long)
    message = "m" * (20 << 20)
    record = logging.LogRecord("n" * 10_000, 20, long, 1, message, (), (ValueError, error, None), long, long)
    record.levelname = record.threadName = long
    record.__dict__.update(extra)
    return through(record)


def test_what_is_cut_says_so_and_the_rest_is_whole() -> None:
    record = logging.LogRecord("n", 20, "p", 1, "m", (), None, "f")
    record.__dict__.update(many=["x" * 700_000] * 100, last="here")
    got = through(record).attributes
    whole = [text for text in got["many"] if text == "x" * 700_000]
    assert len(whole) == 23 and got["many"][-1] == "…" and got["many"][-2].endswith(" [cut: 700000 bytes]")
    assert got["last"] == "here"
    record.__dict__.update({f"extra {number}": number for number in range(5000)})
    assert "left out" in through(record).attributes["…"]


def test_subclasses_count_as_what_they_are_and_mappings_need_no_dict() -> None:
    import enum
    from collections import OrderedDict
    from types import MappingProxyType

    class Word(str):
        def __str__(self) -> str:
            raise RuntimeError("no")

    class Kind(enum.IntEnum):
        ONE = 1

    record = logging.LogRecord("n", 20, "p", 1, "m", (), None, "f")
    record.__dict__.update(w=Word("word"), k=Kind.ONE, o=OrderedDict(a=1), p=MappingProxyType({1: 2}), t=int)
    got = through(record).attributes
    assert (got["w"], got["k"], got["o"], got["p"], got["t"]) == ("word", 1, {"a": 1}, {"1": 2}, "<class 'int'>")
