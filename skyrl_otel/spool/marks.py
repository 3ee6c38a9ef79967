"""Marks round text that a process writes to its launcher and that shall be shown and not recorded.

`ESC _ <nonce> <  text  ESC _ <nonce> >`: an APC string (ECMA-48), which a terminal that should ever see one ignores. The
nonce is the launcher's, in SKYRL_OTEL_ECHO with the device and inode of each stream that it reads; a process marks
nothing that it writes elsewhere. One write(2) holds both marks and is no longer than what a pipe takes at once, so nobody's
text comes between them.
"""

from __future__ import annotations

from collections.abc import Iterator

NONCE_BYTES = 16
_MOST_BYTES = 4096  # PIPE_BUF
_TEXT_BYTES = _MOST_BYTES - 2 * (NONCE_BYTES + 3)


def opening(nonce: bytes) -> bytes:
    return b"\x1b_" + nonce + b"<"


def closing(nonce: bytes) -> bytes:
    return b"\x1b_" + nonce + b">"


def wrapped(data: bytes, nonce: bytes) -> Iterator[bytes]:
    """`data` in marks, in pieces that a pipe takes whole."""
    for start in range(0, len(data), _TEXT_BYTES):
        yield opening(nonce) + data[start : start + _TEXT_BYTES] + closing(nonce)


class Unmarker:
    """Takes the marks out of a stream of bytes, however it is cut into chunks."""

    def __init__(self, nonce: bytes) -> None:
        self._opening, self._closing = opening(nonce), closing(nonce)
        self._held = b""
        # A pty makes two bytes of each newline.
        self._most = 3 * _MOST_BYTES

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """(bytes, whether they are to be recorded), in order, without marks. What may be the half of a mark, or of a marked
        text, waits for more."""
        if not self._held and b"\x1b_" not in data and data[-1:] != b"\x1b":
            return [(data, True)]
        data = self._held + data
        self._held = b""
        found: list[tuple[bytes, bool]] = []
        while data:
            start = data.find(self._opening)
            if start < 0:
                keep = _common(data, self._opening)
                self._held = data[len(data) - keep :]
                data = data[: len(data) - keep]
                if data:
                    found.append((data, True))
                break
            if start:
                found.append((data[:start], True))
            inside = start + len(self._opening)
            end = data.find(self._closing, inside)
            if end < 0:
                if len(data) - inside <= self._most:
                    self._held = data[start:]
                    break
                # Its writer died within the write: an ordinary text after all.
                data = data[inside:]
                continue
            found.append((data[inside:end], False))
            data = data[end + len(self._closing) :]
        return found

    def rest(self) -> bytes:
        """The stream is over: what still waited, to be recorded."""
        held, self._held = self._held, b""
        return held.removeprefix(self._opening)


def _common(data: bytes, mark: bytes) -> int:
    """How many bytes at the end of `data` are the beginning of `mark`."""
    for size in range(min(len(mark) - 1, len(data)), 0, -1):
        if data.endswith(mark[:size]):
            return size
    return 0
