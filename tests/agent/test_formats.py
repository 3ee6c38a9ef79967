"""Formats: real output of real programs, and what those meant by it."""

from __future__ import annotations

import json
import random
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


def wrong(record: Received, logger: str, meant: dict[str, Any]) -> list[str]:
    """What a record has wrong."""
    faults = []
    if logger != meant["logger"]:
        faults.append(f"logger {logger} for {meant['logger']}")
    if record.severity != meant["severity"]:
        faults.append(f"severity {record.severity} for {meant['severity']}")
    if meant.get("exception"):
        if record.attributes.get("exception.type") != meant["exception"]:
            faults.append(f"exception {record.attributes.get('exception.type')} for {meant['exception']}")
        if not record.body.startswith(meant["message"]) or not record.attributes.get("exception.stacktrace"):
            faults.append(f"body {record.body!r} for {meant['message']!r}")
    elif record.body != meant["message"]:
        faults.append(f"body {record.body!r} for {meant['message']!r}")
    if abs(record.time / 1e9 - meant["time"]) > 1.5:
        faults.append(f"time {record.time} for {meant['time']}")
    return faults


@pytest.mark.parametrize("name", SAMPLES)
def test_real_output_is_understood(name: str) -> None:
    data = (DATA / f"{name}.log").read_bytes()
    meant = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
    found = read(data, meant[-1]["time"])
    assert len(found) == len(meant), [record.body for record, _ in found]
    faults = {
        m["message"]: bad for (record, logger), m in zip(found, meant, strict=True) if (bad := wrong(record, logger, m))
    }
    assert not faults


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
    def took(size: int) -> float:
        began = time.process_time()
        read(data[:size] + b"\n", 1_795_412_141)
        return time.process_time() - began

    took(1000)
    half, whole = min(took(len(data) // 2) for _ in range(2)), min(took(len(data)) for _ in range(2))
    assert whole < 4 * half + 0.1
    assert whole < 4.0
