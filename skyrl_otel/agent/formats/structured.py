"""Lines that name their fields: JSON (structlog, python-json-logger, zap, Ray) and logfmt (Loki, Prometheus, go-kit).

The keys are those that these write by default. What is not known by name becomes an attribute, 32 of them at most; one whose
name would say who wrote the line, or that it is an event of ours, is put behind "printed.".
"""

import json
import math
import re
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
_MOST = 32
# As Loki spells them, which turns all but letters and digits into "_": names of the resource, of ours, and of Loki's own.
_CLAIMS = re.compile(
    r"(?:skyrl|service|host|process|ray|log|event|exception|code|telemetry|k8s|container|deployment|cloud|otel|scope|severity|rl)_"
    r"|(?:observed_timestamp|detected_level|severity|event|scope|level|job|instance)$"
)
_SPELLING = re.compile(r"[^a-zA-Z0-9]")
_ISO = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?(Z|[+-]\d\d:?\d\d)?$")
_PAIR = re.compile(rb'([A-Za-z_][\w.\-]*)=(?:"((?:[^"\\]|\\.)*)"|([^\s"]*))(?: |$)')


def _fields(fields: dict[str, Any]) -> Parsed | None:
    stack = next((fields[name] for name in _STACKS if fields.get(name)), None)
    if isinstance(stack, str) and TRACEBACK.decode() in stack:
        fields = fields if any(name in fields for name in _LEVELS) else {_LEVELS[0]: "ERROR", **fields}
    level, message = _take(fields, _LEVELS), _take(fields, _MESSAGES)
    if level is None or not isinstance(message, str):
        return None
    logger, stated = _take(fields, _LOGGERS), _take(fields, _TIMES)
    attributes = _place(fields) | _exception(_take(fields, _STACKS))
    for key, value in list(fields.items())[:_MOST]:
        attributes.setdefault(_name(key), _value(value))
    time_ns, when, fraction, zone = _time(stated)
    return Parsed(
        message.encode("utf-8", "replace"),
        str(level).encode("utf-8", "replace")[:32],
        str(logger or "").encode("utf-8", "replace")[:128],
        time_ns,
        when,
        fraction,
        zone,
        attributes,
    )


def _place(fields: dict[str, Any]) -> dict[str, Value]:
    attributes: dict[str, Value] = {}
    caller = _take(fields, _CALLERS)
    if isinstance(caller, str) and (place := re.fullmatch(r"(.{1,200}):(\d{1,7})", caller)):
        attributes |= {"code.file.path": place[1], "code.line.number": int(place[2])}
    file, line = _take(fields, _FILES), _take(fields, _LINES)
    if isinstance(file, str):
        attributes["code.file.path"] = file
    if isinstance(line, int):
        attributes["code.line.number"] = line
    return attributes


def _exception(stack: Any) -> dict[str, Value]:
    """`exception.*` of a stack as text, or of structlog's `dict_tracebacks`."""
    if isinstance(stack, str):
        return {**exception_of(stack)}
    if not isinstance(stack, list) or not stack or not isinstance(stack[0], dict):
        return {}
    raised = stack[0]
    named = {"exception.type": raised.get("exc_type"), "exception.message": raised.get("exc_value")}
    return {**{key: str(value)[:4096] for key, value in named.items() if value}, **exception_of(json.dumps(stack))}


def _name(key: str) -> str:
    return f"printed.{key[:120]}" if _CLAIMS.match(_SPELLING.sub("_", key)) else key[:128]


def _value(value: Any) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # no JSON: neither Loki nor `logs --json` could write it
    return value if isinstance(value, str | bool | int | float) else json.dumps(value)[:4096]


def _take(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if name in fields:
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


def parse_json(line: bytes) -> Parsed | None:
    """An object with a level and a message."""
    if line[-1:] != b"}" and line.rstrip()[-1:] != b"}":
        return None
    try:
        fields = json.loads(line, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return _fields(fields) if isinstance(fields, dict) else None


def parse_logfmt(line: bytes) -> Parsed | None:
    """key=value pairs from end to end, of which some are a level and a message."""
    fields: dict[str, Any] = {}
    position = 0
    while match := _PAIR.match(line, position):
        quoted, plain = match[2], match[3]
        text = (plain if quoted is None else quoted).decode()
        fields[match[1].decode()] = text if quoted is None else re.sub(r'\\(["\\])', r"\1", text)
        position = match.end()
    return _fields(fields) if position == len(line) and fields else None


_DATE = "%Y-%m-%d[T ]%H:%M:%S"
JSON = Format(name="json", first=b"{", parse=parse_json, date=_DATE)
LOGFMT = Format(name="logfmt", first=b"lt", parse=parse_logfmt, date=_DATE)
FORMATS = (JSON, LOGFMT)
