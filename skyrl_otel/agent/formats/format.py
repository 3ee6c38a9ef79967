"""What a log format is: how its header looks, where the fields stand in it, and real lines to show it.

A header is what stands before the message. It decides by itself: a format never looks at the message, so that the same header
always means the same, whatever follows. That is what lets the reader look a whole header up in a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from skyrl_otel.agent.otlp import Value

Kind = Literal["", "error", "traceback", "native", "block", "warning"]
"""Which lines may follow and belong to the same event; see `agent/events.py`."""

LEVELS: Mapping[bytes, int] = {
    b"trace": 1,
    b"debug": 5,
    b"d": 5,
    b"info": 9,
    b"i": 9,
    b"notice": 10,
    b"success": 10,
    b"warning": 13,
    b"warn": 13,
    b"w": 13,
    b"error": 17,
    b"e": 17,
    b"err": 17,
    b"exception": 17,
    b"critical": 21,
    b"fatal": 21,
    b"panic": 21,
    b"dpanic": 21,
    b"f": 21,
    b"c": 21,
}
"""OTLP's SeverityNumber of a word or letter, in lower case."""

ERROR, FATAL = 17, 21


@dataclass(frozen=True, slots=True)
class Parsed:
    """One line that a `parse` function took apart.

    `time_ns` is absolute, or None; `when` and `zone` are texts as the groups of a pattern are.
    """

    message: bytes
    level: bytes = b""
    logger: bytes = b""
    time_ns: int | None = None
    when: bytes = b""
    fraction: bytes = b""
    zone: bytes = b""
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """One line of the table in `formats/__init__.py`.

    Args:
        name: as the docs and tests call it.
        first: the bytes that a line of it can begin with.
        pattern: the header, matched at the start of a line; the message is what follows it. Groups, all optional: `when`,
            `fraction`, `zone`, `epoch` (seconds since 1970), `level`, `logger`, `file`, `line`, `function`, `pid`, `thread`.
        date: what stands in `when`, in strptime's letters Y m d H M S b y; a year or date that is missing is completed.
        stop: the bytes that end the header, for a format whose header repeats from line to line (no fraction, no logger):
            the header reaches to their first occurrence. Such formats are read fastest.
        scope: the scope of its records, where the pattern has no `logger`.
        level: the level of all its lines, where the pattern has no `level`.
        levels: words that are not in `LEVELS`, in lower case.
        repeats: its writer puts the header before each line of a message that has several.
        kind: which event a line of it begins, whatever its level; lines of level ERROR and above begin "error".
        keep: the header is part of the message.
        parse: instead of a pattern, for lines whose fields are not in order; None says that the line is another's.
    """

    name: str
    first: bytes
    pattern: bytes = b""
    date: str = ""
    stop: bytes = b""
    scope: str = ""
    level: str = ""
    levels: Mapping[bytes, int] = field(default_factory=dict)
    repeats: bool = False
    kind: Kind = ""
    keep: bool = False
    parse: Callable[[bytes], Parsed | None] | None = None

    def severity(self, level: bytes) -> int:
        """OTLP's SeverityNumber of a level as the format writes it, 0 where it is unknown."""
        word = level.strip().lower()
        return self.levels.get(word) or LEVELS.get(word, 0)
