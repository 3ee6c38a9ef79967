"""No pattern takes more than linear time: each that the agent has, on lines that are pumped up at each of their places.

The patterns are found, not listed: a new format or rule is tried as soon as it stands in its table.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator

import pytest

import skyrl_otel.agent
from skyrl_otel.agent import assemble, block
from skyrl_otel.agent.formats import FORMATS
from skyrl_otel.agent.formats.format import Format
from skyrl_otel.agent.recognise import Matcher
from skyrl_otel.agent.redact import RULES
from tests.agent.test_formats import DATA, FROM_SOURCE

LINES = [line for path in sorted(DATA.glob("*.log")) for line in path.read_bytes().split(b"\n") if line]
LINES += [line for line, *_ in FROM_SOURCE]
SEARCHED = {block._ANSI, assemble.CHILD}
"""Patterns that are looked for anywhere in a line; the others are matched at its beginning."""
PUMPS = (
    b"a",
    b"1",
    b" ",
    b".",
    b"-",
    b"[",
    b"(",
    b"a:1: ",
    b"a=",
    b"a.",
    b'\\"',
    b"{",
    b"\x1b[0",
    b"(a pid=1",
    "é".encode(),
)
REPEATS = 3000


def is_meant(format: Format, line: bytes) -> bool:
    if line[0] not in format.first:
        return False
    return format.parse(line) is not None if format.parse else Matcher(format).pattern.match(line) is not None


def samples(format: Format) -> list[bytes]:
    """Lines of a format of different lengths; its shortest say enough."""
    found = sorted({line for line in LINES if is_meant(format, line)}, key=len)
    return found[:: max(len(found) // 2, 1)][:2]


def pumped(line: bytes, end: int, repeats: int) -> Iterator[bytes]:
    """`line` with something many times at each place of its first `end` bytes, with what follows there and without."""
    for place in range(0, end + 1, 2):
        for pump in (*PUMPS, line[max(place - 1, 0) : place], line[:place][-20:]):
            if pump:
                yield line[:place] + pump * repeats + line[place:]
                yield line[:place] + pump * repeats


def took(function: Callable[[bytes], object], text: bytes) -> float:
    began = time.thread_time()
    function(text)
    return time.thread_time() - began


def check_linear(function: Callable[[bytes], object], line: bytes, end: int) -> None:
    """A text that takes long is tried at four times its size: quadratic time would be sixteen times as long."""
    slow = [number for number, text in enumerate(pumped(line, end, REPEATS)) if took(function, text) > 0.003]
    if not slow:
        return
    for number, (text, larger) in enumerate(
        zip(pumped(line, end, REPEATS), pumped(line, end, 4 * REPEATS), strict=True)
    ):
        if number in slow[:: max(len(slow) // 20, 1)]:
            base, grown = min(took(function, text) for _ in range(3)), min(took(function, larger) for _ in range(3))
            assert grown < 8 * base + 0.003, (text[:80], base, grown)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_each_format_takes_linear_time(format: Format) -> None:
    lines = samples(format)
    assert lines, f"no sample has a line of {format.name}"
    for line in lines:
        if format.parse is not None:
            check_linear(format.parse, line, min(len(line), 40))
            continue
        matcher = Matcher(format)
        match = matcher.pattern.match(line)
        assert match is not None
        for pattern in (matcher.pattern, matcher.whole):
            check_linear(pattern.match, line, min(match.end(), 100))


def own_patterns() -> dict[str, re.Pattern[bytes]]:
    """All patterns that stand in modules of the agent, and those of the rules of redaction."""
    found = {}
    for module in pkgutil.walk_packages(skyrl_otel.agent.__path__, "skyrl_otel.agent."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, re.Pattern) and isinstance(value.pattern, bytes):
                found[f"{module.name.rpartition('.')[2]}.{name}"] = value
    return found | {f"redact.{rule.name}": rule.pattern for rule in RULES}


@pytest.mark.parametrize("name", sorted(own_patterns()))
def test_each_pattern_takes_linear_time(name: str) -> None:
    pattern = own_patterns()[name]
    function = pattern.search if name.startswith("redact.") or pattern in SEARCHED else pattern.match
    literals = [
        word.encode()
        for word in re.findall(r"[A-Za-z_:/=\[\]()@ .-]{2,}", pattern.pattern.decode("latin-1"))
        if len(word) < 40
    ]
    lines = [
        *literals,
        *(rule_anchor for rule in RULES if name == f"redact.{rule.name}" for rule_anchor in rule.anchors),
    ]
    lines += [b"a: b", b"  + | x", b"\x1b]0;x", b"Traceback (most recent call last):", b"KeyError: 'x'"]
    for line in lines:
        check_linear(function, line, len(line))
