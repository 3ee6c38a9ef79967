"""What else a record may have: arguments, exceptions, stacks, spans, values of every kind; and all of it said by loguru."""

from __future__ import annotations

import enum
import logging
import pathlib
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from skyrl_otel.capture import loguru_tap
from skyrl_otel.capture.console import Console
from skyrl_otel.capture.levels import Levels
from skyrl_otel.spool import frames
from tests.capture.frames import Taken, decode
from tests.capture.test_encode import Caught, any_text, clean, expected, keys, leaves, nan_as_text, through, values


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Word(str, enum.Enum):
    HELLO = "hello"


class Bits(enum.Flag):
    A = 1
    B = 2


@dataclass(frozen=True)
class Point:
    x: float
    name: str


class Shown:
    """As somebody's class may be: its repr says anything."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("no")


objects = st.one_of(
    st.builds(Point, st.floats(allow_nan=False), any_text),
    st.builds(Shown, any_text),
    st.sampled_from(
        [Colour.RED, Bits.A | Bits.B, int, len, Decimal("1.50"), pathlib.PurePath("/a"), 1j, range(3), ...]
    ),
    st.datetimes(timezones=st.just(timezone.utc)),
    st.uuids(),
    st.fractions(),
)
odd_values = st.recursive(
    st.one_of(leaves, objects, st.sampled_from([Number.ONE, Word.HELLO]), st.builds(Unshown)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(any_text, st.integers(), st.tuples(st.integers())), inner, max_size=3),
        st.frozensets(st.one_of(st.integers(), any_text), max_size=4),
        st.sets(st.one_of(st.booleans(), st.binary(max_size=5)), max_size=3),
        st.lists(inner, max_size=2).map(lambda items: MappingProxyType(OrderedDict(enumerate(items)))),
        st.binary(max_size=9).map(bytearray),
        st.binary(max_size=9).map(memoryview),
    ),
    max_leaves=12,
)


def arrives(value: Any) -> Any:
    """What arrives of a value of any kind."""
    if isinstance(value, Word):
        return "hello"
    if isinstance(value, bool | None) or type(value) in (str, int, float, bytes):
        return expected(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, dict | MappingProxyType):
        return {clean(key if type(key) is str else str(key)): arrives(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [arrives(item) for item in value]
    try:
        return clean(repr(value))
    except RuntimeError:
        return f"<{type(value).__name__}: RuntimeError when shown>"


@given(extra=st.dictionaries(keys, odd_values, max_size=4))
def test_values_of_every_kind_arrive(extra: dict[str, Any]) -> None:
    record = logging.LogRecord("n", 20, "p", 1, "m", (), None, "f")
    record.__dict__.update(extra)
    attributes = through(record).attributes
    for key, value in {clean(key): value for key, value in extra.items()}.items():
        assert nan_as_text(attributes[key]) == nan_as_text(arrives(value))


formats = st.lists(st.sampled_from(["%s", "%r", "%d", "%5.1f", "%x", "%%", "text", "%(key)s", "%", "é"]), max_size=4)
arguments = st.one_of(
    st.lists(st.one_of(leaves, objects), max_size=4).map(tuple),
    st.dictionaries(st.just("key"), leaves, max_size=1).map(lambda fields: (fields,)),
)


@given(template=st.one_of(any_text, formats.map(" ".join), objects, st.builds(Unshown)), args=arguments)
def test_the_message_is_what_logging_makes_of_it(template: Any, args: tuple[Any, ...]) -> None:
    record = logging.LogRecord("n", 20, "p", 1, template, args, None, "f")
    try:
        wanted = clean(record.getMessage())
    except Exception as error:
        # Then `logging` says nothing but the error, on stderr; here it is said beside what can be shown.
        assert f"{type(error).__name__} when" in through(record).body
        return
    assert through(record).body == wanted


class Odd(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


def raised(message: str, cause: str | None, depth: int, kind: type[Exception]) -> Exception:
    """An exception that was really raised, so that it has a trace."""
    try:
        if depth:
            raise raised(message, cause, depth - 1, kind)
        if cause is not None:
            try:
                raise KeyError(cause)
            except KeyError as error:
                raise kind(message) from error
        raise kind(message)
    except Exception as error:
        return error


exceptions = st.builds(
    raised, any_text, st.none() | any_text, st.integers(0, 3), st.sampled_from([ValueError, OSError, Odd])
)


def said_of(error: BaseException) -> dict[str, str]:
    module = "" if type(error).__module__ == "builtins" else f"{type(error).__module__}."
    shown = "<Odd: ValueError when shown>" if isinstance(error, Odd) else clean(str(error))
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return {
        "exception.type": f"{module}{type(error).__qualname__}",
        "exception.message": shown,
        "exception.stacktrace": clean("".join(lines)),
    }


@given(error=exceptions, form=st.integers(0, 2), stack=st.none() | any_text, thread=st.none() | any_text)
def test_exceptions_stacks_and_threads_arrive(
    error: Exception, form: int, stack: str | None, thread: str | None
) -> None:
    exc_info: Any = [(type(error), error, error.__traceback__), error, (None, None, None)][form]
    record = logging.LogRecord("n", 20, "p", 1, "m", (), exc_info, "f", stack)
    record.threadName = thread
    attributes = through(record).attributes
    found = {key: value for key, value in attributes.items() if key.startswith("exception.")}
    assert found == (said_of(error) if form < 2 else {})
    assert attributes.get("code.stacktrace") == (clean(stack) if stack else None)
    assert attributes.get("thread.name") == (clean(thread) if thread else None)


trace_ids, span_ids = st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1)


@given(trace_id=trace_ids, span_id=span_ids, flags=st.integers(0, 255), extra=st.dictionaries(keys, values, max_size=1))
def test_the_active_span_arrives(trace_id: int, span_id: int, flags: int, extra: dict[str, Any]) -> None:
    span = NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(flags)))
    record = logging.LogRecord("n", 20, "p", 1, "m", (), None, "f")
    record.__dict__.update(extra)
    token = context.attach(trace.set_span_in_context(span))
    try:
        raw = through(record).raw
    finally:
        context.detach(token)
    assert raw.trace_id == trace_id.to_bytes(16, "big") and raw.span_id == span_id.to_bytes(8, "big")
    assert raw.flags == flags
    assert not through(record).raw.trace_id


# -- loguru ------------------------------------------------------------------------------------------------------------


class Loguru:
    """A logger of its own, and what was taken of it."""

    def __init__(self) -> None:
        from loguru._logger import Core, Logger

        self.caught = Caught()
        loguru_tap.install(self.caught, Levels({}), Console(self.caught))
        options = {"exception": None, "depth": 0, "record": False, "lazy": False, "colors": False, "raw": False}
        self.logger = Logger(core=Core(), **options, capture=False, patchers=[], extra={})

    def taken(self) -> Taken:
        """The one record since the last call."""
        [encoded] = self.caught.frames
        self.caught.frames.clear()
        [frame] = frames.scan(encoded)
        assert isinstance(frame, frames.Frame)
        return decode(frame.payload)


@pytest.fixture
def loguru() -> Iterator[Loguru]:
    loguru = Loguru()
    yield loguru
    loguru_tap.remove()


one_logger = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@one_logger
@given(
    level=st.one_of(st.integers(10, 70), st.sampled_from(["DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"])),
    message=any_text,
    extra=st.dictionaries(keys, odd_values, max_size=4),
    origin=st.none() | st.sampled_from(["vllm.engine", "é"]),
    error=st.none() | exceptions,
    patch=st.dictionaries(st.sampled_from(["name", "function"]), st.none() | any_text) | st.just({"line": 1 << 40}),
)
def test_a_record_of_logurus_comes_back(
    loguru: Loguru,
    level: int | str,
    message: str,
    extra: dict[str, Any],
    origin: str | None,
    error: Exception | None,
    patch: dict[str, Any],
) -> None:
    seen: list[Any] = []
    logger = loguru.logger.patch(
        lambda record: (record.update(patch), record["extra"].update(extra), seen.append(record))
    )
    if origin is not None:
        logger = logger.bind(stdlib_logger=origin)
    logger.opt(exception=error).log(level, message)
    got, [record] = loguru.taken(), seen
    number = record["level"].no
    assert got.scope == clean(origin or record["name"] or "") and got.body == clean(message)
    assert got.level == record["level"].name and 5 <= got.severity <= 24
    assert number not in (10, 20, 30, 40, 50) or got.severity == {10: 5, 20: 9, 30: 13, 40: 17, 50: 21}[number]
    assert got.raw.time_unix_nano == got.raw.observed_time_unix_nano > 1e18
    wanted = {clean(key): arrives(value) for key, value in extra.items()}
    attributes = {key: value for key, value in got.attributes.items() if key in wanted}
    assert nan_as_text(attributes) == nan_as_text(wanted)
    assert got.attributes["code.file.path"] == __file__ and got.attributes["code.line.number"] == record["line"]
    assert got.attributes["code.function.name"] == clean(record["function"] or "")
    assert got.attributes["thread.name"] == record["thread"].name and got.attributes["thread.id"] == record["thread"].id
    assert "stdlib_logger" not in got.attributes
    found = {key: value for key, value in got.attributes.items() if key.startswith("exception.")}
    assert found == (said_of(error) if error is not None else {})


@one_logger
@given(
    trace_id=trace_ids,
    span_id=span_ids,
    words=st.lists(any_text, max_size=3),
    fields=st.fixed_dictionaries({"k": leaves}),
)
def test_logurus_arguments_and_spans_arrive(
    loguru: Loguru, trace_id: int, span_id: int, words: list[str], fields: dict[str, Any]
) -> None:
    template = "{} " * len(words) + "{k}"
    span = NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(1)))
    token = context.attach(trace.set_span_in_context(span))
    try:
        loguru.logger.info(template, *words, **fields)
    finally:
        context.detach(token)
    got = loguru.taken()
    assert got.body == clean(template.format(*words, **fields))
    assert got.raw.trace_id == trace_id.to_bytes(16, "big") and got.raw.span_id == span_id.to_bytes(8, "big")


def test_a_record_of_logurus_is_bounded_too(loguru: Loguru) -> None:
    long = "z" * (20 << 20)
    logger = loguru.logger.patch(lambda record: record.update(name=long, function=long))
    logger.bind(many=[long] * 100, **{long: 1}).opt(exception=ValueError(long)).info(long)
    got = loguru.taken()
    assert got.body.endswith(f" [cut: {20 << 20} bytes]") and got.attributes["many"][0].endswith(" bytes]")
    now = datetime.now(timezone.utc)
    loguru.logger.bind(now=now).info("z" * (10 << 20))
    got = loguru.taken()
    assert got.body == "z" * (10 << 20) and got.attributes["now"] == repr(now)
