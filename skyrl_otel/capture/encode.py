"""What a Python program says in a record, as the bytes of one OTLP `ScopeLogs`: `opentelemetry/proto/logs/v1/logs.proto`.

Made by concatenation, because it runs inside every log call of a training process. The parts that all records of a place
in the source share, and those that all records of a thread share, are encoded once; `taker.py` keeps them.
Whatever a value is, it becomes something: nothing here raises, and a lone surrogate becomes a question mark.
"""

from __future__ import annotations

import logging
import struct
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

_fixed64 = struct.Struct("<Q").pack
_double = struct.Struct("<d").pack

MESSAGE_BYTES = 16 << 20
"""A longer message is cut, and says so: a frame holds 64 MB, and no receiver takes a record of that size."""

_TEXT_BYTES = 1 << 20
_NAME_BYTES = 4096  # keys, loggers, levels
_EXTRAS_BYTES = 16 << 20  # what is nested, odd or long in a record's extras, all together
_ITEM_BYTES = 128  # what one counts besides its text: less in bytes, but it takes time too, about a microsecond
_DEPTH = 8
_ITEMS = 1000


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


def field(key: bytes, payload: bytes) -> bytes:
    """A length-delimited field; `key` is the encoded tag."""
    return key + varint(len(payload)) + payload


# Made at import, which each worker's start waits for: without a call for each.
_VARINTS = [bytes((n,)) for n in range(128)] + [bytes((n & 127 | 128, n >> 7)) for n in range(128, 2048)]


def body(text: str) -> bytes:
    """LogRecord.body; long texts are cut."""
    data = text.encode("utf-8", "replace")
    if len(data) > MESSAGE_BYTES:
        data = cut(data)
    return before_body(len(data)) + data


def before_body(size: int) -> bytes:
    """What precedes a text of that length in LogRecord.body."""
    length = varint(size)
    return b"\x2a" + varint(1 + len(length) + size) + b"\x0a" + length


def cut(data: bytes) -> bytes:
    """A text that is too long for a body, made shorter."""
    return data[:MESSAGE_BYTES].decode("utf-8", "ignore").encode() + b" [cut: %d bytes]" % len(data)


def scope(name: str) -> bytes:
    """ScopeLogs.scope."""
    return field(b"\x0a", field(b"\x0a", _name(name)))


def severity(level: int, name: str) -> bytes:
    """LogRecord.severity_number and severity_text of a `logging` or loguru level.

    As OpenTelemetry's own bridge maps `logging` levels (sdk/_logs, std_to_otel); below DEBUG it has nothing, here is TRACE.
    """
    if level < 10:
        number = 1 if level > 0 else 0
    elif level >= 50:
        number = min(21 + level - 50, 24)
    else:
        number = 5 + (level // 10 - 1) * 4 + min(level % 10, 3)
    text = field(b"\x1a", _name(name)) if name else b""
    return (b"\x10" + varint(number) if number else b"") + text


def attribute(key: str, value: Any) -> bytes:
    """One of LogRecord.attributes, of any value there is."""
    encoded = _Values().encode(value, 0)
    return field(b"\x32", field(b"\x0a", key.encode("utf-8", "replace")) + field(b"\x12", encoded))


_PLAIN = list(logging.LogRecord("", 0, "", 0, "", (), None).__dict__)
PLAIN_COUNT = len(_PLAIN)
# Ray sets it in each record of its processes, behind the plain ones (ray/_private/log.py): the time once more.
_RAYS = "_ray_timestamp_ns"
_ENDS = frozenset((_PLAIN[-1], _RAYS))
#: What every LogRecord has; what else is in its `__dict__` came by `extra=`. Formatters add three of them.
STANDARD = frozenset(_PLAIN) | {"taskName", "message", "asctime", _RAYS}

_MOST_KEYS = 1024
_SHORT = 100
# What precedes a value in LogRecord.attributes, by key and by the value's length. Not of keys in `STANDARD`, nor of long ones.
_Heads = dict[str, dict[int, bytes]]
_texts: _Heads = {}
_ints: _Heads = {}
_floats: _Heads = {}
_bools: _Heads = {}


def plain_extras(fields: dict[str, Any]) -> bytes | None:
    """A LogRecord's extras, where all have values of the commonest types, and keys seen before; they stand last.

    None where one has not, or is in `STANDARD`: then `attributes` is for them. Nobody else's code runs within.
    """
    parts: list[bytes] = []  # backwards
    add = parts.append
    try:
        for key in reversed(fields):
            if key in _ENDS:
                parts.reverse()
                count = len(fields) - PLAIN_COUNT - (key == _RAYS)
                return b"".join(parts) if len(parts) == 2 * count else None
            value = fields[key]
            kind = type(value)
            if kind is str and len(value) < _SHORT:
                add(data := value.encode())
                add(_texts[key][len(data)])
            elif kind is int:
                add(data := _VARINTS[value] if 0 <= value < 2048 else _positive(value))
                add(_ints[key][len(data)])
            elif kind is float:
                add(_double(value))
                add(_floats[key][8])
            elif kind is bool:
                add(_VARINTS[value])
                add(_bools[key][1])
            else:
                return None
    except Exception:  # a key, a length, a text as never before; or another thread has just added one
        return None
    return None


def _positive(value: int) -> bytes:
    if 0 <= value < 1 << 63:
        return varint(value)
    raise ValueError


def attributes(fields: Mapping[Any, Any], keys: Sequence[Any]) -> bytes:
    """Those of `fields` that `keys` name, in that order; a key that is no string becomes one."""
    values = _Values()
    parts = []
    for key in keys[:_ITEMS]:
        value = fields.get(key)
        data = values.encode(value, 0)
        name = key if type(key) is str else shown(key)
        whole = field(b"\x32", field(b"\x0a", _name(name)) + field(b"\x12", data))
        parts.append(whole)
        if len(data) < _SHORT and len(name) < _SHORT and name not in STANDARD:
            _keep_head(name, type(value), whole, data)
    if len(keys) > _ITEMS:
        parts.append(attribute("…", "what more there is was left out"))
    return b"".join(parts)


def _keep_head(key: str, kind: type, whole: bytes, data: bytes) -> None:
    """For the next value of that key, type and length."""
    heads = {str: _texts, int: _ints, float: _floats, bool: _bools}.get(kind)
    if heads is None:
        return
    if len(heads) >= _MOST_KEYS:
        heads.clear()
    size = len(data) - (2 if kind is str else 1)
    heads.setdefault(key, {})[size] = whole[: len(whole) - size]


def code(path: str, line: int, function: str) -> bytes:
    """Where in the source: OTel semantic conventions, "code" (stable since 1.33)."""
    return b"".join(
        (
            attribute("code.file.path", path),
            attribute("code.line.number", line),
            attribute("code.function.name", function),
        )
    )


def thread(ident: int | None, name: str | None) -> bytes:
    """Which thread: OTel semantic conventions, "thread"."""
    return (attribute("thread.id", ident) if ident is not None else b"") + (
        attribute("thread.name", name) if name else b""
    )


def exception(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bytes:
    """What was raised: OTel semantic conventions, "exception"."""
    if kind is None and error is None:
        return b""
    kind = type(error) if kind is None and error is not None else kind
    module = getattr(kind, "__module__", "")
    name = getattr(kind, "__qualname__", None) or shown(kind)
    try:
        lines = "".join(traceback.format_exception(kind, error, trace))
    except Exception as failure:
        lines = f"(its trace could not be formatted: {type(failure).__name__})"
    return b"".join(
        (
            attribute("exception.type", name if module in ("builtins", "__main__", None) else f"{module}.{name}"),
            attribute("exception.message", shown(error, str)),
            attribute("exception.stacktrace", lines),
        )
    )


def span(trace_id: int, span_id: int, flags: int) -> bytes:
    """LogRecord.flags, trace_id and span_id."""
    return (
        b"\x45"
        + struct.pack("<I", flags)
        + b"\x4a\x10"
        + trace_id.to_bytes(16, "big")
        + b"\x52\x08"
        + span_id.to_bytes(8, "big")
    )


_showing = threading.local()


def shown(value: Any, how: Callable[[Any], str] = repr) -> str:
    """`repr` of a value, or what can be said of one that has none. A repr that logs a value whose repr logs ends here."""
    depth = getattr(_showing, "depth", 0)
    if depth >= 2:
        return f"<{type(value).__name__}>"
    _showing.depth = depth + 1
    try:
        text = how(value)
        return text if type(text) is str else str.__str__(text)
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__} when shown>"
    finally:
        _showing.depth = depth


class _Values:
    """AnyValue of anything. One for each record: it bounds what all its attributes take together.

    The bound is on bytes, of which each item takes some: neither many values nor long ones make a frame that is refused.
    """

    __slots__ = ("_left", "_open")

    def __init__(self) -> None:
        self._left = _EXTRAS_BYTES
        self._open: set[int] = set()

    def encode(self, value: Any, depth: int) -> bytes:
        self._left -= _ITEM_BYTES
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind is bool:
            return b"\x10\x01" if value else b"\x10\x00"
        if kind is int:
            return b"\x18" + varint(value) if -(1 << 63) <= value < 1 << 63 else self._text(_big(value))
        if kind is float:
            return b"\x21" + _double(value)
        if value is None:
            return b""
        if depth >= _DEPTH or self._left <= 0 or id(value) in self._open:
            return self._text(f"<{kind.__name__}>")
        self._open.add(id(value))
        try:
            return self._other(value, depth)
        except Exception as error:
            return self._text(f"<{kind.__name__}: {type(error).__name__} when read>")
        finally:
            self._open.discard(id(value))

    def _other(self, value: Any, depth: int) -> bytes:
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(memoryview(value).cast("B")[: self._allowed()])
            self._left -= len(data)
            return field(b"\x3a", data)
        if isinstance(value, Mapping):
            return field(b"\x32", self._pairs(value, depth))
        if isinstance(value, list | tuple | set | frozenset):
            return field(b"\x2a", self._items(value, depth))
        # A subclass of a plain type (an enum, a numpy float) counts as what it is; tensors and the rest as they show themselves.
        if isinstance(value, int | float | str):
            return self.encode(_plain(value), depth + 1)
        return self._text(shown(value))

    def _items(self, values: Iterable[Any], depth: int) -> bytes:
        parts = []
        # Copied in one step, which no other thread sees in the middle.
        for number, item in enumerate(list(islice(values, _ITEMS + 1))):
            if number >= _ITEMS or self._left <= 0:
                parts.append(field(b"\x0a", _ETC))
                break
            parts.append(field(b"\x0a", self.encode(item, depth + 1)))
        return b"".join(parts)

    def _pairs(self, values: Mapping[Any, Any], depth: int) -> bytes:
        parts = []
        for number, (key, item) in enumerate(list(islice(values.items(), _ITEMS + 1))):
            if number >= _ITEMS or self._left <= 0:
                parts.append(field(b"\x0a", _ETC))
                break
            name = _name(key if type(key) is str else shown(key, str))
            self._left -= len(name)
            pair = field(b"\x0a", name) + field(b"\x12", self.encode(item, depth + 1))
            parts.append(field(b"\x0a", pair))
        return b"".join(parts)

    def _text(self, value: str) -> bytes:
        data = _utf8(value, self._allowed())
        self._left -= len(data)
        return field(b"\x0a", data)

    def _allowed(self) -> int:
        return max(min(_TEXT_BYTES, self._left), _SHORT)


def _name(value: Any) -> bytes:
    """A key, or the name of a logger or level, as UTF-8."""
    return _utf8(value if isinstance(value, str) else shown(value, str), _NAME_BYTES)


def _utf8(text: str, most: int) -> bytes:
    """At most `most` bytes of it; then how many it had. It is not all encoded for that."""
    if len(text) <= most:
        data = text.encode("utf-8", "replace")
        if len(data) <= most:
            return data
        size = len(data)
    else:
        size = len(text) if text.isascii() else sum(map(_encoded_size, _chunks(text)))
        data = text[:most].encode("utf-8", "replace")
    return data[:most].decode("utf-8", "ignore").encode() + b" [cut: %d bytes]" % size


def _chunks(text: str) -> Iterator[str]:
    return (text[start : start + _TEXT_BYTES] for start in range(0, len(text), _TEXT_BYTES))


def _encoded_size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


_ETC = b"\x0a" + bytes((len("…".encode()),)) + "…".encode()  # the text of an item, or the key of a pair


def _plain(value: str | int | float) -> str | int | float:
    """Without the subclass, and without asking what it overrides."""
    if isinstance(value, str):
        return str.__str__(value)
    return int.__pos__(value) if isinstance(value, int) else float.__pos__(value)


def _big(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # sys.set_int_max_str_digits
        return hex(value)
