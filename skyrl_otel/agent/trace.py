"""A printed Python traceback, line by line: which lines belong to it, and what was raised.

Nothing marks the end of an exception's message, and most that end a training run have several lines (CUDA, NCCL, pydantic,
Ray). So all behind the line that names the exception is its message, up to a blank line; `agent/events.py` ends it by time too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TRACEBACK = b"Traceback (most recent call last):"
MOST_LINES = 64
"""Lines of a message that are neither indented nor under a header of their own: more are somebody's ordinary output."""

_GROUP = re.compile(rb"\s*\+ Exception Group Traceback \(most recent call last\):")
_CLOSES = re.compile(rb"\s+\+-+")
_CHAINED = (
    b"During handling of the above exception, another exception occurred:",
    b"The above exception was the direct cause of the following exception:",
)
# "ray.exceptions.RayTaskError(ValueError): " is the name of a class, too.
_RAISED = re.compile(rb"([A-Za-z_][\w.<>]*(?:\([\w.]{1,200}\))?)(?:: (.*)|:)?$", re.DOTALL)
_LOGURU_FRAME = b"> File "
_STACKTRACE_BYTES = 16 * 1024  # Loki takes 64 KB of structured metadata an entry
_MESSAGE_BYTES = 4096


def begins(text: bytes) -> bool:
    """Whether a line is the first of a traceback."""
    return text.startswith(TRACEBACK) or (text[:1] in b" +" and _GROUP.match(text) is not None)


class Trace:
    """Takes lines in order. `phase` is "" before the first traceback: then what a line means is not known here."""

    __slots__ = ("_first", "_is_group", "_last", "_lines", "_message", "_plain", "_says", "phase")

    def __init__(self) -> None:
        self.phase = ""
        self._lines = 0
        self._first = -1
        self._is_group = False
        self._last = b""
        self._plain = 0
        self._says = False
        self._message = (-1, -1)

    def skip(self) -> None:
        """A line that is not of the traceback."""
        self._lines += 1

    def takes(self, text: bytes, repeated: bool) -> bool:
        """Take `text` if it belongs here; `repeated`: the writer put the same header before it."""
        if not (self._begins(text) if begins(text) else self._continues(text, repeated)):
            return False
        if self.phase == "raised" and text:
            self._message = (self._message[0], self._lines + 1)
        self._last = text
        self._lines += 1
        return True

    def _begins(self, text: bytes) -> bool:
        # Behind a log message, the sentence that chains them, or one of a message that quotes it. Else it is another process's.
        if self.phase not in ("", "chained"):
            return self.phase == "raised" and self._last.rstrip().endswith(b":")
        self.phase = "frames" if text.startswith(TRACEBACK) else "group"
        if self._first < 0:
            self._first, self._is_group = self._lines, self.phase == "group"
        return True

    def _continues(self, text: bytes, repeated: bool) -> bool:
        if self.phase == "frames":
            return self._is_frame(text, repeated)
        if self.phase == "group" and text.lstrip()[:1] in (b"|", b"+"):
            return True
        if text in _CHAINED:
            self.phase = "chained"
            return True
        if repeated or text[:1] in b" \t":  # the empty text too
            return True
        if self._plain == MOST_LINES or not self._may_say():
            return False
        self._plain += 1
        self._says = True
        return True

    def _may_say(self) -> bool:
        if self.phase == "group":  # Python 3.11 has no margin before the second line of a message
            return bool(self._last) and _CLOSES.fullmatch(self._last) is None
        return self.phase == "raised" and (bool(self._last) or not self._says)

    def _is_frame(self, text: bytes, repeated: bool) -> bool:
        if text[:1] in b" \t" or text.startswith(_LOGURU_FRAME):  # the empty text too
            return True
        match = _RAISED.match(text)
        if match is None:
            return repeated
        self.phase = "raised"
        self._plain, self._says = 0, bool(match[2])
        self._message = (self._lines, self._lines)
        return True

    def exception(self, texts: Sequence[bytes]) -> dict[str, str]:
        """The attributes `exception.*`; `texts` are all lines that were taken or skipped."""
        if self._first < 0:
            return {}
        stack = b"\n".join(texts[self._first :]).rstrip(b"\n").decode("utf-8", "replace")
        found = {"exception.stacktrace": _shortened(stack)}
        first, end = self._message
        raised = _RAISED.match(texts[first]) if first >= 0 else None
        if raised is None and self._is_group:
            raised, end = _of_group(texts[self._first + 1 :]), 0
        if raised:
            message = b"\n".join((raised[2] or b"", *texts[first + 1 : end])).rstrip()
            found["exception.type"] = raised[1].decode("utf-8", "replace")
            found["exception.message"] = message.decode("utf-8", "replace")[:_MESSAGE_BYTES]
        return found


def _of_group(texts: Sequence[bytes]) -> re.Match[bytes] | None:
    inside = (text.lstrip(b" |+") for text in texts if text.startswith(b"  | ") and text[4:5] != b" ")
    return next((match for text in inside if (match := _RAISED.match(text))), None)


def exception_of(stack: str) -> dict[str, str]:
    """The attributes `exception.*` of a stack that is given as a whole."""
    texts = stack.encode("utf-8", "replace").split(b"\n")
    trace = Trace()
    for text in texts:
        if trace.phase or begins(text):
            trace.takes(text, True)
        else:
            trace.skip()
    return trace.exception(texts) or {"exception.stacktrace": _shortened(stack)}


def _shortened(text: str) -> str:
    # The beginning says where it was called, the end what happened.
    if len(text) <= _STACKTRACE_BYTES // 4:
        return text
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= _STACKTRACE_BYTES:
        return text
    head, tail = encoded[: _STACKTRACE_BYTES // 3], encoded[-2 * _STACKTRACE_BYTES // 3 :]
    return head.decode("utf-8", "ignore") + "\n  [...]\n" + tail.decode("utf-8", "ignore")
