"""Frames: how `records.<n>` and `decisions` hold more than text in an append-only file.

``magic b"\\xf5SO1" | payload length u32le | CRC-32 of the payload u32le | payload``

The first magic byte never occurs in UTF-8. A frame that a kill tore is followed, in a file that several processes
append to, by whole frames of others: a reader that meets anything but a frame scans on to the next one whose checksum
holds, and says how many bytes it passed over.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"\xf5SO1"
HEADER = struct.Struct("<4sII")
MAX_PAYLOAD = 64 << 20


class Frame(NamedTuple):
    """One whole frame: its payload and the byte range [start, end) it stands in, header included."""

    start: int
    end: int
    payload: bytes


class Gap(NamedTuple):
    """Bytes [start, end) that are no frame, with a frame after them."""

    start: int
    end: int


def encode(payload: bytes) -> bytes:
    """One frame. Raises ValueError for a payload over 64 MB, which a reader would refuse."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes is over {MAX_PAYLOAD}")
    return HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


def scan(data: bytes, base: int = 0) -> Iterator[Frame | Gap]:
    """Frames and gaps in `data`, whose first byte has offset `base`.

    Stops before a tail that is no whole frame: it may be a write in progress, only the caller knows. The tail begins
    where the last yielded item ends.
    """
    gap = 0
    found = data.find(MAGIC)
    while found >= 0:
        end = _whole(data, found)
        following = -1 if end is None else data.find(MAGIC, end)
        if end is None or (following != end != len(data) and _is_borrowed(data, found, end)):
            found = data.find(MAGIC, found + 1)
            continue
        if found > gap:
            yield Gap(base + gap, base + found)
        yield Frame(base + found, base + end, data[found + HEADER.size : end])
        gap, found = end, following


def sizes(descriptor: int, start: int) -> Iterator[int]:
    """The size of each record's frame from offset `start` on, by its header alone: a note of an echo is no record."""
    while len(head := os.pread(descriptor, HEADER.size + 1, start)) > HEADER.size:
        magic, length, _ = HEADER.unpack_from(head)
        if magic != MAGIC:
            found = os.pread(descriptor, 1 << 20, start).find(MAGIC, 1)
            start += found if found > 0 else (1 << 20) - len(MAGIC)
            continue
        if head[-1:] != b"{":
            yield HEADER.size + length
        start += HEADER.size + length


def _is_borrowed(data: bytes, start: int, end: int) -> bool:
    """Whether the last bytes of a frame are the next one's first: a torn one that happens to end in what was written next."""
    next_one = data.find(MAGIC, max(start + 1, end - HEADER.size), end + len(MAGIC) - 1)
    return next_one >= 0 and _whole(data, next_one) is not None


def _whole(data: bytes, start: int) -> int | None:
    body = start + HEADER.size
    if body > len(data):
        return None
    _, length, checksum = HEADER.unpack_from(data, start)
    if length > MAX_PAYLOAD or body + length > len(data):
        return None
    return body + length if zlib.crc32(memoryview(data)[body : body + length]) == checksum else None
