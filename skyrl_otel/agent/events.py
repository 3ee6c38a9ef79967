"""Which lines are one event: tracebacks, stack dumps, printed structures.

An event is open from its first line on and keeps all that follows from being sent, so it must be certain to end: at a line of
its own process that does not belong to it; at the first line that was seen 0.2 s after its last one; at a journaled cut;
after 128 KB. All of that is said by bytes and decisions, so a second reading ends it at the same place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from skyrl_otel.agent import otlp, trace
from skyrl_otel.agent.formats.format import Kind
from skyrl_otel.agent.otlp import Value
from skyrl_otel.agent.recognise import Header
from skyrl_otel.agent.trace import TRACEBACK, Trace

EVENT_BYTES = 128 * 1024
EVENT_NS = 200_000_000
MOST_OPEN = 32

TRIGGER = TRACEBACK[:-1]
"""What makes a line with a header begin an event although the header does not, where the format repeats its header."""

# Frames of glog, absl, gdb, c10, Ray, faulthandler, and the lines around them.
_NATIVE = re.compile(
    rb"#\d+ |frame #\d+|PC: @|@ |\*\*\* |Stack trace|\[address_space|Exception raised from |Aborted at |what\(\):"
    rb"|Current thread|Thread 0x|Extension modules:|Python runtime state:|<no Python frame>|C stack trace|\[failure_signal"
    rb"|<omitting python frames>|[^\s()]{1,300}\([^()\n]{0,300}\) \[0x[0-9a-f]{4,16}\]"
)
_WHAT = re.compile(rb"\s+what\(\):")
_OPENERS, _CLOSERS = b"{[(:", b"}])"


class Line(NamedTuple):
    """One line as events see it. `text` has neither prefix nor header; `is_bar`: it was written over, so is no text's part."""

    start: int
    end: int
    text: bytes
    header: Header | None
    mark: int
    is_bar: bool = False


def kind_of(text: bytes, header: Header | None) -> Kind:
    """The kind of event that a line begins, "" for none."""
    if trace.begins(text):
        return "traceback"
    if header is not None:
        if header.format.kind:
            return header.format.kind
        if header.static.severity >= 17:
            return "error"
    if text and text[-1] in _OPENERS and (text[0] not in b" \t" if header is None else not header.format.repeats):
        return "block"
    return ""


class Event:
    """An event that is still open. `key` is the prefix of its process, `ranges` are the bytes of its lines.

    `is_complete`: nothing can follow.
    """

    __slots__ = (
        "_bytes",
        "_last_mark",
        "_stack",
        "_trace",
        "_what",
        "end",
        "first_end",
        "header",
        "is_complete",
        "key",
        "kind",
        "mark",
        "ranges",
        "start",
        "texts",
    )

    def __init__(self, key: bytes, kind: Kind, line: Line) -> None:
        self.key = key
        self.kind = kind
        self.header = line.header
        self.start, self.end = line.start, line.end
        self.first_end = line.end
        self.mark = self._last_mark = line.mark
        self.ranges: list[tuple[int, int]] = [(line.start, line.end)]
        self.texts = [line.text]
        self.is_complete = False
        self._bytes = len(line.text)
        self._trace = Trace()
        if kind == "traceback":
            self._trace.takes(line.text, False)
        else:
            self._trace.skip()
        # Whether frames of a native stack were seen, and how many lines its exception's message may still have.
        self._stack = kind == "native" or (kind == "error" and _NATIVE.match(line.text) is not None)
        self._what = 0

    def has_expired(self, start: int, mark: int) -> bool:
        """Whether no line from `start` on can belong to it."""
        return mark - self._last_mark >= EVENT_NS or start - self.start >= EVENT_BYTES

    def bears(self, line: Line) -> bool:
        """Whether `line`, which is not part of it, leaves it open: another process's line among the frames."""
        return self._trace.phase == "frames" and not line.text.startswith(TRACEBACK)

    @property
    def is_error(self) -> bool:
        """Whether it is one although no header says so."""
        return self.kind in ("error", "traceback", "native")

    def add(self, line: Line) -> bool:
        """Take `line` if it belongs here."""
        repeated = line.header is not None and not line.header.format.keep
        if line.is_bar or (repeated and not self._is_own(line.header)):
            return False
        if self._bytes + len(line.text) >= EVENT_BYTES or not self._continues(line.text, repeated):
            return False
        if self.ranges[-1][1] == line.start:
            self.ranges[-1] = (self.ranges[-1][0], line.end)
        else:
            self.ranges.append((line.start, line.end))
        self.end = line.end
        if repeated or not self._is_said(line.text):
            self._last_mark = line.mark
        self._bytes += len(line.text) + 1
        self.texts.append(line.text)
        return True

    def _is_said(self, text: bytes) -> bool:
        """Whether a line that was taken is of an exception's message. Such lines do not keep the event open."""
        return self._trace.phase == "raised" or (self._what > 0 and text[:1] not in b" \t")

    def _is_own(self, header: Header | None) -> bool:
        mine = self.header
        return (
            mine is not None
            and header is not None
            and mine.format is header.format
            and mine.format.repeats
            and mine.static == header.static
        )

    def _continues(self, text: bytes, repeated: bool) -> bool:
        if self.kind == "block":
            return self._continues_block(text)
        if self.kind == "warning":
            self.is_complete = True
            return text[:1] in b" \t" and bool(text)
        if self._trace.phase or trace.begins(text):
            return self._trace.takes(text, repeated)
        if not self._continues_stack(text, repeated):
            return False
        self._trace.skip()
        return True

    def _continues_stack(self, text: bytes, repeated: bool) -> bool:
        if not text:
            self._what = 0
            return self._stack
        if repeated and self._stack:
            return _NATIVE.match(text.lstrip()) is not None
        if text[:1] in b" \t":
            self._what = trace.MOST_LINES if _WHAT.match(text) else self._what
            return True
        if _NATIVE.match(text):
            self._what = 0
            self._stack = not repeated
            return self._stack
        self._what = max(self._what - 1, 0)
        return self._what > 0 and not repeated

    def _continues_block(self, text: bytes) -> bool:
        if not text:
            return False
        if text[0] in _CLOSERS:
            self.is_complete = True
            return True
        return text[0] in b" \t"

    # -- the record ----------------------------------------------------------------------------------------------------

    def mask(self, text: Callable[[bytes], bytes]) -> None:
        """Mask, by `text`, what only its lines together give away."""
        whole = b"\n".join(self.texts)
        masked = text(whole)
        if masked is not whole:
            self.texts = masked.split(b"\n")

    def body(self) -> bytes:
        """All of it, as it was written less prefixes and headers."""
        return b"\n".join(self.texts).rstrip(b"\n")

    def attributes(self) -> dict[str, Value]:
        """What is known of the exception, and the byte ranges beyond the first."""
        found: dict[str, Value] = {**self._trace.exception(self.texts)}
        if len(self.ranges) > 1:
            found["skyrl.more_ranges"] = ",".join(f"{start}-{end}" for start, end in self.ranges[1:])
        return found


def ranges_of(more: str) -> list[tuple[int, int]]:
    """The attribute `skyrl.more_ranges`, read back."""
    return [(int(start), int(end)) for start, _, end in (item.partition("-") for item in more.split(",") if item)]


def encoded_attributes(event: Event) -> bytes:
    """The attributes of its record beyond those of a line."""
    return otlp.attributes(event.attributes())
