"""The hot path: a `logging.LogRecord` becomes one frame with one write(2), inside the user's log call.

One function, with everything it uses in its closure, because each call and each attribute of our own would show in the
cost of a record (`python -m benchmarks handler`). Records of one place in the source and one thread whose message has the
same length, and whose extras have, begin with the same bytes: all that is before the message's text. These are kept, with
their checksum, which the rest's goes on from.
No lock: appending is atomic, dictionaries are too, and nothing is shared between two records that are under way.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from math import trunc
from time import time_ns
from typing import Any
from zlib import crc32

from skyrl_otel.capture import encode, guard
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import SEGMENT_BYTES, Records
from skyrl_otel.spool import frames

Take = Callable[[logging.LogRecord], bool]

_MOST_PLACES = 8192
_MOST_HEADS = 4096
_HEAD_SHARED_BELOW = 1024  # bytes after the head: longer records rarely have the same length, and cost more elsewhere

# A frame's header in two steps: what is the same for all frames of one length, and the checksum.
_pack_length = struct.Struct("<4sI").pack
_pack_header = struct.Struct("<8sI").pack
_pack_times = struct.Struct("<BQBQ").pack
_TIMES_BYTES = 18


def make_take(
    records: Records,
    levels: Levels,
    is_known: Callable[[logging.LogRecord], bool] | None = None,
    is_elsewhere: Callable[[logging.LogRecord], bool] | None = None,
) -> Take:
    """A function that writes a record and says whether it did: False also where the levels leave it out.

    `is_known` is asked of records with a field `extra`, as loguru's have: whether this one was taken before, in another form.
    `is_elsewhere` is asked of records of another process: whether that has taken it.
    """
    heads: dict[tuple[Any, ...], tuple[bytes, bytes, int]] = {}
    pack_times, pack_header = _pack_times, _pack_header
    write, modules, join = os.write, sys.modules, b"".join
    log_record, plain_count, longest, most = logging.LogRecord, encode.PLAIN_COUNT, encode.MESSAGE_BYTES, SEGMENT_BYTES
    takes = lru_cache(_MOST_PLACES)(levels.takes) if levels else None
    active_context: Callable[[], Any] | None = None

    def new_head(record: logging.LogRecord, text_size: int, rest_size: int) -> tuple[bytes, bytes, int]:
        name, path, line, level = record.name, record.pathname, record.lineno, record.levelno
        ident, thread = record.thread, record.threadName
        size = text_size + _TIMES_BYTES + rest_size
        place = b"".join(
            (
                _place(path, line, record.funcName or "", level, record.levelname),
                _thread(ident, thread),
                encode.before_body(text_size),
            )
        )
        prefix = b"".join((_scope(name), b"\x12", encode.varint(len(place) + size), place))
        head = (_pack_length(frames.MAGIC, len(prefix) + size), prefix, crc32(prefix))
        # Not of another process's: `is_elsewhere` has to be asked each time.
        if size < _HEAD_SHARED_BELOW and record.process in (None, os.getpid()):
            if len(heads) >= _MOST_HEADS:
                heads.clear()
            heads[name, path, line, level, ident, thread, record.process, text_size, rest_size] = head
        return head

    def take(record: logging.LogRecord) -> bool:
        nonlocal active_context
        try:
            name, path, line, level = record.name, record.pathname, record.lineno, record.levelno
            if takes is not None and not takes(name, level):
                return False
            message = record.msg
            if type(message) is str and type(record) is log_record:
                args = record.args
                if args:
                    try:
                        message = message % args
                    except Exception:
                        message = _message(record)
            else:
                message = _message(record)
            try:
                text = message.encode()
            except UnicodeError:
                text = message.encode("utf-8", "replace")
            text_size = len(text)
            if text_size > longest:
                text = encode.cut(text)
                text_size = len(text)
            ident, thread, process, created = record.thread, record.threadName, record.process, record.created
            if active_context is None and "opentelemetry.trace" in modules:
                active_context = _context_reader()
            in_context = active_context is not None and active_context()
            # Observed when it was made, as OpenTelemetry has it of its own SDK's records; the clock is not asked twice.
            try:
                time = trunc(created * 1e9) or time_ns()
                times = pack_times(0x09, time, 0x59, time)
            except Exception:  # whatever somebody made of it
                time = time_ns()
                times = pack_times(0x09, time, 0x59, time)
            # Last: once its `__dict__` was asked for, each attribute of a record costs CPython 3.11 ten times as much.
            if record.exc_info or record.stack_info or in_context or len(record.__dict__) != plain_count:
                if is_known is not None and "extra" in record.__dict__ and is_known(record):
                    return True
                rest = _more(record, in_context)
                rest_size = len(rest)
                tail = join((text, times, rest))
            else:
                rest_size = 0
                tail = text + times
            try:
                key = name, path, line, level, ident, thread, process, text_size, rest_size
                start, prefix, checksum = heads[key]
            except KeyError:
                if is_elsewhere is not None and process not in (None, os.getpid()) and is_elsewhere(record):
                    return True
                start, prefix, checksum = new_head(record, text_size, rest_size)
            frame = join((pack_header(start, crc32(tail, checksum)), prefix, tail))
            size = len(frame)
            try:
                if write(records.fd, frame) != size:
                    return records.rescue(frame, None)
            except OSError as error:
                return records.rescue(frame, error)
            records.size_bytes = held = records.size_bytes + size
            if held > most:
                records.next_segment()
            return True
        except Exception as error:
            records.untaken = record  # its echo is all that there is of it
            guard.failed("handler.take", error)
            return False

    return take


@lru_cache(_MOST_PLACES)
def _place(path: str, line: int, function: str, level: int, level_name: str) -> bytes:
    return encode.severity(level, level_name) + encode.code(path, line, function)


_thread = lru_cache(_MOST_PLACES)(encode.thread)
_scope = lru_cache(_MOST_PLACES)(encode.scope)


def _message(record: logging.LogRecord) -> str:
    """`record.getMessage()`, or what can be said where that fails; Logger itself would print the failure."""
    try:
        message = record.getMessage()
        return message if type(message) is str else str(message)
    except Exception as error:
        text = encode.shown(record.msg, str)
        return f"{text} {encode.shown(record.args)} ({type(error).__name__} when formatted)"


def _more(record: logging.LogRecord, in_context: Any) -> bytes:
    """What only some records have: extras, exception, stack, the active span."""
    fields = record.__dict__
    extras = encode.plain_extras(fields) if type(record) is logging.LogRecord else None
    if extras is None:
        extras = encode.attributes(fields, [key for key in list(fields) if key not in encode.STANDARD])
    if not (record.exc_info or record.stack_info or in_context):
        return extras
    parts = [extras]
    exc_info = record.exc_info
    if exc_info:
        if isinstance(exc_info, BaseException):
            parts.append(encode.exception(type(exc_info), exc_info, exc_info.__traceback__))
        elif isinstance(exc_info, tuple) and len(exc_info) == 3:
            parts.append(encode.exception(*exc_info))
    if record.stack_info:
        parts.append(encode.attribute("code.stacktrace", record.stack_info))
    if in_context:
        parts.append(active_span())
    return b"".join(parts)


def _context_reader() -> Callable[[], Any]:
    """A function whose result is false where no span can be active: it reads the context variable that spans live in, at
    a tenth of the price of `get_current_span`. (opentelemetry-api 1.x, context/contextvars_context.py; else: always true.)
    """
    context = sys.modules.get("opentelemetry.context")
    variable = getattr(getattr(context, "_RUNTIME_CONTEXT", None), "_current_context", None)
    return variable.get if isinstance(variable, ContextVar) else lambda: True


def active_span() -> bytes:
    """Trace and span id, where the program has imported `opentelemetry.trace` itself and a span is active."""
    trace = sys.modules.get("opentelemetry.trace")
    get_current_span = getattr(trace, "get_current_span", None)
    if get_current_span is None:
        return b""
    try:
        context = get_current_span().get_span_context()
        return encode.span(context.trace_id, context.span_id, int(context.trace_flags)) if context.is_valid else b""
    except Exception as error:
        guard.failed("handler.span", error)
        return b""
