"""Every record of loguru, of the one logger everybody imports and of isolated copies, whatever `remove()` takes away.

What it relies on (loguru 0.5 to 0.7, `_logger.py`): `Logger._log` gives up where `core.handlers` is empty or the level is
below `core.min_level`, and else calls `handler.emit(record, …)` for each of `core.handlers.values()`. Both attributes become
properties of the class `Core`: to whoever adds, removes, copies or pickles, `handlers` is the dictionary he put there, but
it is never empty and its `values()` begin with our tap; `min_level` is the lowest of theirs and stays where it was when none
is left, so that a program that removed all its sinks is heard at the level it had. No frame is added to anybody's call
(`opt(depth=…)`).

What a process pays: two property reads a call, also where loguru's own sinks would have refused the level; and one encoding.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from time import time_ns
from types import FrameType
from typing import Any
from zlib import crc32

from skyrl_otel.capture import encode, guard
from skyrl_otel.capture.console import Console
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import SEGMENT_BYTES, Records
from skyrl_otel.capture.taker import active_span
from skyrl_otel.spool import frames

# An intercept handler keeps the true logger's name here, where it keeps it at all.
_ORIGIN = "stdlib_logger"
_DEFAULT_LEVEL = 10  # loguru's own: LOGURU_LEVEL, DEBUG
_MOST_PLACES = 8192

_local = threading.local()
_installed: dict[str, Any] = {}


def current_extra() -> Any:
    """The `extra` of the record that this thread took last; None before."""
    return getattr(_local, "extra", None)


class Tap:
    """What loguru calls for each record; behaves as one of its handlers."""

    levelno = math.inf  # the lowest of the others counts

    def __init__(self, records: Records, levels: Levels) -> None:
        self._records = records
        self._levels = levels
        self._places: dict[tuple[Any, ...], tuple[bytes, bytes] | None] = {}

    def emit(self, record: Any, level_id: Any, from_decorator: Any, is_raw: Any, colored_message: Any) -> None:
        if not _installed:
            return
        try:
            extra = _local.extra = record["extra"]
            level = record["level"]
            name = (extra.get(_ORIGIN) if extra else None) or record["name"] or ""
            if _is_forwarded(record, level.no, _caller()):
                return
            # A patched record may claim any of these, and a number may have a name or none.
            key = (name, record["file"].path, record["line"], record["function"], level.no, level.name)
            place = self._places.get(key)
            if place is None:
                if key in self._places:
                    return
                place = self._new_place(key, name, record)
                if place is None:
                    return
            self._write(place, record, extra)
        except Exception as error:
            guard.failed("loguru.emit", error)

    def _new_place(self, key: Any, name: Any, record: Any) -> tuple[bytes, bytes] | None:
        if len(self._places) > _MOST_PLACES:
            self._places.clear()
        level, place = record["level"], None
        if self._levels.takes(str(name), level.no):
            where = encode.code(record["file"].path, record["line"], record["function"] or "")
            place = (encode.scope(str(name)), encode.severity(level.no, level.name) + where)
        self._places[key] = place
        return place

    def _write(self, place: tuple[bytes, bytes], record: Any, extra: Any) -> None:
        time = encode._fixed64(time_ns())
        thread = record["thread"]
        parts = [b"\x09", time, place[1], encode.body(record["message"]), encode.thread(thread.id, thread.name)]
        error = record["exception"]
        if error is not None:
            parts.append(encode.exception(error.type, error.value, error.traceback))
        if extra:
            parts.append(encode.attributes(extra, [key for key in extra if key != _ORIGIN]))
        parts += (active_span(), b"\x59", time)
        inner = b"".join(parts)
        payload = b"".join((place[0], b"\x12", encode.varint(len(inner)), inner))
        records = self._records
        records.write(frames.HEADER.pack(frames.MAGIC, len(payload), crc32(payload)) + payload)
        if records.size_bytes > SEGMENT_BYTES:
            records.next_segment()

    def stop(self) -> None:
        """Nothing: a program that removes all its handlers does not mean us."""

    def complete_queue(self) -> None:
        """Nothing waits."""

    def tasks_to_complete(self) -> list[Any]:
        return []

    def update_format(self, level_id: Any) -> None:
        """There is none."""

    def __repr__(self) -> str:
        return "(skyrl_otel)"


def _is_forwarded(record: Any, level: int, caller: FrameType | None) -> bool:
    """Whether a `logging` handler hands on here what it was called with: we have that, under its true logger's name.

    `caller` is who called loguru: then it is the handler's `emit`, called by `Handler.handle`. If the record claims another
    place than that `emit` (`depth`), it speaks for somebody else; if it claims none, the same level decides.
    """
    if caller is None:
        return False
    above = caller.f_back
    if above is None or above.f_code is not _HANDLE:
        return False
    original = above.f_locals.get("record")
    if not isinstance(original, logging.LogRecord) or original.process not in (None, os.getpid()):
        return False
    if record["function"] != caller.f_code.co_name or record["file"].path != caller.f_code.co_filename:
        return True
    return level == original.levelno


def _caller() -> FrameType | None:
    """Who called loguru; None where that was no Python: `atexit.register(logger.info, …)`."""
    try:
        return sys._getframe(4)
    except ValueError:
        return None


_HANDLE = logging.Handler.handle.__code__


class _Handlers(dict[Any, Any]):
    """loguru's handlers, which are never none: `values()` begin with ours. Copies and pickles as a plain dictionary."""

    __slots__ = ("_all", "lowest")

    def __init__(self, handlers: Any, tap: Tap, lowest: float) -> None:
        """`lowest`: the level where no handler is left to say one."""
        super().__init__(handlers)
        self._all = (tap, *handlers.values())
        self.lowest = min((handler.levelno for handler in handlers.values()), default=lowest)

    def __bool__(self) -> bool:
        return True

    def values(self) -> Any:
        return self._all

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def install(records: Records, levels: Levels, console: Console) -> None:
    """Tap loguru, which is imported. A second call changes nothing; raises AttributeError for a loguru without `Core`."""
    if _installed:
        return
    # Looked up, not imported: this is called because the program has imported them.
    core: Any = sys.modules["loguru._logger"].Core
    sink: Any = sys.modules["loguru._simple_sinks"].StreamSink
    if "handlers" not in vars(core()) or "min_level" not in vars(core()):
        raise AttributeError("this loguru keeps its handlers elsewhere; it is recorded as text")
    tap = Tap(records, levels)
    original_write = sink.write

    def handlers(self: Any) -> Any:
        fields = self.__dict__
        found = fields["handlers"]
        if type(found) is not _Handlers:
            found = fields["handlers"] = _Handlers(found, tap, _DEFAULT_LEVEL)
        return found

    def set_handlers(self: Any, value: Any) -> None:
        fields = self.__dict__
        before = fields.get("handlers")
        lowest = before.lowest if type(before) is _Handlers else _DEFAULT_LEVEL
        fields["handlers"] = _Handlers(value, tap, lowest)

    def min_level(self: Any) -> Any:
        return handlers(self).lowest

    def set_min_level(self: Any, value: Any) -> None:
        self.__dict__["min_level"] = value

    def write(self: Any, message: Any) -> Any:
        stream = self._stream
        instead = console.stand_in(stream) if console.modes else stream
        if instead is None:
            return None
        if instead is stream:
            return original_write(self, message)
        instead.write(message)
        if self._flushable:
            stream.flush()
        return None

    core.handlers = property(handlers, set_handlers)
    core.min_level = property(min_level, set_min_level)
    sink.write = write
    _installed.update(core=core, sink=sink, write=original_write)


def remove() -> None:
    """Put back what was there."""
    if not _installed:
        return
    core, sink = _installed["core"], _installed["sink"]
    del core.handlers, core.min_level
    sink.write = _installed["write"]
    _installed.clear()
    # Isolated copies keep their dictionary with the tap in it, which does nothing from here on.
    fields = sys.modules["loguru"].logger._core.__dict__
    own = dict(fields["handlers"])
    fields["handlers"], fields["min_level"] = own, min((h.levelno for h in own.values()), default=math.inf)
