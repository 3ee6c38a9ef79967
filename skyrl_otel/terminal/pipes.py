"""The child's output: which descriptor gets a pty and which a pipe, and the threads that carry bytes across.

Each chunk goes to the spool first and to the screen after that. One thread per stream blocks in the screen's write(2) as
the child itself would have: a slow reader slows the child, and only that stream of it.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from skyrl_otel.spool.marks import Unmarker
from skyrl_otel.terminal import pty
from skyrl_otel.terminal.screen import Screen

_CHUNK = 1 << 16
# With its writers gone silent for this long after the child's exit, a stream that a grandchild holds open is over.
_QUIET_S = 0.2
# A grandchild that goes on printing is left behind after this long.
_PATIENCE_S = 2.0
# How long a line from elsewhere waits for what the child printed before it.
_ORDER_S = 0.1
_TERMINAL_FD_FROM = 190  # above what shell scripts redirect, below the usual limit of 1024

StreamName = Literal["out", "err"]


@dataclass(slots=True)
class Stream:
    """One output of the child: the descriptors it takes the place of, its two ends, and where it is shown."""

    name: StreamName
    replaces: tuple[int, ...]
    ours: int
    childs: int
    screen: Screen

    @property
    def is_pty(self) -> bool:
        return self.screen.is_tty


def open_streams() -> list[Stream]:
    """A stream for each of stdout and stderr that is open; one for both where they are the same open file.

    Two ptys or pipes cannot be read in the order they were written in, and `tqdm.write` between two bars, or a traceback
    among prints, shows that at once. So where both lead to the same place, order wins: the stream is "out", as it is for
    whoever writes `2>&1`.

    Raises:
        OSError: no pty or pipe is to be had.
    """
    out, err = _is_open(1), _is_open(2)
    if out and err and _same_file(1, 2):
        return [_open("out", (1, 2))]
    streams = [_open("out", (1,))] if out else []
    return [*streams, _open("err", (2,))] if err else streams


def _open(name: StreamName, replaces: tuple[int, ...]) -> Stream:
    screen = Screen(replaces[0])
    ours, childs = pty.open_like(replaces[0]) if screen.is_tty else os.pipe()
    return Stream(name, replaces, ours, childs, screen)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _same_file(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    if stat.S_ISCHR(first.st_mode):
        # /dev/null keeps no order; ttys are one where they are the same device.
        return first.st_rdev == second.st_rdev and os.isatty(one)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


class Pump(threading.Thread):
    """Carries one stream: child → spool → screen.

    `lost_bytes` counts what the spool did not take (a full disk); the user saw those all the same.
    """

    def __init__(self, stream: Stream, spool_fd: int, on_loss: Callable[[OSError], None], nonce: str) -> None:
        super().__init__(name=f"skyrl-otel-{stream.name}", daemon=True)
        self.stream = stream
        self.lost_bytes = 0
        self._read_bytes = 0
        self._carried_bytes = 0
        self._spool_fd = spool_fd
        self._on_loss = on_loss
        self._wake = os.eventfd(0)
        self._ended_at = 0.0
        self._owed = 0
        self._unmarker = Unmarker(nonce.encode())
        # Held from a read until its bytes are recorded and counted, so that `salvage` cannot come between and `settle`
        # sees them either unread or counted.
        self._reading = threading.Lock()

    def run(self) -> None:
        poller = select.poll()
        poller.register(self.stream.ours, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._is_over():
            ready = dict(poller.poll(_QUIET_S * 1000 if self._ended_at else None))
            if self._wake in ready:
                poller.unregister(self._wake)
            elif not ready:
                return
            if self.stream.ours not in ready:
                continue
            data, size = self._read_and_record()
            if data and not self.stream.screen.print(data):
                self._hang_up()
                return
            if not size:
                return
            self._carried_bytes += size

    def end(self) -> None:
        """The child is gone: carry what it left, then stop at the end of file or at silence."""
        self._owed = _unread(self.stream.ours)
        self._ended_at = time.monotonic()
        os.eventfd_write(self._wake, 1)

    def settle(self, timeout_s: float) -> None:
        """Wait until what the child has written by now is carried."""
        deadline = time.monotonic() + timeout_s
        while self.is_alive() and time.monotonic() < deadline:
            with self._reading:
                if not _unread(self.stream.ours) and self._carried_bytes == self._read_bytes:
                    return
            time.sleep(0.001)

    def salvage(self) -> None:
        """Record what is left without showing it, if the thread still hangs in the screen's write(2)."""
        if self.is_alive():
            self._take_what_is_there()

    def _is_over(self) -> bool:
        return bool(self._ended_at) and self._owed <= 0 and time.monotonic() - self._ended_at > _PATIENCE_S

    def _read_and_record(self) -> tuple[bytes, int]:
        """What is to be shown, and how many bytes were read: 0 at the end. The echo of records is shown, not recorded."""
        with self._reading:
            try:
                data = os.read(self.stream.ours, _CHUNK)
            except OSError:  # EIO: nobody holds the pty's other end any more
                data = b""
            if not data:
                rest = self._unmarker.rest()
                self._record(rest)
                return rest, 0
            self._owed -= len(data)
            self._read_bytes += len(data)
            pieces = self._unmarker.feed(data)
            for piece, is_recorded in pieces:
                if is_recorded:
                    self._record(piece)
            return b"".join(piece for piece, _ in pieces), len(data)

    def _record(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._spool_fd, view) :]
            except OSError as error:
                if not self.lost_bytes:
                    self._on_loss(error)
                self.lost_bytes += len(view)
                return

    def _hang_up(self) -> None:
        # The child's next write must fail as it would have without us; what was accepted before is recorded.
        self._take_what_is_there()
        os.close(self.stream.ours)

    def _take_what_is_there(self) -> None:
        left = max(_unread(self.stream.ours), 1)
        os.set_blocking(self.stream.ours, False)
        while left > 0:
            _, size = self._read_and_record()
            if not size:
                return
            left -= size


def _unread(fd: int) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])
    except OSError:
        return 0


class Inlet(threading.Thread):
    """The terminal descriptor: what the child writes there is shown and not recorded, in whole lines.

    Progress that Ray forwards from another process comes this way: its own process has recorded it. `number` is the
    descriptor's number in the child.
    """

    def __init__(self) -> None:
        super().__init__(name="skyrl-otel-terminal", daemon=True)
        self._ours, self.childs = os.pipe()
        self.number = _free_number(self.childs)
        self._beside: Pump | None = None

    def show_beside(self, pump: Pump | None) -> None:
        """Show it on that stream's screen, after what the child printed there before. None: nowhere."""
        self._beside = pump

    def run(self) -> None:
        rest = b""
        while data := os.read(self._ours, _CHUNK):
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if len(rest) > _CHUNK:
                whole, newline, rest = whole + newline + rest, b"\n", b""
            if newline:
                self._show(whole + newline)
        if rest:
            self._show(rest + b"\n")

    def _show(self, lines: bytes) -> None:
        if self._beside is not None:
            self._beside.settle(_ORDER_S)
            self._beside.stream.screen.insert(lines)


def _free_number(fd: int) -> int:
    try:
        probe = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _TERMINAL_FD_FROM)
    except OSError:  # a tight limit on descriptors
        probe = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(probe)
    return probe
