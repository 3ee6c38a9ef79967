"""The console echo of records that we took: said once in the record, so it must not be recorded a second time as text.

Which text is an echo is decided by where it is written: by a console handler (`logging.StreamHandler`, loguru's stream
sink, rich's handler) into a descriptor that somebody records. What becomes of it depends on who records that descriptor:

- `skip`: the spool does (an infra process). The handler is not called; nobody reads that console.
- `mark`: the launcher does. The text goes there as ever, between two marks that the launcher takes out: it shows the text
  and does not record it (`spool/marks.py`).
- `note`: the agent does, in somebody else's file. The text goes there as ever, in one write(2), and the offsets at which
  it came to stand are noted behind the record.

While records cannot be written, echoes are left alone: the text is then all there is.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from skyrl_otel.capture import fds, guard
from skyrl_otel.capture.records import Records
from skyrl_otel.spool import frames, marks

_MOST_STREAMS = 64

Mode = Literal["skip", "mark", "note"]


class Console:
    """What is done with the echo on descriptors 1 and 2; `modes` lacks those that nobody records."""

    def __init__(self, records: Records) -> None:
        self.modes: dict[int, Mode] = {}
        self.nonce = b""
        self._records = records
        self._readers: dict[tuple[int, int], int] = {}
        self._streams: dict[int, EchoStream] = {}
        self._numbers: dict[int, tuple[weakref.ref[Any], int]] = {}

    def watch(self, modes: Mapping[int, Mode], nonce: bytes = b"") -> None:
        """What becomes of echoes on descriptors 1 and 2 from now on."""
        self.nonce, self.modes = nonce, dict(modes)
        self._numbers = {}

    def stand_in(self, stream: Any) -> Any:
        """What a console handler that writes to `stream` should write to instead: None for nothing, `stream` for itself."""
        if type(stream) is EchoStream:
            stream = stream.original
        modes = self.modes
        if not modes or self._records.failing:
            return stream
        try:
            descriptor = stream.fileno()
        except Exception:  # a StringIO, a closed file, whatever somebody made
            return stream
        number = descriptor if descriptor in modes else self._number(stream, descriptor)
        mode = modes.get(number)
        if mode is None:
            return stream
        if mode == "skip":
            return None
        known = self._streams.get(id(stream))
        if known is None or known.original is not stream:
            known = self._streams[id(stream)] = EchoStream(self, stream, descriptor, number)
        return known

    def _number(self, stream: Any, descriptor: int) -> int:
        """1 or 2 where a stream of another number leads to the same file, pipe or terminal: `FileHandler("/dev/stderr")`.

        Asked once for each stream. -1 where it leads elsewhere.
        """
        known = self._numbers.get(id(stream))
        if known is not None and known[0]() is stream:
            return known[1]
        file = fds.file_of(descriptor)
        number = next((one for one in self.modes if file is not None and fds.file_of(one) == file), -1)
        if len(self._numbers) > _MOST_STREAMS:
            self._numbers.clear()
        with suppress(TypeError):  # somebody's own class, without weak references
            self._numbers[id(stream)] = weakref.ref(stream), number
        return number

    def must_show(self, record: object) -> bool:
        """Whether a record could not be taken, so that its echo must stand where it was going to."""
        return record is self._records.untaken

    def write(self, descriptor: int, number: int, data: bytes) -> bool:
        """Write an echo; False where it has to go the ordinary way. Raises OSError as write(2) does.

        `number` is 1 or 2: which of them `descriptor` leads to the same place as.
        """
        mode = None if self._records.failing else self.modes.get(number)
        if mode == "mark":
            for piece in marks.wrapped(data, self.nonce):
                _write_all(descriptor, piece)
            return True
        if mode == "note":
            written = os.write(descriptor, data)
            if written < len(data):  # in two writes somebody else's may stand between: then both stay
                _write_all(descriptor, data[written:])
                return True
            with guard.guarded("console.note"):
                self._note(descriptor, number, data)
            return True
        return mode == "skip"

    def _note(self, descriptor: int, number: int, data: bytes) -> None:
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        found = os.fstat(descriptor)
        start = end - len(data)
        # Another thread may have written between the two calls: then these are not the bytes, and both stay.
        if os.pread(self._reader(descriptor, found), len(data), start) != data:
            guard.counts["console.unsure"] += 1
            return
        note = {
            "echo": "out" if number == 1 else "err",
            "dev": found.st_dev,
            "ino": found.st_ino,
            "start": start,
            "end": end,
        }
        self._records.write(frames.encode(json.dumps(note).encode()))

    def _reader(self, descriptor: int, found: os.stat_result) -> int:
        key = (found.st_dev, found.st_ino)
        if key not in self._readers:
            for reader in self._readers.values():
                os.close(reader)
            self._readers = {key: os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)}
        return self._readers[key]


class EchoStream:
    """In a console handler in the place of its stream: the same in all respects but where text goes."""

    __slots__ = ("_console", "_descriptor", "_number", "original")

    def __init__(self, console: Console, original: Any, descriptor: int, number: int) -> None:
        self.original = original
        self._console = console
        self._descriptor = descriptor
        self._number = number

    def write(self, text: str) -> Any:
        original = self.original
        if not text or (type(text) is not str and not isinstance(text, str)):
            return original.write(text)
        try:
            original.flush()
            encoding, errors = original.encoding or "utf-8", original.errors or "backslashreplace"
            data = text.encode(encoding, errors)
        except Exception:
            return original.write(text)
        if self._console.write(self._descriptor, self._number, data):
            return len(text)
        return original.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    # Programs ask whether a handler writes to sys.stderr: tqdm.contrib.logging does.
    def __eq__(self, other: object) -> bool:
        return self.original is (other.original if type(other) is EchoStream else other)

    def __hash__(self) -> int:
        return hash(self.original)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
