"""Waking up without polling: inotify one-shot watches, and what to do where there are none.

A watch costs every write(2) of the writer a queued event, so a busy file has no watch: it is looked at on each pass. A file
that was quiet for a while gets a watch for one event (IN_ONESHOT) and is left alone until that comes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_MODIFY, _CLOSE_WRITE, _MOVED_TO, _MOVE_SELF, _DELETE_SELF = 0x2, 0x8, 0x80, 0x800, 0x400
_IGNORED, _ONESHOT, _OVERFLOW = 0x8000, 0x80000000, 0x4000
_EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Watcher:
    """inotify(7). Without it (`available` is False, or `arm` returned False) the caller looks on a timer."""

    def __init__(self) -> None:
        self.fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self.available = self.fd >= 0
        self._keys: dict[int, str] = {}

    def watch_folder(self, path: Path) -> bool:
        """The names of what is renamed into `path` come from `events`, as bytes."""
        return self._add(path, _MOVED_TO, "")

    def arm(self, path: str, key: str) -> bool:
        """`key` comes back once, when the file is written, closed by its last writer, moved or deleted."""
        return self._add(path, _MODIFY | _CLOSE_WRITE | _MOVE_SELF | _DELETE_SELF | _ONESHOT, key)

    def events(self) -> Iterator[str | bytes | None]:
        """The keys whose watches fired, and names. None among them: the queue overflowed, look at everything."""
        if not self.available:
            return
        while True:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return
            position = 0
            while position < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, position)
                name = data[position + _EVENT.size : position + _EVENT.size + length]
                position += _EVENT.size + length
                if mask & _OVERFLOW:
                    yield None
                elif mask & _IGNORED:
                    self._keys.pop(number, None)
                elif number in self._keys:
                    yield self._keys[number] or name.rstrip(b"\0")

    def _add(self, path: Path | str, mask: int, key: str) -> bool:
        if not self.available:
            return False
        number = _libc.inotify_add_watch(self.fd, os.fsencode(path), ctypes.c_uint32(mask))
        if number < 0:
            return False
        self._keys[number] = key
        return True
