"""An oracle: every byte of a file is in its record. It shares no code with the agent.

A record's raw lines are cleaned in the most naive way (terminators, earlier states of bars, escapes). What a record shows must
be the end of each line. What stands before that is a header: of a shape that is known here, each word of which is the severity,
the logger, a part of the time or an attribute, so that nothing is left out. JSON and logfmt have their fields in any order; there
each field's value must be in the record. What was masked may stand for any byte, in texts that have secrets.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tests.receiver import Received

SECRETS = (b"hf_", b"sk-", b"AKIA", b"ASIA", b"ccess", b"CCESS", b"andb", b"ANDB", b"earer", b"EARER", b"://")
"""Without one of these in a text nothing of it is masked."""


def check_all_is_shown(data: bytes, records: Iterable[Received], zones: Sequence[int] = ()) -> None:
    """Raises AssertionError for a record that lacks something of its bytes. `zones`: seconds east of UTC that were in force."""
    has_secrets = any(word in data for word in SECRETS) or b"//" in data
    for record in records:
        _check(record, _raw_lines(data, _ranges(record)), has_secrets, zones)


def _ranges(record: Received) -> list[tuple[int, int]]:
    spans = [record.uid.rpartition("/")[2], *record.attributes.get("skyrl.more_ranges", "").split(",")]
    return [(int(start), int(end)) for start, _, end in (span.partition("-") for span in spans if span)]


def _raw_lines(data: bytes, ranges: list[tuple[int, int]]) -> list[bytes]:
    lines: list[bytes] = []
    for start, end in ranges:
        *whole, rest = data[start:end].split(b"\n")
        lines += [line.removesuffix(b"\r") for line in whole]
        if rest:
            lines.append(rest)
    return lines


def _check(record: Received, raws: list[bytes], has_secrets: bool, zones: Sequence[int]) -> None:
    hidden = sum(max(len(_states(raw)) - 1, 0) for raw in raws if b"\r" in raw)
    masks = has_secrets and "*" in record.body
    assert masks or hidden == record.attributes.get("skyrl.bar.states", 0), (record, raws)
    lines = [_clean(raw) for raw in raws]
    first = lines[0]
    if len(lines) == 1 and first == record.body:
        return
    bodies = record.body.split("\n")
    prefix = _CHILD.match(first)[0]  # type: ignore[index]
    message = None
    if _before(raws[0], first, bodies[0], masks) not in ("", prefix):
        fields = _fields(first[len(prefix) :])
        message = _message(fields)
    more = message.count("\n") if message else 0
    bodies += [""] * (len(lines) + more - len(bodies))  # empty lines at an event's end are not shown
    assert len(bodies) == len(lines) + more, (record, raws)
    if message is not None:
        _check_header(prefix, record, zones, has_secrets, is_first=True)
        _check_fields(fields, record, zones)
        bodies, lines, raws = bodies[more + 1 :], lines[1:], raws[1:]
    for number, (raw, line, body) in enumerate(zip(raws, lines, bodies, strict=True)):
        if line != body:
            header = _before(raw, line, body, masks)
            assert header is not None, f"{raw!r} is shown as {body!r}"
            _check_header(header, record, zones, has_secrets, is_first=message is None and number == 0)


# -- a line as people see it -------------------------------------------------------------------------------------------


def _states(raw: bytes) -> list[bytes]:
    return [state for state in raw.split(b"\r") if state.strip()]


def _clean(raw: bytes) -> str:
    if b"\r" in raw:
        raw = (_states(raw) or [b""])[-1]
    if b"\x1b" in raw:
        raw = _without_escapes(raw)
    return raw.decode("utf-8", "replace").replace("\0", "\ufffd")


def _without_escapes(raw: bytes) -> bytes:
    kept, position = b"", 0
    while (at := raw.find(b"\x1b", position)) >= 0:
        size = _escape_size(raw, at)
        kept += raw[position : at + (0 if size else 1)]
        position = at + (size or 1)
    return kept + raw[position:]


def _escape_size(raw: bytes, at: int) -> int:
    """How long the control sequence is, 0 if it is none."""
    end, kind = at + 2, raw[at + 1 : at + 2]
    if kind == b"[":
        while 0x30 <= ord(raw[end : end + 1] or b"\0") <= 0x3F:
            end += 1
        for _ in range(2):
            end += 0x20 <= ord(raw[end : end + 1] or b"\0") <= 0x2F
        return end + 1 - at if 0x40 <= ord(raw[end : end + 1] or b"\0") <= 0x7E else 0
    if kind == b"]":
        while end < len(raw) and raw[end] not in b"\x07\x1b":
            end += 1
        bell, string = raw[end : end + 1] == b"\x07", raw[end : end + 2] == b"\x1b\\"
        return end + 1 - at if bell else end + 2 - at if string else 0
    if kind in (b"(", b")"):
        return 3 if raw[end : end + 1] and raw[end] in b"0123456789AB" else 0
    return 2 if kind and kind in b"@ABCDEFGHIJKLMNOPQRSTUVWXYZ\\^_=>78cM" else 0


# -- what stands before a message --------------------------------------------------------------------------------------

_ESCAPE = rb"(?:\x1b(?:\[[^@-~]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()].|[^\[\]()]))*"


def _before(raw: bytes, line: str, body: str, masks: bool) -> str | None:
    """What stands before `body` in a line; None if the line does not end in it."""
    if line.endswith(body):
        return line[: len(line) - len(body)]
    if not masks:
        return None
    whole, end = line.encode(), body.encode()
    size = len(whole) - len(end)
    if size >= 0 and all(one == other or other == 0x2A for one, other in zip(whole[size:], end, strict=True)):
        return whole[:size].decode("utf-8", "replace")
    # Byte for byte: a star is any byte, a replacement character is a zero or what is not UTF-8.
    shown = [
        rb"(?s:.)"
        if char == "*"
        else rb"(?:\xef\xbf\xbd|\0|[\x80-\xff]{1,3})"
        if char == "\ufffd"
        else re.escape(char.encode())
        for char in body
    ]
    match = re.fullmatch(rb"(?s:.*\r)?(?s:(.*?))" + _ESCAPE + _ESCAPE.join(shown) + _ESCAPE + rb"[\r\s]*", raw)
    return None if match is None else _clean(match[1])


_TIME = re.compile(
    r"(?:(?P<year>\d{4})-?)?(?P<month>\d\d)-?(?P<day>\d\d)[ T](?P<clock>\d\d:\d\d:\d\d)(?:[.,](?P<fraction>\d+))?"
    r"(?P<zone>Z|[+-]\d\d:?\d\d)?"
)
_TOKEN = re.compile(r"\d+|[^\W\d]+")
_WORD = re.compile(r"[\w./<>@-]*\w[\w./<>@-]*")
_SILENT = (
    "log.record.uid",
    "log.iostream",
    "skyrl.more_ranges",
    "skyrl.part",
    "skyrl.bar.states",
    "skyrl.stated_time_unix_nano",
)
_LITERALS = Counter(["PID", "IP", "NCCL"])
SHAPES = {
    "": "a child's prefix alone, or nothing",
    "w T [w:w]": "vLLM",
    "w T w:w]": "vLLM before 0.9",
    "T | w | w:w:w -": "loguru",
    "T - w - w -": "asctime with a name",
    "T w -": "asctime without",
    "T w": "asctime, then the level",
    "T w w:": "asctime, level, name",
    "T w:": "the same with what may be a name",
    "T [w]": "asctime [level], structlog",
    "T [w ]": "structlog, padded",
    "T [w] w:": "asctime [level] name",
    "[T]": "brackets",
    "[T] w": "brackets, level",
    "[T] w:": "brackets, level",
    "[T] [w]": "brackets twice",
    "[T][w][w] -": "Hydra",
    "[T] [w] [w:w:w]": "DeepSpeed",
    "[T w w w] (w) w:w:": "Ray's core",
    "[T w w w] w:w:": "Ray's core, without a name",
    "T\tw w:w --": "Ray",
    "T\tw\t": "zap",
    "T\tw\tw:w\t": "zap with a place",
    "wT w w:w]": "glog",
    "[wT w:w]": "c10",
    "w:w:": "logging.BASIC_FORMAT",
    "w:": "uvicorn",
}
"""Headers with T for the time and w for each word, a path or a number, a child's prefix apart; and whose they are."""


def _check_header(header: str, record: Received, zones: Sequence[int], has_secrets: bool, *, is_first: bool) -> None:
    assert not header or not header.isspace(), f"blanks are missing in {record}"
    prefix = _CHILD.match(header)[0]  # type: ignore[index]
    rest = header[len(prefix) :]
    match = _TIME.search(rest)
    if match is not None:
        assert not is_first or _is_time(match, record, zones), f"the time of {header!r} is not that of {record}"
        rest = f"{rest[: match.start()]}\0{rest[match.end() :]}"
    found = Counter(token.upper() for token in _TOKEN.findall(prefix + rest))
    known = _LITERALS + Counter(token.upper() for token in _TOKEN.findall(" ".join(_values(record))))
    left = found - known
    if left and has_secrets:
        masked = [word for value in _values(record) for word in value.split() if "*" in word]
        left = Counter(token for token in left if not any(_same(token, value.upper()) for value in masked))
    assert not left, f"{sorted(left)} of {header!r} is not in {record}"
    for name in ("code.file.path", "code.function.name"):  # which may have any bytes in them
        if name in record.attributes:
            rest = re.sub(_meant_by(record.attributes[name], rest), "w", rest, count=1, flags=re.DOTALL)
    shape = _shape(rest)
    assert shape in SHAPES, f"{shape!r} of {header!r} is no header that is known, of {record}"


@lru_cache(4096)
def _shape(header: str) -> str:
    return re.sub(r" {2,}", " ", _WORD.sub("w", header).replace("\0", "T")).rstrip(" ")


def _values(record: Received) -> list[str]:
    values = [
        str(value) for name, value in record.attributes.items() if name not in _SILENT and name[:10] != "exception."
    ]
    return [*values, record.logger, record.severity_text]


def _is_time(match: re.Match[str], record: Received, zones: Sequence[int]) -> bool:
    second, nanoseconds = divmod(record.attributes.get("skyrl.stated_time_unix_nano", record.time), 1_000_000_000)
    if match["fraction"] and not f"{nanoseconds:09}".startswith(match["fraction"][:9]):
        return False
    return any(_is_second(match, second + east) for east in _zones(match["zone"], zones))


def _zones(zone: str | None, zones: Sequence[int]) -> list[int]:
    if not zone:
        return [0, *zones]
    if zone == "Z":
        return [0]
    return [int(zone[0] + "1") * (int(zone[1:3]) * 3600 + int(zone[-2:]) * 60)]


def _is_second(match: re.Match[str], second: int) -> bool:
    date = datetime.datetime.fromtimestamp(second, datetime.timezone.utc)
    stated = (match["year"] or f"{date:%Y}", match["month"], match["day"], match["clock"])
    return stated == (f"{date:%Y}", f"{date:%m}", f"{date:%d}", f"{date:%H:%M:%S}")


# -- lines that name their fields --------------------------------------------------------------------------------------

_CHILD = re.compile(r"(?:\([^()]* pid=[^()]*\) |\[[a-z_]+\d+\]: ?)?")
_PAIR = re.compile(r'([A-Za-z_][\w.-]*)=("(?:[^"\\]|\\.)*"|[^\s"]*)(?: |$)')
_TIMES = ("timestamp", "ts", "time", "asctime", "@timestamp", "t")
_MESSAGES = ("message", "msg", "event", "body")


def _fields(text: str) -> list[tuple[str, Any]]:
    """The fields of JSON or logfmt, in their order; empty if it is neither."""
    if text[:1] == "{":
        try:
            found = json.loads(text, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError):
            return []
        return found
    if _PAIR.sub("", text):
        return []
    pairs = _PAIR.findall(text)
    return [(key, re.sub(r'\\(["\\])', r"\1", value[1:-1]) if value[:1] == '"' else value) for key, value in pairs]


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON."""


def _message(fields: list[tuple[str, Any]]) -> str | None:
    return next((value for name in _MESSAGES for key, value in fields if key == name and isinstance(value, str)), None)


def _check_fields(fields: list[tuple[str, Any]], record: Received, zones: Sequence[int]) -> None:
    """Each field's value is in the record."""
    values = [record.body, *_values(record), *(str(value) for value in record.attributes.values())]
    for key, value in fields:
        text = value if isinstance(value, str) else json.dumps(_plain(value))
        if value in (None, "", False) or any(_same(text.upper(), shown.upper()) for shown in values):
            continue
        if all(part in values for part in text.rsplit(":", 1)):  # a file and its line
            continue
        assert key in _TIMES and _is_stated(value, record, zones), f"{key}={text!r} is not in {record}"


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _is_stated(value: Any, record: Received, zones: Sequence[int]) -> bool:
    if isinstance(value, str):
        match = _TIME.match(value)
        return match is not None and _is_time(match, record, zones)
    time = record.attributes.get("skyrl.stated_time_unix_nano", record.time)
    return any(abs(value * scale - time) < 1_000_000 for scale in (1, 1_000, 1_000_000, 1_000_000_000))


def _same(raw: str, shown: str) -> bool:
    """Whether `shown` is `raw`, perhaps masked."""
    return raw == shown or ("*" in shown and re.fullmatch(_meant_by(shown, raw), raw, re.DOTALL) is not None)


def _meant_by(shown: str, raw: str) -> str:
    """A pattern of what may be masked to `shown`: a star stands for a byte."""
    least = "" if raw.isascii() else "1,"
    parts = re.findall(r"\*+|[^*]+", shown)
    return "".join(f".{{{least}{len(part)}}}" if part[0] == "*" else re.escape(part) for part in parts)
