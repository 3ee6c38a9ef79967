"""What of a writer is acknowledged by the receiver; everything below may be punched and will not be sent again.

The file is a row of frames, as `records` are; the last whole one holds. Replacing a file by rename would do as well, but ext4
writes such a file to the disk at once (its `auto_da_alloc`), which takes a hundred times as long as appending.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_otel.spool import frames
from skyrl_otel.spool.decisions import RULES_VERSION
from skyrl_otel.spool.layout import open_file, read_file, replace_file, write_all

_LONGEST_BYTES = 64 << 10
"""A file that has grown to this is replaced by one frame."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in one file: all bytes below `offset` of `generation` are acknowledged.

    `state` is the assembler's state there, `tail` the CRC-32 of the (up to 64) bytes before it, by which a file that was
    truncated and has grown again is told from one that only grew.
    """

    generation: int
    offset: int
    state: Any = None
    tail: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`decisions` is the lowest journal seq whose own record (loss, end, event) is not acknowledged."""

    files: dict[str, Position] = field(default_factory=dict)
    decisions: int = 0

    def write(self, path: Path) -> None:
        """Raises OSError; then the old checkpoint stays."""
        files = {name: [p.generation, p.offset, p.state, p.tail] for name, p in self.files.items()}
        content = {"files": files, "decisions": self.decisions, "rules": RULES_VERSION}
        frame = frames.encode(json.dumps(content).encode())
        descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            if size < _LONGEST_BYTES:
                # What a full disk leaves of a frame is passed over by readers, as any torn one is.
                write_all(descriptor, frame)
                return
        finally:
            os.close(descriptor)
        replace_file(path, frame)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """An empty one where there is none. Raises ValueError for a file that holds something else, OSError."""
        try:
            data = read_file(path)
        except FileNotFoundError:
            return cls()
        last = max(frames.scan(data), key=lambda item: item.end, default=None)
        if last is None:
            if data:
                raise ValueError(f"{path} holds no checkpoint")
            return cls()
        assert isinstance(last, frames.Frame)  # a gap is never the last
        content = json.loads(last.payload)
        return cls({name: Position(*fields) for name, fields in content["files"].items()}, content["decisions"])
