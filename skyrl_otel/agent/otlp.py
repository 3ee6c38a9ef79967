"""OTLP bytes by hand: `opentelemetry/proto/logs/v1/logs.proto`, 1.x, wire format of protocol buffers.

Concatenation of precomputed pieces; the test suite reads the result back with the official classes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

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


_UID_KEY = field(b"\x0a", b"log.record.uid")


def uid_attribute(uid: bytes) -> bytes:
    """The attribute `log.record.uid`: a fixed key, one length byte as long as the uid is below 101 bytes."""
    size = len(uid)
    if size > 100:
        return attributes({"log.record.uid": uid.decode()})
    inner = _UID_KEY + b"\x12%c\x0a%c%b" % (size + 2, size, uid)
    return b"\x32%c%b" % (len(inner), inner)


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position` and the position behind it. Raises IndexError where the bytes end before it does."""
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7


def fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, end) of each field between; start and end enclose its content. Raises IndexError for what is cut."""
    while position < end:
        tag, position = read_varint(data, position)
        kind = tag & 7
        if kind == 2:
            size, position = read_varint(data, position)
            yield tag, position, position + size
            position += size
        elif kind == 0:
            start = position
            _, position = read_varint(data, position)
            yield tag, start, position
        else:
            size = 8 if kind == 1 else 4
            yield tag, position, position + size
            position += size


def body_of(record: bytes) -> str:
    """The text of a LogRecord's body; "" where it is none."""
    for tag, start, end in fields(record, 0, len(record)):
        if tag == 0x2A:
            for inner, at, stop in fields(record, start, end):
                if inner == 0x0A:
                    return record[at:stop].decode("utf-8", "replace")
    return ""


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
