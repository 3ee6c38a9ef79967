"""What of a writer is acknowledged by the receiver; everything below may be punched and will not be sent again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_otel.spool.decisions import RULES_VERSION
from skyrl_otel.spool.layout import read_file, replace_file


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
        replace_file(path, json.dumps(content).encode())

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """An empty one where there is none. Raises ValueError for a file that is no checkpoint, OSError."""
        try:
            content = json.loads(read_file(path))
        except FileNotFoundError:
            return cls()
        return cls({name: Position(*fields) for name, fields in content["files"].items()}, content["decisions"])
