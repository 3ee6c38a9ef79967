"""Takes the output of programs that log what they like apart, by the columns that their sources promise.

By other means than the patterns in `skyrl_otel/agent/formats`: what both find is likely so.
"""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEVELS = {
    "D": 5,
    "I": 9,
    "W": 13,
    "E": 17,
    "C": 21,
    "F": 21,
    "debug": 5,
    "info": 9,
    "warn": 13,
    "warning": 13,
    "error": 17,
}
LEVELS |= {"DEBUG": 5, "INFO": 9, "WARNING": 13, "ERROR": 17, "CRITICAL": 21, "WARN": 13}
Event = dict[str, Any]


def at(text: str) -> float:
    """Seconds since 1970 of an ISO date without zone, in UTC; more than six places are cut."""
    whole, dot, fraction = text.replace(",", ".").partition(".")
    moment = datetime.datetime.fromisoformat(whole + dot + fraction[:6].ljust(6, "0") if dot else whole)
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def c10(line: str) -> Event | None:
    """`c10/util/Logging.cpp`, MessageLogger: [I1124 06:40:54.383443922 debug.cpp:48] message."""
    head, _, message = line.partition("] ")
    rank, bracket, head = head.rpartition("[")
    fields = head.split(" ")
    if not bracket or len(fields) != 3 or not fields[0][1:].isdigit():
        return None
    file, _, number = fields[2].partition(":")
    time = at(f"2026-{fields[0][1:3]}-{fields[0][3:]} {fields[1]}")
    child = {"child": rank.strip("[]:")} if rank else {}
    return {
        "severity": LEVELS[fields[0][0]],
        "logger": "c10",
        "message": message,
        "time": time,
        "file": file,
        "line": int(number),
        **child,
    }


def ray_core(line: str) -> Event | None:
    """`src/ray/util/logging.cc`: [2026-11-24 06:41:57,485 I 4781 4781] (gcs_server) gcs_server.cc:1326: message."""
    head, _, rest = line.partition("] (")
    fields = head.split(" ")
    if len(fields) != 5 or not head.startswith("[2"):
        return None
    logger, _, rest = rest.partition(") ")
    file, number, message = rest.split(":", 2)
    time = at(f"{fields[0][1:]} {fields[1]}")
    place = {"file": file, "line": int(number), "pid": int(fields[3])}
    return {
        "severity": LEVELS[fields[2]],
        "logger": logger,
        "message": message.removeprefix(" "),
        "time": time,
        **place,
    }


def uvicorn(line: str) -> Event | None:
    """`uvicorn/logging.py`: the level, a colon, spaces up to column 10."""
    level, _, message = line.partition(":")
    return {"severity": LEVELS[level], "logger": "", "message": message.lstrip(" "), "time": 0.0}


def vllm(line: str) -> Event | None:
    """`vllm/logging_utils/formatter.py`: (Name pid=1) LEVEL 11-21 14:34:35 [file.py:286] message; and what its libraries log."""
    child: Event = {}
    if line.startswith("(") and " pid=" in line:
        name, _, rest = line[1:].partition(" pid=")
        pid, _, line = rest.partition(") ")
        child = {"child": name, "pid": int(pid)}
    fields = line.split(" ", 4)
    if fields[0] not in LEVELS or len(fields) < 5:
        other = next((found for split in (glog, c10, warning) if line and (found := split(line))), None)
        if other is None and fields[0].endswith(":") and fields[0][:-1] in LEVELS:
            other = uvicorn(line)
        other = other or {"severity": 0, "logger": "", "message": line, "time": 0.0}
        return {**other, **child} if line else None
    file, _, number = fields[3].strip("[]").partition(":")
    time = at(f"2026-{fields[1]} {fields[2]}")
    place = {"file": file, "line": int(number)}
    return {"severity": LEVELS[fields[0]], "logger": "vllm", "message": fields[4], "time": time, **place, **child}


def glog(line: str) -> Event | None:
    """torch's Python loggers, `torch/_logging/_internal.py`: W1124 06:50:52.736000 15358 torch/x.py:29] message."""
    head, _, message = line.partition("] ")
    fields = head.split(" ")
    if len(fields) != 4 or not fields[0][1:].isdigit() or not fields[2].isdigit():
        return None
    file, _, number = fields[3].partition(":")
    time = at(f"2026-{fields[0][1:3]}-{fields[0][3:]} {fields[1]}")
    place = {"file": file, "line": int(number)}
    return {"severity": LEVELS[fields[0][0]], "logger": "glog", "message": message, "time": time, **place}


def warning(line: str) -> Event | None:
    """`warnings.formatwarning`: file:29: Category: message, and the line of source, indented, under it."""
    place, _, message = line.partition(": ")
    file, _, number = place.rpartition(":")
    if not number.isdigit() or not message.partition(":")[0].endswith("Warning"):
        return None
    return {"severity": 13, "logger": "py.warnings", "message": message, "time": 0.0, "file": file, "line": int(number)}


def logfmt(line: str) -> Event | None:
    """go-kit's logfmt encoder, as Loki uses it."""
    fields = dict(word.partition("=")[::2] for word in shlex.split(line))
    file, _, number = fields.get("caller", "").partition(":")
    place = {"file": file, "line": int(number)} if number else {}
    message = fields.get("msg", "")
    return {
        "severity": LEVELS[fields["level"]],
        "logger": "",
        "message": message,
        "time": at(fields["ts"].rstrip("Z")),
        **place,
    }


def zap(line: str) -> Event | None:
    """zap's console encoder: columns between tabs."""
    when, level, caller, message = line.split("\t", 3)
    file, _, number = caller.partition(":")
    time = at(when.rstrip("Z"))
    return {
        "severity": LEVELS[level],
        "logger": "zap",
        "message": message,
        "time": time,
        "file": file,
        "line": int(number),
    }


SPLITTERS: dict[str, Callable[[str], Event | None]] = {
    "torch": c10,
    "ray-core": ray_core,
    "uvicorn": uvicorn,
    "vllm": vllm,
    "loki": logfmt,
    "otelcol": zap,
}


TRACEBACK = "Traceback (most recent call last):"


def events(path: Path) -> list[Event]:
    """What each line of a file says. One of no format is text, a blank one too; indented ones belong to a title or a warning.

    A traceback is one event: under a header that each of its lines repeats, from the message before it on; and without one up to
    the line that names the exception.
    """
    split = next(SPLITTERS[name] for name in sorted(SPLITTERS, key=len, reverse=True) if path.name.startswith(name))
    found: list[Event] = []
    heads: dict[Any, Event] = {}  # the last event of severity ERROR under each header
    plain = False  # in a traceback without headers
    for line in path.read_text("utf-8").removesuffix("\n").split("\n"):
        event = split(line) or {"severity": 0, "logger": "", "time": 0.0, "message": line}
        title = found[-1]["message"].partition("\n")[0] if found else ""
        key = tuple(event.get(name) for name in ("child", "pid", "file", "line", "logger"))
        if (
            event["severity"] >= 17
            and key in heads
            and (TRACEBACK in heads[key]["message"] or event["message"] == TRACEBACK)
        ):
            heads[key]["message"] += "\n" + event["message"]
        elif plain or (line[:1] in ("\t", " ") and (title.endswith(":") or found[-1]["logger"] == "py.warnings")):
            found[-1]["message"] += "\n" + line
            plain = plain and line[:1] == " "
        else:
            plain = event["message"] == TRACEBACK and event["severity"] == 0
            event["severity"] = 17 if plain else event["severity"]
            found.append(event)
            if event["severity"] >= 17:
                heads[key] = event
    return [event | raised(event["message"]) for event in found]


def raised(message: str) -> dict[str, str]:
    """The exception of a traceback whose last line names it."""
    _, traceback, rest = message.partition(TRACEBACK)
    if not traceback:
        return {}
    name, _, said = rest.rpartition("\n")[2].partition(": ")
    return {"exception": name, "exception_message": said, "stack": traceback + rest}


def compare(path: Path) -> list[tuple[Event, Event]]:
    """Where a .jsonl and `events` differ."""
    kept = [json.loads(line) for line in path.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    return [
        (old, new)
        for old, new in zip(kept, events(path), strict=True)
        if any(old[key] != new.get(key) for key in old if key != "time")
    ]
