"""OTLP bytes by hand: `opentelemetry/proto/logs/v1/logs.proto`, 1.x, wire format of protocol buffers.

Concatenation of precomputed pieces; the test suite reads the result back with the official classes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

Value = str | bool | int | float | bytes

_fixed64 = struct.Struct("<Q").pack
_double = struct.Struct("<d").pack


def varint(value: int) -> bytes:
    """Base-128, least significant group first; negative numbers as 64-bit two's complement."""
    if value < 0:
        value += 1 << 64
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


LONGEST_BODY = 2048
LENGTHS = [varint(size) for size in range(4 * LONGEST_BODY)]
"""Small numbers, encoded."""
BODIES: list[bytes | None] = [
    b"\x2a" + varint(1 + len(varint(size)) + size) + b"\x0a" + varint(size) if size else None
    for size in range(LONGEST_BODY)
]
"""What stands before a text body, by its length; None for the empty one."""


def field(key: bytes, payload: bytes) -> bytes:
    """A length-delimited field; `key` is the encoded tag."""
    return key + varint(len(payload)) + payload


def any_value(value: Value) -> bytes:
    """AnyValue. A string is made valid UTF-8 first: one lone surrogate would cost a receiver the whole request."""
    if isinstance(value, str):
        return field(b"\x0a", value.encode("utf-8", "replace"))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + varint(value) if -(1 << 63) <= value < 1 << 63 else any_value(str(value))
    if isinstance(value, float):
        return b"\x21" + _double(value)
    return field(b"\x3a", value)


def key_value(key: str, value: Value) -> bytes:
    """KeyValue."""
    return field(b"\x0a", key.encode("utf-8", "replace")) + field(b"\x12", any_value(value))


def resource(attributes: Mapping[str, Value]) -> bytes:
    """Resource, as the field of ResourceLogs."""
    return field(b"\x0a", b"".join(field(b"\x0a", key_value(k, v)) for k, v in attributes.items()))


def scope(name: str) -> bytes:
    """InstrumentationScope, as the field of ScopeLogs."""
    return field(b"\x0a", field(b"\x0a", name.encode()))


def attributes(values: Mapping[str, Value]) -> bytes:
    """The attributes of a LogRecord, as its repeated field."""
    return b"".join(field(b"\x32", key_value(key, value)) for key, value in values.items())


def text_record(time_unix_nano: int, body: bytes, encoded_attributes: bytes) -> bytes:
    """LogRecord, as the field of ScopeLogs, whose time and observed time are the same.

    `body` is valid UTF-8; `encoded_attributes` is as `attributes` makes them.
    """
    size = len(body)
    text = b"\x0a" + varint(size) + body
    time = _fixed64(time_unix_nano)
    record = b"\x09%b\x2a%b%b%b\x59%b" % (time, varint(len(text)), text, encoded_attributes, time)
    return b"\x12" + varint(len(record)) + record


def event_record(
    time_unix_nano: int, name: str, severity: tuple[int, str], body: str, values: Mapping[str, Value]
) -> bytes:
    """LogRecord with an event name, as the field of ScopeLogs; severity is (SeverityNumber, text)."""
    time = _fixed64(time_unix_nano)
    record = b"".join(
        (
            b"\x09" + time,
            b"\x10" + varint(severity[0]),
            field(b"\x1a", severity[1].encode()),
            field(b"\x2a", any_value(body)),
            # Loki drops event_name, so it is an attribute too.
            attributes({"event.name": name, **values}),
            b"\x59" + time,
            field(b"\x62", name.encode()),
        )
    )
    return b"\x12" + varint(len(record)) + record


def scope_logs(encoded_scope: bytes, records: Iterable[bytes]) -> bytes:
    """ScopeLogs, as the field of ResourceLogs."""
    return field(b"\x12", encoded_scope + b"".join(records))


def resource_logs(encoded_resource: bytes, encoded_scopes: Iterable[bytes]) -> bytes:
    """ResourceLogs, as the field of ExportLogsServiceRequest. Requests are the concatenation of these."""
    return field(b"\x0a", encoded_resource + b"".join(encoded_scopes))
