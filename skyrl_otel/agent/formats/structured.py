"""Lines that name their fields: JSON (structlog, python-json-logger, zap, Ray) and logfmt (Loki, Prometheus, go-kit).

The keys are those that these write by default. What is not known by name becomes an attribute, 32 of them at most; one whose
name would say who wrote the line, or that it is an event of ours, is put behind "printed.".
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from skyrl_otel.agent.formats.format import Format, Parsed
from skyrl_otel.agent.otlp import Value
from skyrl_otel.agent.trace import TRACEBACK, exception_of

_TIMES = ("timestamp", "ts", "time", "asctime", "@timestamp", "t")
_LEVELS = ("level", "levelname", "severity", "log.level", "lvl")
_LOGGERS = ("logger", "name", "logger_name")
_MESSAGES = ("message", "msg", "event", "body")
_FILES, _LINES, _CALLERS = ("filename", "pathname", "file"), ("lineno", "line"), ("caller", "source")
_STACKS = ("exc_info", "exception", "stack", "stacktrace", "exc_text")
_MOST, _LONGEST, _LONGEST_KEY = 32, 4096, 120
"""Attributes of a record, and the longest of them: where not all fits, the body is the whole line."""
_PLACE = re.compile(r".{1,200}:\d{1,7}")
# As Loki spells them, which turns all but letters and digits into "_": names of the resource, of ours, and of Loki's own.
_CLAIMS = re.compile(
    r"(?:skyrl|service|host|process|ray|log|event|exception|code|telemetry|k8s|container|deployment|cloud|otel|scope|severity|rl)_"
    r"|(?:observed_timestamp|detected_level|severity|event|scope|level|job|instance)$"
)
_SPELLING = re.compile(r"[^a-zA-Z0-9]")
_ISO = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?(Z|[+-]\d\d:?\d\d)?$")
_PAIR = re.compile(rb'([A-Za-z_][\w.\-]*)=(?:"((?:[^"\\]|\\.)*)"|([^\s"]*))(?: |$)')


def _fields(fields: dict[str, Any], line: bytes) -> Parsed | None:
    # A field is taken out only by what it becomes, and what is left are attributes: none is lost.
    stack = next((fields[name] for name in _STACKS if fields.get(name)), None)
    if isinstance(stack, str) and TRACEBACK.decode() in stack:
        fields = fields if any(name in fields for name in _LEVELS) else {_LEVELS[0]: "ERROR", **fields}
    level, message = _take(fields, _LEVELS, _is_level), _take(fields, _MESSAGES, _is_text)
    if level is None or message is None:
        return None
    logger, stated = _take(fields, _LOGGERS, _is_logger), _take(fields, _TIMES, _is_time)
    attributes = _place(fields) | _exception(_take(fields, _STACKS, _is_stack))
    fits = len(fields) <= _MOST and not (isinstance(stack, str) and len(stack) > _LONGEST)
    for key, value in list(fields.items())[:_MOST]:
        shown = _value(value)
        if len(key) > _LONGEST_KEY or (isinstance(shown, str) and len(shown) > _LONGEST):
            fits, shown = False, str(shown)[:_LONGEST]
        attributes[_name(key)] = shown
    time_ns, when, fraction, zone = _time(stated)
    return Parsed(
        message.encode("utf-8", "replace") if fits else line,
        str(level).encode("utf-8", "replace"),
        (logger or "").encode("utf-8", "replace"),
        time_ns,
        when,
        fraction,
        zone,
        attributes,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_level(value: Any) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 32


def _is_logger(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 128


def _is_time(value: Any) -> bool:
    return _time(value) != _time(None)


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and _PLACE.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_stack(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _place(fields: dict[str, Any]) -> dict[str, Value]:
    caller = _take(fields, _CALLERS, _is_place)
    if caller is not None:
        file, _, line = caller.rpartition(":")
        return {"code.file.path": file, "code.line.number": int(line)}
    named = {"code.file.path": _take(fields, _FILES, _is_text), "code.line.number": _take(fields, _LINES, _is_number)}
    return {name: value for name, value in named.items() if value is not None}


def _exception(stack: Any) -> dict[str, Value]:
    """`exception.*` of a stack as text, or of structlog's `dict_tracebacks`."""
    if stack is None:
        return {}
    if isinstance(stack, str):
        return {**exception_of(stack)}
    raised = stack[0]
    named = {"exception.type": raised.get("exc_type"), "exception.message": raised.get("exc_value")}
    return {**{key: str(value)[:4096] for key, value in named.items() if value}, **exception_of(json.dumps(stack))}


def _name(key: str) -> str:
    return f"printed.{key[:_LONGEST_KEY]}" if _CLAIMS.match(_SPELLING.sub("_", key)) else key[:_LONGEST_KEY]


def _value(value: Any) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # no JSON: neither Loki nor `logs --json` could write it
    return value if isinstance(value, str | bool | int | float) else json.dumps(value)


def _take(fields: dict[str, Any], names: tuple[str, ...], is_meant: Callable[[Any], bool]) -> Any:
    for name in names:
        if name in fields and is_meant(fields[name]):
            return fields.pop(name)
    return None


def _time(stated: Any) -> tuple[int | None, bytes, bytes, bytes]:
    """(ns, date, fraction, zone): seconds, milliseconds or nanoseconds since 1970 by their size, or an ISO date."""
    if isinstance(stated, int | float) and not isinstance(stated, bool) and 1e9 < stated < 1e19:
        scale = 1_000_000_000 if stated < 1e11 else 1_000_000 if stated < 1e14 else 1
        # A float has 100 ns or so at this size; a decimal that was written is not made longer.
        return (
            (stated * scale if isinstance(stated, int) else round(stated * 1e6) * 1000 * scale // 10**9),
            b"",
            b"",
            b"",
        )
    match = _ISO.match(stated) if isinstance(stated, str) else None
    if match is None:
        return None, b"", b"", b""
    return None, match[1].encode(), (match[2] or "").encode(), (match[3] or "").encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, with all fields of it: zap writes one twice where it is given twice. Those behind the first get a number."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    fields, met = {}, Counter[str]()
    for key, value in pairs:
        name = key
        while name in fields:
            met[key] += 1
            name = f"{key}.{met[key] + 1}"
        fields[name] = value
    return fields


def parse_json(line: bytes) -> Parsed | None:
    """An object with a level and a message."""
    if line[-1:] != b"}" and line.rstrip()[-1:] != b"}":
        return None
    try:
        fields = json.loads(line, parse_constant=str, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None
    return _fields(fields, line) if isinstance(fields, dict) else None


def parse_logfmt(line: bytes) -> Parsed | None:
    """key=value pairs from end to end, of which some are a level and a message."""
    pairs: list[tuple[str, str]] = []
    position = 0
    while match := _PAIR.match(line, position):
        quoted, plain = match[2], match[3]
        text = (plain if quoted is None else quoted).decode()
        pairs.append((match[1].decode(), text if quoted is None else re.sub(r'\\(["\\])', r"\1", text)))
        position = match.end()
    return _fields(_object(pairs), line) if position == len(line) and pairs else None


_DATE = "%Y-%m-%d[T ]%H:%M:%S"
JSON = Format(name="json", first=b"{", parse=parse_json, date=_DATE)
LOGFMT = Format(name="logfmt", first=b"lt", parse=parse_logfmt, date=_DATE)
FORMATS = (JSON, LOGFMT)
