"""Formats: real output of real programs, and what those meant by it."""

from __future__ import annotations

import datetime
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import ScopeLogs

from skyrl_otel.agent.formats import FORMATS
from skyrl_otel.agent.recognise import Matcher, Recogniser
from skyrl_otel.spool.decisions import Decision
from tests.agent.test_reader import Agent, Written, check_ranges, received
from tests.receiver import Received

DATA = Path(__file__).parent.parent / "data" / "formats"
SAMPLES = sorted(path.stem for path in DATA.glob("*.jsonl"))


def read(data: bytes, now: float) -> list[tuple[Received, str]]:
    """The records of a file that was seen as a whole at `now` (seconds), each with its logger."""
    written = Written(identities=[Decision(0, "out", 0, 0, "identity", 0)])
    written.now = int(now * 1e9)
    written.look(data, 0)
    written.cuts.append(len(data))
    agent = Agent()
    agent.read(written, len(data))
    found = received(agent.records)
    check_ranges(written, found)
    scopes = [ScopeLogs.FromString(agent.scopes[start]).scope.name for start in sorted(agent.sent)]
    return list(zip(found, ["" if scope == "skyrl_otel.text" else scope for scope in scopes], strict=True))


_STATED = (
    re.compile(rb"(?P<Y>20\d\d)-(?P<m>\d\d)-(?P<d>\d\d)[ T](?P<clock>\d\d:\d\d:\d\d)(?:[.,](?P<fraction>\d+))?"),
    re.compile(rb"(?<!\d)(?P<m>\d\d)-(?P<d>\d\d) (?P<clock>\d\d:\d\d:\d\d)()"),
    re.compile(rb"[DIWEF](?P<m>\d\d)(?P<d>\d\d) (?P<clock>\d\d:\d\d:\d\d)\.(?P<fraction>\d+)"),
)
_PLACES = {"file": "code.file.path", "line": "code.line.number", "function": "code.function.name", "pid": "process.pid"}
_MORE = {"exception": "exception.type", "exception_message": "exception.message", "stack": "exception.stacktrace"}
_OTHER = {"child": "skyrl.child", "states": "skyrl.bar.states"}


def stated(raw: bytes) -> tuple[int, int] | None:
    """The times, in nanoseconds from the first to before the second, that the first line of a record may mean by its text."""
    line = raw.partition(b"\n")[0]
    match = next((match for pattern in _STATED if (match := pattern.search(line, 0, 120))), None)
    if match is None:
        return None
    fields = match.groupdict()
    day = datetime.date(int(fields.get("Y") or 2026), int(fields["m"]), int(fields["d"]))
    clock = datetime.time.fromisoformat(fields["clock"].decode())
    second = int(datetime.datetime.combine(day, clock, datetime.timezone.utc).timestamp())
    digits = (fields.get("fraction") or b"")[:9]
    size = 10 ** (9 - len(digits))
    low = second * 10**9 + int(digits or 0) * size
    return low, low + size


def wrong(record: Received, logger: str, meant: dict[str, Any], raw: bytes) -> list[str]:
    """What a record has wrong."""
    expected = {"logger": meant["logger"], "severity": meant["severity"], "body": meant["message"]}
    found: dict[str, Any] = {"logger": logger, "severity": record.severity, "body": record.body}
    names = _PLACES | _MORE | _OTHER
    expected |= {key: meant[key] for key in names if key in meant}
    found |= {key: record.attributes.get(names[key]) for key in names if key in meant}
    if "stack" in expected and len(expected["stack"]) > 16_000:
        expected["stack"], found["stack"] = expected["stack"][-9_000:], found["stack"][-9_000:]
    faults = [f"{key} {found[key]!r} for {expected[key]!r}" for key in expected if found[key] != expected[key]]
    faults += [
        f"{name}, which nobody meant" for key, name in _MORE.items() if name in record.attributes and key not in meant
    ]
    span = stated(raw)
    if span is not None and not span[0] <= record.time < span[1]:
        faults.append(f"time {record.time} for {span}")
    if meant["time"] and span is not None and abs(record.time / 1e9 - meant["time"]) > 1.5:
        faults.append(f"time {record.time} for {meant['time']}")
    return faults


def faults_of(name: str) -> list[list[str]]:
    """The faults of each record of a sample that is read two hours after its last line."""
    data = (DATA / f"{name}.log").read_bytes()
    meant = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
    last = (
        max(range_[1] for line in data.split(b"\n") if (range_ := stated(line))) if is_timed(name) else time.time_ns()
    )
    found = read(data, last / 1e9 + 7200)
    assert len(found) == len(meant), [record.body for record, _ in found]
    return [wrong(record, logger, m, raw_of(data, record)) for (record, logger), m in zip(found, meant, strict=True)]


def raw_of(data: bytes, record: Received) -> bytes:
    start, _, end = record.uid.rpartition("/")[2].partition("-")
    return data[int(start) : int(end)]


def is_timed(name: str) -> bool:
    """Whether lines of a sample say when they were written."""
    return not name.startswith(TIMELESS)


TIMELESS = (
    "basic",
    "faulthandler",
    "pretty",
    "raised",
    "shell",
    "torch-check",
    "tqdm",
    "traceback",
    "uvicorn",
    "warnings",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_real_output_is_understood(name: str) -> None:
    faults = [bad for bad in faults_of(name) if bad]
    assert not faults


@pytest.mark.parametrize("name", [name for name in SAMPLES if is_timed(name)])
def test_a_clock_that_is_broken_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would not test times."""

    def time_of_the_mark(*_: object) -> tuple[int, tuple[int, int], int]:
        mark = next(value for value in _ if isinstance(value, int))
        return mark, (mark, mark + 1), 1

    monkeypatch.setattr(Matcher, "_time", time_of_the_mark)
    assert any("time " in fault for bad in faults_of(name) for fault in bad)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_two_formats_take_the_same_line(name: str) -> None:
    lines = {line for line in (DATA / f"{name}.log").read_bytes().split(b"\n") if line}
    for line in lines:
        found = []
        for format in FORMATS:
            if line[0] not in format.first:
                continue
            matches = format.parse(line) if format.parse else Matcher(format).pattern.match(line)
            if matches:
                found.append(format.name)
        assert len(found) <= 1, line


def test_the_order_of_the_table_does_not_matter() -> None:
    lines = [line for path in DATA.glob("*.log") for line in path.read_bytes().split(b"\n")]
    random.Random(1).shuffle(lines)
    now = time.time_ns()
    one, other = Recogniser(FORMATS), Recogniser(FORMATS[::-1])
    for line in lines:
        first, second = one.header(line, now, (0, 0)), other.header(line, now, (0, 0))
        assert (first and first._replace(matcher=None)) == (second and second._replace(matcher=None))  # type: ignore[arg-type]


HOSTILE = [
    b"(" * 66_000,
    b"(A pid=" * 10_000,
    b"[" * 66_000,
    b"\x1b[" * 33_000,
    b"\x1b]" * 33_000,
    b"{" * 66_000,
    b'{"a":' * 10_000,
    b"a=" * 33_000,
    b'a="\\' * 16_000,
    b"a:1: " * 13_000,
    b"2026-11-23 05:20:11,123 INFO " * 2_000,
    b"2026-11-23 05:20:11 - " + b"a-" * 33_000,
    b"\r" * 66_000,
    b"  + " * 16_000,
    b"Traceback (most recent call last):\n" * 2_000,
    b"x: {\n" * 13_000,
    b"(A pid=1) INFO 11-23 05:35:41 [core.py:402] (B pid=2) \n" * 1_000,
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:12]))
def test_hostile_input_takes_linear_time(data: bytes) -> None:
    def took(times: int) -> float:
        began = time.process_time()
        read(data * times + b"\n", 1_795_412_141)
        return time.process_time() - began

    # Twice the input at a size where the time can be told from noise: 2 where it is linear, 4 where it is quadratic.
    times, half = 1, took(1)
    while half < 0.05 and times < 32:
        times *= 2
        half = took(times)
    whole = took(2 * times)
    for _ in range(4):  # in turn: the machine may become slower for a while
        half, whole = min(half, took(times)), min(whole, took(2 * times))
    assert whole < 3 * half + 0.02


# From format strings in sources, of programs that were not run here: NCCL, SGLang, and glog with a year. The sources stand beside
# the patterns.
FROM_SOURCE = [
    (b"gpu-7:4711:4712 [3] NCCL INFO Bootstrap: Using eth0", "nccl", 9, "Bootstrap: Using eth0", {"process.pid": 4711}),
    (
        b"[2026-11-23 05:35:41] gpu-7:4711:4712 [0] a.cc:9 (f) NCCL WARN down",
        "nccl",
        13,
        "down",
        {"code.line.number": 9},
    ),
    (b"[2026-11-23 05:35:41 TP0] Load weight begin", "sglang", 0, "Load weight begin", {}),
    (b"I20261123 05:35:41.123456  4711 a.cc:12] glog", "glog", 9, "glog", {"code.line.number": 12}),
]


@pytest.mark.parametrize(("line", "logger", "severity", "body", "more"), FROM_SOURCE, ids=lambda value: str(value)[:30])
def test_lines_from_sources_are_understood(
    line: bytes, logger: str, severity: int, body: str, more: dict[str, Any]
) -> None:
    ((record, found),) = read(line + b"\n", 1_795_412_200)
    assert (found, record.severity, record.body) == (logger, severity, body)
    assert record.attributes.items() >= more.items()


def test_what_is_printed_as_json_claims_nothing() -> None:
    """Neither whose line it is nor to be an event of ours, however Loki or a person would spell it."""
    claims = {"skyrl.rank": 7, "skyrl_role": "x", "event.name": "skyrl.loss", "skyrl.lost.bytes": 5, "host.name": "h"}
    line = json.dumps({"level": "INFO", "message": "m", "step": 3, "worth": float("nan"), **claims}).encode()
    ((record, _),) = read(line + b"\n", 1_795_412_200)
    assert record.attributes["step"] == 3
    assert record.attributes["worth"] == "NaN"  # no JSON has it, so neither Loki nor `logs --json` could write it
    assert {f"printed.{key}" for key in claims} <= record.attributes.keys()
    assert not claims.keys() & record.attributes.keys()


def test_the_header_of_a_child_may_name_another_process() -> None:
    """As where Ray relays a worker's C++ log. No key stands in a record twice."""
    line = b"(%b pid=%d) [2026-11-23 05:35:41,123 I 71 72] (raylet) main.cc:9: up\n"
    ((same, _),) = read(line % (b"f", 71), 1_795_412_200)
    ((other, _),) = read(line % (b"f", 5), 1_795_412_200)
    assert (same.attributes["process.pid"], same.attributes.get("skyrl.stated_pid")) == (71, None)
    assert (other.attributes["process.pid"], other.attributes["skyrl.stated_pid"]) == (5, 71)
    for record in (same, other):
        assert record.raw.count(b"process.pid") == 1


@pytest.mark.parametrize("when", [b"13-01 00:00:00", b"02-30 00:00:00", b"11-23 25:00:00"])
def test_a_header_whose_time_is_none_is_shown(when: bytes) -> None:
    line = b"INFO %b [core.py:402] x" % when
    ((record, logger),) = read(line + b"\n", 1_795_412_200)
    assert (record.body, logger) == (line.decode(), "")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ('"time": "yesterday"', {"time": "yesterday"}),
        ('"caller": "somewhere"', {"caller": "somewhere"}),
        ('"file": 3, "line": "x"', {"file": 3, "line": "x"}),
        ('"logger": {"a": 1}', {"logger": '{"a": 1}'}),
        ('"exception": {"a": 1}', {"exception": '{"a": 1}'}),
        ('"error": "a", "error": "b"', {"error": "a", "error.2": "b"}),  # as zap writes it
    ],
)
def test_a_field_that_is_not_what_its_name_says_is_an_attribute(fields: str, shown: dict[str, Any]) -> None:
    ((record, _),) = read(f'{{"level": "info", "msg": "m", {fields}}}\n'.encode(), 1_795_412_200)
    assert (record.body, record.severity) == ("m", 9)
    assert record.attributes.items() >= shown.items()


def test_a_logfmt_key_that_stands_twice_is_two_attributes() -> None:
    ((record, _),) = read(b"level=info msg=m err=a err=b level=error\n", 1_795_412_200)
    assert (record.severity, record.attributes["err"], record.attributes["err.2"]) == (9, "a", "b")


@pytest.mark.parametrize(
    "fields", [{f"k{number}": number for number in range(40)}, {"deep": ["x" * 5000]}, {"k" * 200: 1}]
)
def test_where_not_all_fields_fit_the_body_is_the_line(fields: dict[str, Any]) -> None:
    line = json.dumps({"level": "info", "msg": "m", **fields})
    ((record, _),) = read(line.encode() + b"\n", 1_795_412_200)
    assert (record.body, record.severity) == (line, 9)


@pytest.mark.parametrize("line", [b"Bus error by the driver was handled", b"Killed 3 of 4 requests", b"Aborted: user"])
def test_a_sentence_is_nobodys_last_words(line: bytes) -> None:
    ((record, _),) = read(line + b"\n", 1_795_412_200)
    assert record.severity == 0
