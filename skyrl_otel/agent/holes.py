"""Holes in a file that still grows: the space behind the checkpoint, and of what was given up, goes back to the disk.

They are punched in small steps, because a writer's write(2) waits meanwhile, and end a little before the first byte that is
still needed: its tail is compared to tell a file that was overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from skyrl_otel.spool.layout import punch

TAIL_BYTES = 64
"""Bytes before a position that its `tail` is the CRC of."""

_STEP_BYTES = 1 << 20
_BLOCK = 4096


class Holes:
    """How far one file is punched already."""

    __slots__ = ("_behind", "_losses")

    def __init__(self, first_data: int = 0) -> None:
        self._behind = first_data
        self._losses = 0

    def dig_behind(self, descriptor: int, acked: int) -> None:
        """Whole steps below `acked`. Raises OSError."""
        end = _block_below(acked - TAIL_BYTES)
        while end - self._behind >= _STEP_BYTES:
            punch(descriptor, self._behind, _STEP_BYTES)
            self._behind += _STEP_BYTES

    def dig_losses(self, descriptor: int, ranges: Iterable[tuple[int, int]]) -> None:
        """The blocks of what was given up, by offset. Raises OSError."""
        for start, end in ranges:
            last = _block_below(end - TAIL_BYTES)
            dig(descriptor, max(-_block_below(-start), self._losses), last)
            self._losses = max(self._losses, last)


def dig(descriptor: int, first: int, last: int) -> None:
    """Punch [first, last), which are the edges of blocks, step by step. Raises OSError."""
    for start in range(first, last, _STEP_BYTES):
        punch(descriptor, start, min(_STEP_BYTES, last - start))


def dig_to(descriptor: int, end: int) -> None:
    """Punch a file from its beginning to the last edge of a block below `end`. Raises OSError."""
    dig(descriptor, 0, _block_below(end))


def first_data(descriptor: int) -> int:
    """The block with the first byte that is not punched; 0 where there is none."""
    try:
        return _block_below(os.lseek(descriptor, 0, os.SEEK_DATA))
    except OSError:  # ENXIO: no data at all
        return 0


def _block_below(offset: int) -> int:
    return offset // _BLOCK * _BLOCK
