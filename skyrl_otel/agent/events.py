"""Which lines are one event: tracebacks, stack dumps, printed structures.

An event is open from its first line on and keeps all that follows from being sent, so it must be certain to end: at a line of
its own process that does not belong to it; at the first line that was seen 0.2 s after its last one; at a journaled cut;
after 128 KB. All of that is said by bytes and decisions, so a second reading ends it at the same place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from skyrl_otel.agent import otlp
from skyrl_otel.agent.formats.format import Kind
from skyrl_otel.agent.otlp import Value
from skyrl_otel.agent.recognise import Header

EVENT_BYTES = 128 * 1024
EVENT_NS = 200_000_000
MOST_OPEN = 32

_STACKTRACE_BYTES = 16 * 1024  # Loki takes 64 KB of structured metadata an entry

TRACEBACK = b"Traceback (most recent call last):"
_GROUP = re.compile(rb"\s*\+ Exception Group Traceback \(most recent call last\):")
_CHAINED = (
    b"During handling of the above exception, another exception occurred:",
    b"The above exception was the direct cause of the following exception:",
)
_RAISED = re.compile(rb"([A-Za-z_][\w.<>]*)(?:: (.*)|:)?$", re.DOTALL)
# Frames of glog, absl, gdb, c10, Ray, faulthandler, and the lines around them.
_NATIVE = re.compile(
    rb"\s+\S|#\d+ |frame #\d+|PC: @|@ |\*\*\* |Stack trace|\[address_space|Exception raised from |Aborted at |what\(\):"
    rb"|Current thread|Thread 0x|Extension modules:|Python runtime state:|<no Python frame>|C stack trace|\[failure_signal"
)
_LOGURU_FRAME = b"> File "
_OPENERS, _CLOSERS = b"{[(:", b"}])"
TRIGGER = TRACEBACK[:-1]
"""What makes a line with a header begin an event although the header does not, where the format repeats its header."""


class Line(NamedTuple):
    """One line as events see it. `text` has neither prefix nor header."""

    start: int
    end: int
    text: bytes
    header: Header | None
    mark: int


def kind_of(text: bytes, header: Header | None) -> Kind:
    """The kind of event that a line begins, "" for none."""
    if text.startswith(TRACEBACK):
        return "traceback"
    if text[:1] in b" +" and _GROUP.match(text):
        return "group"
    if header is not None:
        if header.format.kind:
            return header.format.kind
        if header.static.severity >= 17:
            return "error"
    if text and text[-1] in _OPENERS and (text[0] not in b" \t" if header is None else not header.format.repeats):
        return "block"
    return ""


class Event:
    """An event that is still open. `key` is the prefix of its process, `ranges` are the bytes of its lines."""

    __slots__ = (
        "_bytes",
        "_last_mark",
        "_phase",
        "end",
        "first_end",
        "header",
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
        self._bytes = len(line.text)
        self._phase = {"traceback": "frames", "group": "group"}.get(kind, "")

    def has_expired(self, start: int, mark: int) -> bool:
        """Whether no line from `start` on can belong to it."""
        return mark - self._last_mark >= EVENT_NS or start - self.start >= EVENT_BYTES

    def bears(self, line: Line) -> bool:
        """Whether `line`, which is not part of it, leaves it open: another process's line among the frames."""
        return self._phase == "frames" and not line.text.startswith(TRACEBACK)

    @property
    def is_error(self) -> bool:
        """Whether it is one although no header says so."""
        return self.kind in ("error", "traceback", "group", "native")

    def add(self, line: Line) -> bool:
        """Take `line` if it belongs here."""
        repeated = line.header is not None and not line.header.format.keep
        if repeated and not self._is_own(line.header):
            return False
        if self._bytes + len(line.text) >= EVENT_BYTES or not self._continues(line.text, repeated):
            return False
        if self.ranges[-1][1] == line.start:
            self.ranges[-1] = (self.ranges[-1][0], line.end)
        else:
            self.ranges.append((line.start, line.end))
        self.end = line.end
        self._last_mark = line.mark
        self._bytes += len(line.text) + 1
        self.texts.append(line.text)
        return True

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""
        return self._phase == "done"

    def _is_own(self, header: Header | None) -> bool:
        mine = self.header
        return (
            mine is not None
            and header is not None
            and mine.format is header.format
            and mine.format.repeats
            and mine.static.fields == header.static.fields
        )

    def _continues(self, text: bytes, repeated: bool) -> bool:
        if self.kind == "block":
            return self._continues_block(text)
        if self.kind == "warning":
            self._phase = "done"
            return text[:1] in b" \t" and bool(text)
        if text.startswith(TRACEBACK) or _GROUP.match(text):
            # Behind a message or the sentence that chains them. Right behind another one it is another process's.
            if self._phase not in ("", "chained"):
                return False
            self._phase = "frames" if text.startswith(TRACEBACK) else "group"
            return True
        if self._phase == "frames":
            return self._continues_frames(text)
        if self._phase == "group" and text.lstrip()[:1] in (b"|", b"+"):
            return True
        if self._phase:
            if text in _CHAINED:
                self._phase = "chained"
                return True
            return repeated or not text or text[:1] in b" \t"
        if self.kind == "native":
            return not text or _NATIVE.match(text) is not None
        return bool(text) and (text[:1] in b" \t" or (not repeated and _NATIVE.match(text) is not None))

    def _continues_frames(self, text: bytes) -> bool:
        if text[:1] in b" \t" or text.startswith(_LOGURU_FRAME):  # the empty text too
            return True
        if _RAISED.match(text) is None:
            return False
        self._phase = "raised"
        return True

    def _continues_block(self, text: bytes) -> bool:
        if not text:
            return False
        if text[0] in _CLOSERS:
            self._phase = "done"
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
        found = self._exception()
        if len(self.ranges) > 1:
            found["skyrl.more_ranges"] = ",".join(f"{start}-{end}" for start, end in self.ranges[1:])
        return found

    def _exception(self) -> dict[str, Value]:
        first = next((n for n, text in enumerate(self.texts) if text.startswith(TRACEBACK) or _GROUP.match(text)), None)
        if first is None:
            return {}
        raised = None
        for number in range(first + 1, len(self.texts)):
            if self.texts[number][:1] not in b" \t" and self.texts[number - 1][:1] in b" \t":
                raised = _RAISED.match(self.texts[number]) or raised
        if raised is None and _GROUP.match(self.texts[first]):
            inside = (
                text.lstrip(b" |+")
                for text in self.texts[first + 1 :]
                if text.startswith(b"  | ") and text[4:5] != b" "
            )
            raised = next((match for text in inside if (match := _RAISED.match(text))), None)
        stack = b"\n".join(self.texts[first:]).rstrip(b"\n").decode("utf-8", "replace")
        found: dict[str, Value] = {"exception.stacktrace": _shortened(stack)}
        if raised:
            found["exception.type"] = raised[1].decode()
            found["exception.message"] = (raised[2] or b"").decode("utf-8", "replace")[:4096]
        return found


def ranges_of(more: str) -> list[tuple[int, int]]:
    """The attribute `skyrl.more_ranges`, read back."""
    return [(int(start), int(end)) for start, _, end in (item.partition("-") for item in more.split(",") if item)]


def encoded_attributes(event: Event) -> bytes:
    """The attributes of its record beyond those of a line."""
    return otlp.attributes(event.attributes())


def _shortened(text: str) -> str:
    # The beginning says where it was called, the end what happened.
    if len(text) <= _STACKTRACE_BYTES // 2:
        return text
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= _STACKTRACE_BYTES:
        return text
    head, tail = encoded[: _STACKTRACE_BYTES // 3], encoded[-2 * _STACKTRACE_BYTES // 3 :]
    return head.decode("utf-8", "ignore") + "\n  [...]\n" + tail.decode("utf-8", "ignore")
