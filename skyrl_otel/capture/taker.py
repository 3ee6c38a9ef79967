"""The hot path: a `logging.LogRecord` becomes one frame with one write(2), inside the user's log call.

One function, with everything it uses in its closure, because each call and each attribute of our own would show in the
cost of a record (`python -m benchmarks handler`). What the records of one place in the source have in common is encoded
once and found by (logger, path, line, level), what those of one thread have, by its ident.
No lock: appending is atomic, dictionaries are too, and nothing is shared between two records that are under way.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from collections.abc import Callable
from contextvars import ContextVar
from itertools import islice
from time import time_ns
from typing import Any
from zlib import crc32

from skyrl_otel.capture import encode, guard
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import SEGMENT_BYTES, Records
from skyrl_otel.spool import frames

Take = Callable[[logging.LogRecord], bool]

_MOST_PLACES = 8192
_LATE_NS = 50e6

#: What every LogRecord has; what else is in its `__dict__` came by `extra=`. Formatters add the last three.
STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"taskName", "message", "asctime"}
_STANDARD_COUNT = len(logging.LogRecord("", 0, "", 0, "", (), None).__dict__)

_HEADER_BYTES = frames.HEADER.size


def make_take(records: Records, levels: Levels, is_known: Callable[[logging.LogRecord], bool] | None = None) -> Take:
    """A function that writes a record and says whether it did: False also where the levels leave it out.

    `is_known` is asked of records with extras: whether this one was taken before, in another form.
    """
    places: dict[tuple[str, str, int, int], tuple[bytes, bytes, int] | None] = {}
    threads: dict[int | None, tuple[str | None, bytes]] = {}
    find_place, find_thread = places.get, threads.get
    pack_times, pack_header = struct.Struct("<QBQ").pack, frames.HEADER.pack
    magic, write, modules, join = frames.MAGIC, os.write, sys.modules, b"".join
    log_record, long_body, more = logging.LogRecord, encode.body, _more
    body_prefixes, record_prefixes = encode.BODY_PREFIXES, encode.RECORD_PREFIXES
    long_text, long_record = encode.SHORT_BODY, encode.SHORT_RECORD
    missing = object()
    active_context: Callable[[], Any] | None = None

    def new_place(record: logging.LogRecord) -> tuple[bytes, bytes, int] | None:
        if len(places) > _MOST_PLACES:
            places.clear()
        name, level = record.name, record.levelno
        place = None
        if levels.takes(name, level):
            # Fields come in any order; the tag of the time, which is next, ends what is constant.
            constant = encode.severity(level, record.levelname)
            constant += encode.code(record.pathname, record.lineno, record.funcName or "") + b"\x09"
            place = (encode.scope(name), constant, len(constant) + 17)
        places[name, record.pathname, record.lineno, level] = place
        return place

    def new_thread(ident: int | None, name: str | None) -> tuple[str | None, bytes]:
        if len(threads) > _MOST_PLACES:
            threads.clear()
        found = threads[ident] = (name, encode.thread(ident, name))
        return found

    def take(record: logging.LogRecord) -> bool:
        nonlocal active_context
        try:
            place: Any = find_place((record.name, record.pathname, record.lineno, record.levelno), missing)
            if place is missing:
                place = new_place(record)
            if place is None:
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
            size = len(text)
            body = body_prefixes[size] + text if size < long_text else long_body(message)
            thread = find_thread(record.thread)
            if thread is None or thread[0] != record.threadName:
                thread = new_thread(record.thread, record.threadName)
            rest = thread[1]
            if active_context is None and "opentelemetry.trace" in modules:
                active_context = _context_reader()
            if (
                len(record.__dict__) != _STANDARD_COUNT
                or record.exc_info
                or record.stack_info
                or (active_context is not None and active_context())
            ):
                if is_known is not None and is_known(record):
                    return True
                rest += more(record, active_context is not None and bool(active_context()))
            scope, constant, size = place
            size += len(body) + len(rest)
            prefix = record_prefixes[size] if size < long_record else b"\x12" + encode.varint(size)
            created = now = time_ns()
            if now - record.created * 1e9 > _LATE_NS:
                created = int(record.created * 1e9)
            payload = join((scope, prefix, constant, pack_times(created, 0x59, now), body, rest))
            size = len(payload)
            frame = pack_header(magic, size, crc32(payload)) + payload
            try:
                if write(records.fd, frame) != size + _HEADER_BYTES:
                    return records.rescue(frame, None)
            except OSError as error:
                return records.rescue(frame, error)
            records.size_bytes += size
            if records.size_bytes > SEGMENT_BYTES:
                records.next_segment()
            return True
        except Exception as error:
            guard.failed("handler.take", error)
            return False

    return take


def _message(record: logging.LogRecord) -> str:
    """`record.getMessage()`, or what can be said where that fails; Logger itself would print the failure."""
    try:
        message = record.getMessage()
        return message if type(message) is str else str(message)
    except Exception as error:
        text = encode.shown(record.msg, str)
        return f"{text} {encode.shown(record.args)} ({type(error).__name__} when formatted)"


def _more(record: logging.LogRecord, in_context: bool) -> bytes:
    """What only some records have: exception, stack, extras, the active span."""
    parts = []
    exc_info = record.exc_info
    if exc_info:
        if isinstance(exc_info, BaseException):
            parts.append(encode.exception(type(exc_info), exc_info, exc_info.__traceback__))
        elif isinstance(exc_info, tuple) and len(exc_info) == 3:
            parts.append(encode.exception(*exc_info))
    if record.stack_info:
        parts.append(encode.attribute("code.stacktrace", record.stack_info))
    fields = record.__dict__
    if len(fields) != _STANDARD_COUNT:
        # They come behind those that LogRecord itself sets, unless a subclass sets some before.
        extras = islice(fields.items(), _STANDARD_COUNT, None) if type(record) is logging.LogRecord else fields.items()
        parts.append(encode.attributes([item for item in extras if item[0] not in STANDARD]))
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
