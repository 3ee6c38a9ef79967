"""Where the user looks: the launcher's own stdout or stderr, with what the child prints and lines from elsewhere between.

What the child prints is passed on byte for byte. Lines from elsewhere (Ray's progress tasks, our own notices) stand on
rows of their own: a progress bar is wiped, the lines are printed, the bar is drawn again below them; a line that is
being written gets a moment to end first.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
import threading
import unicodedata

# How long a line from elsewhere waits for an unfinished one to end.
_PATIENCE_TTY_S = 0.05
_PATIENCE_FILE_S = 0.2
_TAIL_LIMIT = 4096
_COLOUR_OR_ERASE = re.compile(rb"\x1b\[[0-9;:]*[mK]")
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")


class Screen:
    """One descriptor to print on; several threads may.

    `gone` is True once a write failed because nobody reads there any more; `unprinted_bytes` counts what could not be
    written for any other reason (a full disk under `> file`).
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.is_tty = os.isatty(fd)
        self.gone = False
        self.unprinted_bytes = 0
        self.problem = ""
        self._tail = b""  # what stands in the last row: the bytes since the last newline
        self._row_ended = threading.Condition()  # its lock protects the descriptor and _tail
        self._waiting = 0

    def print(self, data: bytes) -> bool:
        """Pass on what the child wrote. False once nobody reads there any more."""
        with self._row_ended:
            written = self._write(data)
            newline = data.rfind(b"\n")
            self._tail = (self._tail + data if newline < 0 else data[newline + 1 :])[-_TAIL_LIMIT:]
            if self._waiting and not self._tail:
                self._row_ended.notify_all()
            return written

    def insert(self, lines: bytes) -> bool:
        """Print whole lines (each with its newline) on rows of their own. False once nobody reads there any more."""
        with self._row_ended:
            if self._tail and not (self.is_tty and b"\r" in self._tail):
                self._waiting += 1
                self._row_ended.wait_for(lambda: not self._tail, _PATIENCE_TTY_S if self.is_tty else _PATIENCE_FILE_S)
                self._waiting -= 1
            if not self._tail:
                return self._write(lines)
            bar = last_row(self._tail) if self.is_tty else None
            if bar is None or columns(bar) >= window_columns(self.fd):
                self._tail = b""
                return self._write(b"\n" + lines)
            return self._write(b"\r\x1b[K" + lines + bar)

    def end_row(self) -> None:
        """Go to the start of a row, below what stands in an unfinished one."""
        with self._row_ended:
            row = last_row(self._tail)
            if self.is_tty and (row is None or columns(row)):
                self._write(b"\n")
            self._tail = b""

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        while view and not self.gone:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                # Somebody else made the shared description non-blocking.
                select.select([], [self.fd], [])
            except (BrokenPipeError, ConnectionError):
                self.gone = True
            except OSError as error:
                if self.is_tty:  # EIO: the terminal hung up
                    self.gone = True
                else:
                    self.unprinted_bytes += len(view)
                    self.problem = error.strerror or str(error)
                    break
        return not self.gone


def last_row(tail: bytes) -> bytes | None:
    """The bytes that draw an unfinished row again, or None where it holds control sequences that move about."""
    ended = tail.rstrip(b"\r")
    row = ended.rpartition(b"\r")[2]
    if _CONTROL.search(_COLOUR_OR_ERASE.sub(b"", row)):
        return None
    return row + tail[len(ended) :]


def columns(row: bytes) -> int:
    """How many columns a row without cursor movement takes."""
    text = _COLOUR_OR_ERASE.sub(b"", row.replace(b"\r", b"")).decode(errors="replace").expandtabs(8)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def window_columns(fd: int) -> int:
    """The terminal's width; 80 where it does not say."""
    try:
        size = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return 80
    return int(struct.unpack("HHHH", size)[1]) or 80
