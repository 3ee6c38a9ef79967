"""Protocol buffer bytes without protocol buffer objects, for the part of a request that there is most of.

An object for each record, attribute and value costs more than all the rest of the decoding. So the outer messages are
walked here, and a record in the very shape that our agents give a line of text is picked apart in place; any other goes
through the official classes. Encoding: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import re
import struct

_fixed64 = struct.Struct("<Q").unpack_from

# The attributes log.iostream and log.record.uid (the byte before a uid is its length), then observed_time_unix_nano.
_TAIL = re.compile(
    rb"\x32\x18\x0a\x0clog\.iostream\x12\x08\x0a\x06(stdout|stderr)"
    rb"\x32.\x0a\x0elog\.record\.uid\x12.\x0a(.)(([0-9a-f]{32}/[a-z]+/[0-9]{1,9})/([0-9]{1,18})-([0-9]{1,18}))"
    rb"\x59.{8}",
    re.DOTALL,
).fullmatch

# time, observed time, body, stream, source, start, end
TextLine = tuple[int, int, str, str, str, int, int]


class Malformed(ValueError):
    """The bytes are no protocol buffer message."""


def fields(data: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """(number, begin, end) of each length-delimited field of the message data[at:end]; others are passed over.

    Raises:
        Malformed: it is cut off or no message.
    """
    found = []
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(data, at - 1)
            if tag < 8:
                raise Malformed(f"field 0 at byte {at}")
            kind = tag & 7
            if kind == 2:
                size = data[at]
                at += 1
                if size > 0x7F:
                    size, at = _varint(data, at - 1)
                begin, at = at, at + size
                found.append((tag >> 3, begin, at))
            elif kind == 0:
                _, at = _varint(data, at)
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise Malformed(f"wire type {kind} at byte {at}")
    except IndexError:
        raise Malformed("the message is cut off") from None
    if at != end:
        raise Malformed("a field is longer than its message")
    return found


def text_line(data: bytes, at: int, end: int) -> TextLine | None:
    """The LogRecord data[at:end] if it has the shape that our agents give a line of text, else None.

    Raises:
        UnicodeDecodeError: the body is not UTF-8, which protocol buffers do not allow either.
    """
    if end - at < 100 or data[at] != 0x09 or data[at + 9] != 0x2A:  # fixed64 time_unix_nano, then body
        return None
    begin = at + 11
    while data[begin - 1] > 0x7F:  # the AnyValue's length
        begin += 1
    if data[begin] != 0x0A:  # not a string
        return None
    size = data[begin + 1]
    begin += 2
    if size > 0x7F:
        size, begin = _varint(data, begin - 1)
    stop = begin + size
    tail = _TAIL(data, stop, end)
    if tail is None:
        return None
    stream, uid_size, uid, source, first, last = tail.groups()
    if uid_size[0] != len(uid):
        return None
    return (
        _fixed64(data, at + 1)[0],
        _fixed64(data, end - 8)[0],
        data[begin:stop].decode(),
        "stdout" if stream == b"stdout" else "stderr",
        source.decode(),
        int(first),
        int(last),
    )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Malformed("a number has more than 64 bits")
