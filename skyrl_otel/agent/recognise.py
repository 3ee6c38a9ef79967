"""One line to what its header says: which format, when, how severe, who; and the same, encoded.

A line's first byte names the few formats it can be of, so no line is held against the whole table. The formats that share
a first byte exclude each other (`tests/agent/test_formats.py`), so the one that matched last is tried first. All that is
kept here is a cache: what is found never depends on what came before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from skyrl_otel.agent import otlp, times
from skyrl_otel.agent.formats import FORMATS
from skyrl_otel.agent.formats.format import Format, Parsed
from skyrl_otel.agent.otlp import Value

# "(EngineCore pid=28789) " by vLLM's formatter, "(Actor pid=4711, ip=10.0.0.2) " by Ray in a driver.
_CHILD = re.compile(rb"\(([^()\n]{1,80}?) pid=(\d{1,10})(?:, ip=([0-9a-fA-F.:]{2,45}))?\) ")
# "[rank0]: Traceback" by torch.distributed's excepthook, "[rank0]:[W1121 ..." by c10, "[default0]:" by torchrun's tee.
_RANK = re.compile(rb"\[([a-z_]{1,20}\d{1,6})\]: ?")
_PREFIX = rb"\([^()\n]{1,80}? pid=\d{1,10}(?:, ip=[0-9a-fA-F.:]{2,45})?\) "

TEXT_SCOPE = otlp.scope("skyrl_otel.text")

_MOST_STATIC = 4096
_TIME_GROUPS = ("when", "fraction", "zone", "epoch")
_STATIC_GROUPS = ("level", "logger", "file", "line", "function", "pid", "thread")

Marks = tuple[int, int]
"""The marks, from the first to before the second, under which something holds."""


_Found = tuple[int, Marks, int]
"""A time, the marks for which it holds, and its grain."""


class Static(NamedTuple):
    """What headers have in common whatever the time: `fields` is the severity and the attributes, encoded.

    `pid` is the attribute of the process that the header names, empty for none; `stated_pid` the same where the child's prefix
    names another.
    """

    fields: bytes
    scope: bytes
    severity: int
    pid: bytes = b""
    stated_pid: bytes = b""

    def pid_after(self, child: Child | None) -> bytes:
        """What is to be said of `pid` behind the prefix of a child: no key stands in a record twice."""
        if child is None or not child.pid:
            return self.pid
        return b"" if child.pid == self.pid else self.stated_pid


class Child(NamedTuple):
    """A prefix that names the process that wrote the line, or its rank. `fields` are its attributes, `pid` is one of them."""

    prefix: bytes
    fields: bytes
    pid: bytes


class Header(NamedTuple):
    """The header of one line. `end` is where the message begins, `holds` under which marks `time` is what it means.

    `message` replaces what follows `end`, where a format's fields are not in order. Not `believed`: its time is the mark's,
    and what it says is an attribute. A record's time is `time` and its offset modulo `grain`, which is what the format leaves
    open: so lines of one second or millisecond keep their order and no two share a time.
    """

    format: Format
    matcher: Matcher
    end: int
    static: Static
    time: int
    holds: Marks
    message: bytes | None
    believed: bool
    grain: int


class Matcher:
    """A format, ready for use. `whole` matches a header with the child's prefix before it, if there is one."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.pattern, self.whole, indices = _compiled(format.pattern)
        self._times, self._statics, self._whole_times, self._whole_statics = indices
        # Only `when` says the time, so lines of one second have the same.
        self.is_whole_second = set(_TIME_GROUPS) & set(self.pattern.groupindex) == {"when"}
        self._clock = times.Clock(format.date) if format.date else None
        self._known: dict[object, Static] = {}

    def header_of(self, match: re.Match[bytes], mark: int, zones: tuple[int, int]) -> Header | None:
        """What a match of `pattern` says; None where its time is none, so that the line is shown as it is."""
        key = match.group(*self._statics)
        static = self._known.get(key)
        if static is None:
            if len(self._known) >= _MOST_STATIC:
                self._known.clear()
            groups = {name: value for name, value in zip(_STATIC_GROUPS, key, strict=True) if value}
            static = self._known[key] = _static(self.format, groups)
        when, fraction, zone, epoch = match.group(*self._times)
        end = 0 if self.format.keep else match.end()
        found = self._time(when, fraction, zone, epoch, mark, zones)
        return None if found is None else self._header(end, static, *found, None, mark)

    def header_from(self, parsed: Parsed, mark: int, zones: tuple[int, int]) -> Header | None:
        """What the format's `parse` found; None as in `header_of`."""
        groups = {name: value for name, value in (("level", parsed.level), ("logger", parsed.logger)) if value}
        static = _static(self.format, groups, parsed.attributes)
        found: _Found | None = (parsed.time_ns or 0, (mark, mark + 1), 1000)
        if parsed.time_ns is None:
            found = self._time(parsed.when, parsed.fraction, parsed.zone, None, mark, zones)
        return None if found is None else self._header(0, static, *found, parsed.message, mark)

    def identity_of_whole(self, match: re.Match[bytes]) -> object:
        """All that a match of `whole` says but the time: the child's prefix, level, file and so on."""
        return match.group(*self._whole_statics)

    def time_of_whole(self, match: re.Match[bytes], mark: int, zones: tuple[int, int]) -> tuple[int, Marks] | None:
        """The time that a match of `whole` says and the marks for which it says that; None if it is not to be believed."""
        when, fraction, zone, epoch = match.group(*self._whole_times)
        found = self._time(when, fraction, zone, epoch, mark, zones)
        if found is None:
            return None
        time, holds, grain = found
        return (time, holds) if grain == times.LATE_GRAIN and times.is_believed(time, mark) else None

    def _header(
        self, end: int, static: Static, time: int, holds: Marks, grain: int, message: bytes | None, mark: int
    ) -> Header:
        if mark - times.BEHIND <= time <= mark + times.AHEAD:
            return Header(self.format, self, end, static, time, holds, message, True, grain)
        stated = otlp.attributes({"skyrl.stated_time_unix_nano": time})
        static = static._replace(fields=static.fields + stated)
        return Header(self.format, self, end, static, mark, (mark, mark + 1), message, False, 1)

    def _time(
        self,
        when: bytes | None,
        fraction: bytes | None,
        zone: bytes | None,
        epoch: bytes | None,
        mark: int,
        zones: tuple[int, int],
    ) -> _Found | None:
        if epoch:
            seconds, _, decimals = epoch.partition(b".")
            time = int(seconds) * times.SECOND + times.fraction_ns(decimals)
            return time, (mark, mark + 1), 10 ** max(9 - len(decimals), 0)
        if not when or self._clock is None:
            return mark, (mark, mark + 1), 1
        found = self._clock.second(when, zone, mark, zones)
        if found is None:
            return None
        second, low, high = found
        if fraction:
            return second + times.fraction_ns(fraction), (mark, mark + 1), 10 ** max(9 - len(fraction), 0)
        if mark < second + times.SECOND:
            return times.part_of_second(second, mark), (mark, mark + 1), 1 if mark >= second else times.LATE_GRAIN
        low, high = max(low, second + times.SECOND), min(high, second + times.BEHIND)
        time = second + times.SECOND - times.LATE_GRAIN
        return time, (low, high) if low <= mark < high else (mark, mark + 1), times.LATE_GRAIN


class Recogniser:
    """The formats, and what was worked out of headers so far. For one thread."""

    def __init__(self, formats: Sequence[Format] = FORMATS) -> None:
        self._by_first: list[list[Matcher]] = [[] for _ in range(256)]
        for format in formats:
            matcher = Matcher(format)
            for byte in format.first:
                self._by_first[byte].append(matcher)
        self._children: dict[bytes, Child] = {}

    def child(self, line: bytes) -> Child | None:
        """The prefix of a line that begins with one."""
        match = _CHILD.match(line) or _RANK.match(line)
        if match is None:
            return None
        known = self._children.get(match[0])
        if known is None:
            attributes: dict[str, Value] = {"skyrl.child": match[1].decode()}
            pid = b""
            if match.re is _CHILD:
                pid = otlp.attributes({"process.pid": int(match[2])})
                if match[3]:
                    attributes["skyrl.child.ip"] = match[3].decode()
            if len(self._children) >= _MOST_STATIC:
                self._children.clear()
            known = self._children[match[0]] = Child(match[0], pid + otlp.attributes(attributes), pid)
        return known

    def header(self, text: bytes, mark: int, zones: tuple[int, int]) -> Header | None:
        """What the header of `text` says; None for a text without one. `text` is valid UTF-8, less any child's prefix."""
        if not text:
            return None
        candidates = self._by_first[text[0]]
        for matcher in candidates:
            parse = matcher.format.parse
            if parse is not None:
                parsed = parse(text)
                if parsed is None:
                    continue
                found = matcher.header_from(parsed, mark, zones)
            else:
                match = matcher.pattern.match(text)
                if match is None:
                    continue
                found = matcher.header_of(match, mark, zones)
            if found is None:
                continue
            if matcher is not candidates[0]:
                candidates.remove(matcher)
                candidates.insert(0, matcher)
            return found
        return None


_Indices = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@lru_cache(256)
def _compiled(pattern: bytes) -> tuple[re.Pattern[bytes], re.Pattern[bytes], _Indices]:
    # A group that never takes part stands in for those that the format lacks: one call gets them all.
    header = re.compile(b"(?:%b)(?P<none>(?!)x)?" % pattern)
    whole = re.compile(b"(?P<prefix>%b)?%b" % (_PREFIX, header.pattern))
    indices = (
        _indices(header, _TIME_GROUPS),
        _indices(header, _STATIC_GROUPS),
        _indices(whole, _TIME_GROUPS),
        _indices(whole, ("prefix", *_STATIC_GROUPS)),
    )
    return header, whole, indices


def _indices(pattern: re.Pattern[bytes], names: Sequence[str]) -> tuple[int, ...]:
    groups = pattern.groupindex
    return tuple(groups.get(name, groups["none"]) for name in names)


def _static(format: Format, groups: Mapping[str, bytes], others: Mapping[str, Value] | None = None) -> Static:
    level = (groups.get("level") or format.level.encode()).strip()
    severity = format.severity(level)
    fields = b""
    if severity:
        fields += b"\x10" + otlp.varint(severity)
    if level:
        fields += otlp.field(b"\x1a", level.upper())
    attributes: dict[str, Value] = {}
    for group, name in (("file", "code.file.path"), ("function", "code.function.name"), ("thread", "thread.name")):
        if group in groups:
            attributes[name] = groups[group].decode()
    if "line" in groups:
        attributes["code.line.number"] = int(groups["line"])
    fields += otlp.attributes({**attributes, **(others or {})})
    logger = groups.get("logger", b"").strip().decode() or format.scope
    scope = otlp.scope(logger) if logger else TEXT_SCOPE
    if "pid" not in groups:
        return Static(fields, scope, severity)
    pids = (otlp.attributes({name: int(groups["pid"])}) for name in ("process.pid", "skyrl.stated_pid"))
    return Static(fields, scope, severity, *pids)
