"""File descriptors 1 and 2: what they are, and pointing them somewhere else and back."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple

from skyrl_otel.capture import guard

STDOUT, STDERR = 1, 2
_LINE_BUFFERED = 1  # _IOLBF, stdio.h (glibc and musl)
_FIRST_SPARE = 10  # saved descriptors stay clear of the low numbers that shell scripts and `exec 3>` use

Kind = Literal["terminal", "file", "pipe", "closed"]


class Saved(NamedTuple):
    """Duplicates of what 1 and 2 were, to put back."""

    descriptors: dict[int, int]


class Place(NamedTuple):
    """A regular file, as `follow` in an identity line names it."""

    path: str
    dev: int
    ino: int
    size: int


def kind(descriptor: int) -> Kind:
    """What stands behind a descriptor; "pipe" for sockets and all other streams too."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return "closed"
    if stat.S_ISREG(mode):
        return "file"
    return "terminal" if os.isatty(descriptor) else "pipe"


def place(descriptor: int) -> Place | None:
    """The regular file behind a descriptor, or None. A file that was unlinked or replaced by now is None too."""
    try:
        found = os.fstat(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not stat.S_ISREG(found.st_mode) or not os.path.samestat(found, os.stat(path)):
            return None
    except OSError:
        return None
    return Place(path, found.st_dev, found.st_ino, found.st_size)


def place_of(path: str) -> Place | None:
    """The same for a path."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Place(path, found.st_dev, found.st_ino, found.st_size) if stat.S_ISREG(found.st_mode) else None


def file_of(descriptor: int) -> tuple[int, int] | None:
    """(device, inode) behind a descriptor; None for a closed one."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def leading_into(run: str) -> dict[int, str]:
    """Those of 1 and 2 that lead into a writer's folder of this run, and that folder: it is a redirected parent's."""
    found = {}
    for number in (STDOUT, STDERR):
        with suppress(OSError):
            behind = place(number)
            folder = os.path.dirname(behind.path) if behind else ""
            if folder and os.path.samefile(os.path.dirname(folder), run):
                found[number] = folder
    return found


def marked(echo: str) -> tuple[bytes, list[int]]:
    """What SKYRL_OTEL_ECHO (`nonce;dev:ino,…`) says: the nonce, and which of 1 and 2 lead to the launcher."""
    nonce, _, streams = echo.partition(";")
    launchers = set(streams.split(",")) if nonce else set()
    found = [(number, file_of(number)) for number in (STDOUT, STDERR)]
    return nonce.encode(), [number for number, file in found if file and f"{file[0]}:{file[1]}" in launchers]


def redirect(targets: dict[int, int]) -> Saved:
    """Point each descriptor at another open one, all or none.

    Args:
        targets: descriptor → the one it shall become a duplicate of.

    Raises:
        OSError: then everything is as before.
    """
    flush_buffers()
    saved: dict[int, int] = {}
    try:
        for descriptor in targets:
            saved[descriptor] = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE)
        for descriptor, target in targets.items():
            os.dup2(target, descriptor)
    except OSError:
        restore(Saved(saved))
        raise
    line_buffer_stdio()
    return Saved(saved)


def restore(saved: Saved) -> None:
    """Undo `redirect`."""
    flush_buffers()
    for descriptor, original in saved.descriptors.items():
        with guard.guarded("fds.restore"):
            os.dup2(original, descriptor)
            os.close(original)


def flush_buffers() -> None:
    """Push out what Python's streams and C's stdout and stderr hold, so that it lands where it was written to."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
    with guard.guarded("fds.fflush"):
        for name in ("stdout", "stderr"):
            _with_stdio(name, _libc.fflush)


def line_buffer_stdio() -> None:
    """Make C's stdout hand over each line: to a file it would hold 4 KB back, which SIGKILL then takes along.

    It gets a buffer of ours. Under PYTHONUNBUFFERED, which Ray sets, Python has left it one of a single byte, and glibc
    would keep that and write each line as its first character, its rest and its end.
    """
    global _stdio_buffer
    with guard.guarded("fds.setvbuf"):
        if _stdio_buffer is None:
            _libc.malloc.restype = ctypes.c_void_p
            _stdio_buffer = _libc.malloc(_STDIO_BYTES)  # never freed: C's own exit still writes through it
        buffer, size = ctypes.c_void_p(_stdio_buffer), ctypes.c_size_t(_STDIO_BYTES)
        _with_stdio("stdout", lambda stdout: _libc.setvbuf(stdout, buffer, _LINE_BUFFERED, size))


def _with_stdio(name: str, action: Callable[[ctypes.c_void_p], object]) -> None:
    """Call `action` with a stream of C's, unless another thread keeps its lock.

    Everything in stdio waits for that lock, `fflush(NULL)` for those of all files; and a thread that reads or writes there
    (Python's `input` on a terminal) holds it for as long as nobody types, or reads.
    """
    stream = ctypes.c_void_p.in_dll(_libc, name)
    for _ in range(_LOCK_TRIES):
        if _libc.ftrylockfile(stream) == 0:
            try:
                action(stream)
            finally:
                _libc.funlockfile(stream)
            return
        time.sleep(0.001)


_libc = ctypes.CDLL(None)
_STDIO_BYTES = 8192
_LOCK_TRIES = 20
_stdio_buffer: int | None = None
