"""OTLP bytes to rows: a pure function from a request's body to what the store and the text file need.

The wire format is `opentelemetry/proto/collector/logs/v1/logs_service.proto`; what the attributes mean is in
docs/contracts.md, section 2.
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as OtlpResource

from skyrl_otel.collector import wire
from skyrl_otel.collector.resource import Resource, compact_json, read_resource

_UID = re.compile(r"([0-9A-Za-z._-]{1,128}/[0-9A-Za-z._-]{1,64}/[0-9]{1,18})/([0-9]{1,18})-([0-9]{1,18})")
_SOURCE = re.compile(r"[0-9A-Za-z._-]{1,128}/[0-9A-Za-z._-]{1,64}/[0-9]{1,18}")
# SQLite's integers are signed; a time past the year 2262 is a sender's mistake, not a reason to refuse its batch.
_MAX_INT = (1 << 63) - 1
_new_row = tuple.__new__  # half the time of Row(...)


class BadRequest(ValueError):
    """The body is not an ExportLogsServiceRequest; sending it again cannot help."""


class Row(NamedTuple):
    """One log record. A tuple, because a frozen dataclass of this size costs as much as all the rest of its decoding.

    `time` is never 0: the observed or the arrival time stand in. `body` is text, or, as bytes, the JSON of a structured
    body. `attributes` is JSON or None, without `log.record.uid` (source, start, end) and `log.iostream` (stream).
    `resource` counts in `Batch.resources`. `source` is "writer/file/generation", None for records without a uid of ours.
    """

    time: int
    observed: int
    severity: int
    severity_text: str | None
    scope: str
    body: str | bytes
    stream: str | None
    attributes: str | None
    event_name: str | None
    resource: int
    source: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One request. `low_water` maps a source to the start below which nothing of it will be sent again."""

    resources: tuple[Resource, ...]
    rows: tuple[Row, ...]
    low_water: dict[str, int]


def decode(body: bytes, *, low_water: dict[str, int], now_unix_nano: int) -> Batch:
    """Read one request.

    Raises:
        BadRequest: it is no ExportLogsServiceRequest.
    """
    resources: dict[str, int] = {}
    known: list[Resource] = []
    rows: list[Row] = []
    try:
        for number, at, end in wire.fields(body, 0, len(body)):
            if number != 1:
                continue
            resource_logs = wire.fields(body, at, end)
            resource = _resource(_joined(body, resource_logs))
            index = resources.setdefault(resource.attributes, len(known))
            if index == len(known):
                known.append(resource)
            for field, at, end in resource_logs:
                if field == 2:
                    rows += _rows(body, wire.fields(body, at, end), index, now_unix_nano)
    except (DecodeError, UnicodeDecodeError, wire.Malformed) as error:
        raise BadRequest(f"the body is not an OTLP ExportLogsServiceRequest: {error}") from None
    return Batch(tuple(known), tuple(rows), low_water)


def parse_low_water(header: str) -> dict[str, int]:
    """The header `skyrl-otel-low-water`. Items that do not parse are left out: less is forgotten, nothing is lost."""
    marks: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in header.split(","))):
        source, _, offset = item.rpartition("=")
        if _SOURCE.fullmatch(source) and offset.isascii() and offset.isdigit() and len(offset) <= 18:
            marks[source] = max(int(offset), marks.get(source, 0))
    return marks


def _joined(body: bytes, fields: list[tuple[int, int, int]]) -> bytes:
    """The message in field 1. One that comes in parts is their concatenation."""
    return b"".join([body[at:end] for number, at, end in fields if number == 1])


def _rows(body: bytes, scope_logs: list[tuple[int, int, int]], resource: int, now_unix_nano: int) -> list[Row]:
    scope = _scope_name(_joined(body, scope_logs))
    rows = []
    for number, at, end in scope_logs:
        if number != 2:
            continue
        line = wire.text_line(body, at, end)
        if line is None:
            rows.append(_row(LogRecord.FromString(body[at:end]), scope, resource, now_unix_nano))
            continue
        time, observed, text, stream, source, start, stop = line
        if time > _MAX_INT or observed > _MAX_INT or not time:
            time, observed = _times(time, observed, now_unix_nano)
        rows.append(
            _new_row(Row, (time, observed, 0, None, scope, text, stream, None, None, resource, source, start, stop))
        )
    return rows


def _times(time: int, observed: int, now_unix_nano: int) -> tuple[int, int]:
    observed = min(observed, _MAX_INT)
    return min(time, _MAX_INT) or observed or now_unix_nano, observed


@lru_cache(4096)
def _resource(encoded: bytes) -> Resource:
    attributes = OtlpResource.FromString(encoded).attributes
    return read_resource({kv.key: _plain(kv.value) for kv in attributes})


@lru_cache(4096)
def _scope_name(encoded: bytes) -> str:
    name: str = InstrumentationScope.FromString(encoded).name
    return name


def _row(record: Any, scope: str, resource: int, now_unix_nano: int) -> Row:
    source = stream = None
    start = end = 0
    others: dict[str, Any] = {}
    for kv in record.attributes:
        key = kv.key
        if key == "log.record.uid" and (uid := _UID.fullmatch(kv.value.string_value)):
            source, start, end = uid[1], int(uid[2]), int(uid[3])
        elif key == "log.iostream" and kv.value.string_value:
            stream = kv.value.string_value
        else:
            others[key] = _plain(kv.value)
    event_name = record.event_name or None
    if event_name is None and isinstance(others.get("event.name"), str):
        event_name = others["event.name"]
    body = record.body.string_value or _body(record.body)
    time, observed = _times(record.time_unix_nano, record.observed_time_unix_nano, now_unix_nano)
    return Row(
        time,
        observed,
        record.severity_number,
        record.severity_text or None,
        scope,
        body,
        stream,
        compact_json(others) if others else None,
        event_name,
        resource,
        source,
        start,
        end,
    )


def _body(value: Any) -> str | bytes:
    if value.WhichOneof("value") in (None, "string_value"):
        return ""
    return compact_json(_plain(value)).encode()


def _plain(value: Any) -> Any:
    """An AnyValue as JSON knows it. Bytes become base64 and numbers that JSON lacks become words, as in OTLP/JSON."""
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return value.string_value
    if kind == "int_value":
        return value.int_value
    if kind == "bool_value":
        return value.bool_value
    if kind == "double_value":
        number = value.double_value
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {kv.key: _plain(kv.value) for kv in value.kvlist_value.values}
    return None
