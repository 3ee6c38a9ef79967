"""The agent's journal: whatever a clock or a late fact decided, written down before anything built on it is sent.

Records are a pure function of (bytes, decisions, rules version), so that a second reading after a crash gives the same
records, byte for byte. One journal per writer, framed as `records` are; the kinds are in `docs/contracts.md`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skyrl_otel.spool import frames
from skyrl_otel.spool.layout import open_file, read_file, replace_file, write_all

Kind = Literal["mark", "cut", "identity", "generation", "loss", "echo", "end", "event", "zone"]

RULES_VERSION = 4
"""Raised whenever the same bytes and decisions would give other records than before."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`offset` is a byte offset in `generation` of `file`; `value` depends on the kind."""

    seq: int
    file: str
    generation: int
    offset: int
    kind: Kind
    value: Any
    rules: int = RULES_VERSION

    def encode(self) -> bytes:
        fields = [self.seq, self.file, self.generation, self.offset, self.kind, self.value, self.rules]
        return frames.encode(json.dumps(fields, separators=(",", ":")).encode())


class Journal:
    """The open journal of one writer. `decisions` is what stood in it when it was opened."""

    __slots__ = ("_fd", "_path", "_pending", "_torn", "decisions", "next_seq", "size")

    def __init__(self, path: Path, decisions: list[Decision], size: int) -> None:
        self._path = path
        self._fd = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._pending: list[bytes] = []
        self.decisions = decisions
        self.next_seq = decisions[-1].seq + 1 if decisions else 0
        self.size = size
        self._torn = False

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read the journal and cut a torn tail off. Raises OSError."""
        try:
            data = read_file(path, 1 << 30)
        except FileNotFoundError:
            data = b""
        found = list(frames.scan(data))
        end = found[-1].end if found else 0
        if end < len(data):
            os.truncate(path, end)
        return cls(path, [_decode(item.payload) for item in found if isinstance(item, frames.Frame)], end)

    def add(self, file: str, generation: int, offset: int, kind: Kind, value: Any) -> Decision:
        """Decide; on disk only after `flush`."""
        decision = Decision(self.next_seq, file, generation, offset, kind, value)
        self.next_seq += 1
        self._pending.append(decision.encode())
        return decision

    def flush(self) -> None:
        """Append what was decided since, in one write(2). Raises OSError; then nothing may be sent yet.

        After an error nothing of it stands in the file, and the next call tries again.
        """
        if not self._pending:
            return
        data = b"".join(self._pending)
        if self._torn:
            self._cut_back()
        try:
            write_all(self._fd, data)
        except OSError:
            self._torn = True
            self._cut_back()
            raise
        self._pending.clear()
        self.size += len(data)

    def _cut_back(self) -> None:
        os.ftruncate(self._fd, self.size)
        self._torn = False

    def rewrite(self, kept: Iterable[Decision]) -> None:
        """Replace the journal by `kept`, which keep their seq. Raises OSError; then the old one stays."""
        self.flush()
        data = b"".join(decision.encode() for decision in kept)
        replace_file(self._path, data)
        descriptor = open_file(self._path, os.O_WRONLY | os.O_APPEND)
        os.close(self._fd)
        self._fd = descriptor
        self.size = len(data)

    def close(self) -> None:
        os.close(self._fd)


def _decode(payload: bytes) -> Decision:
    return Decision(*json.loads(payload))
