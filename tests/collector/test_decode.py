"""The quick way through a request and the official classes read the same."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from skyrl_otel.agent import otlp
from skyrl_otel.collector import wire
from skyrl_otel.collector.decode import BadRequest, decode, parse_low_water
from tests.collector_process import WRITER

times = st.integers(0, 2**64 - 1)
lines = st.lists(
    st.tuples(
        times,
        st.text(max_size=400) | st.integers(100, 20_000).map("x".__mul__),
        st.sampled_from(["stdout", "stderr"]),
        st.integers(0, 10**17),
    ),
    max_size=5,
)


def as_the_agent_sends(found: list[tuple[int, str, str, int]]) -> bytes:
    records = []
    for time, body, stream, start in found:
        uid = f"{WRITER}/out/0/{start}-{start + len(body) + 1}"
        attributes = otlp.attributes({"log.iostream": stream, "log.record.uid": uid})
        records.append(otlp.text_record(time, body.encode("utf-8", "replace"), attributes))
    logs = otlp.scope_logs(otlp.scope("skyrl_otel.text"), records)
    return otlp.resource_logs(otlp.resource({"service.name": "policy"}), [logs])


@given(lines, st.randoms())
def test_a_line_reads_the_same_whatever_the_order_of_its_fields(
    found: list[tuple[int, str, str, int]], chance: random.Random
) -> None:
    body = as_the_agent_sends(found)
    shuffled = ExportLogsServiceRequest.FromString(body)
    for record in shuffled.resource_logs[0].scope_logs[0].log_records:
        attributes = list(record.attributes)
        chance.shuffle(attributes)
        del record.attributes[:]
        record.attributes.extend(attributes)
        record.flags = 1  # no agent of ours sets it

    quick, official = (decode(data, low_water={}, now_unix_nano=7) for data in (body, shuffled.SerializeToString()))

    assert quick == official
    assert [row.body for row in quick.rows] == [line[1].encode("utf-8", "replace").decode() for line in found]


def test_the_agents_own_lines_take_the_quick_way() -> None:
    for body in ("", "x" * 100, "x" * 127, "x" * 200, "é" * 20_000):
        request = as_the_agent_sends([(1, body, "stderr", 0)])
        ((_, at, end),) = wire.fields(request, 0, len(request))
        scope_logs = next(span for number, *span in wire.fields(request, at, end) if number == 2)
        record = next(span for number, *span in wire.fields(request, *scope_logs) if number == 2)

        assert wire.text_line(request, *record) is not None


@given(lines, st.data())
def test_damaged_requests_are_refused_or_read_and_nothing_else(
    found: list[tuple[int, str, str, int]], data: st.DataObject
) -> None:
    body = bytearray(as_the_agent_sends(found))
    for at in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=4)):
        body[at] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]

    try:
        decode(bytes(body), low_water={}, now_unix_nano=7)
    except BadRequest:
        pass


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read_and_nothing_else(body: bytes) -> None:
    try:
        decode(body, low_water={}, now_unix_nano=7)
    except BadRequest:
        pass


def test_a_resource_that_comes_behind_its_records_or_in_parts_is_whole() -> None:
    front = ExportLogsServiceRequest.FromString(as_the_agent_sends([(1, "a", "stdout", 0)]))
    (logs,) = front.resource_logs
    resource = logs.resource.SerializeToString()
    scopes = b"".join(otlp.field(b"\x12", scope.SerializeToString()) for scope in logs.scope_logs)
    more = otlp.resource({"skyrl.rank": 3})
    body = otlp.field(b"\x0a", scopes + otlp.field(b"\x0a", resource) + more)

    batch = decode(body, low_water={}, now_unix_nano=7)

    assert batch.resources[0].attributes == '{"service.name":"policy","skyrl.rank":3}'
    assert [(row.body, row.resource) for row in batch.rows] == [("a", 0)]


@pytest.mark.parametrize(
    ("header", "marks"),
    [
        ("", {}),
        (f"{WRITER}/out/0=17", {f"{WRITER}/out/0": 17}),
        (f" {WRITER}/out/0=17 , {WRITER}/records/0=3,", {f"{WRITER}/out/0": 17, f"{WRITER}/records/0": 3}),
        (f"{WRITER}/out/0=17,{WRITER}/out/0=9", {f"{WRITER}/out/0": 17}),
        (f"{WRITER}/out/0=-1,{WRITER}/out/0=x,{WRITER}/out=1,=,a/b/c/d=1,a/b/0={'9' * 30},a/b/0=²", {}),
    ],
)
def test_low_water_header(header: str, marks: dict[str, int]) -> None:
    assert parse_low_water(header) == marks
