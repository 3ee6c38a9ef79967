"""Records are a pure function of bytes and decisions: the same at any chunk boundary, the fast way and the slow way."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_otel.agent import otlp
from skyrl_otel.agent.assemble import State
from skyrl_otel.agent.block import Section
from skyrl_otel.agent.events import ranges_of
from skyrl_otel.agent.reader import Reader, View
from skyrl_otel.spool.decisions import Decision
from tests.agent.accounted import check_all_is_shown
from tests.receiver import Received, decode

PREFIX = b"w" * 32 + b"/out/0/"
NOW = 1_795_412_141_000_000_000  # 2026-11-23 05:35:41 UTC
STREAM = otlp.attributes({"log.iostream": "stdout"})

# Bytes that meet each branch often: headers that repeat, prefixes, tracebacks, bars, escapes, what is broken.
ATOMS = [
    b"\n",
    b"\n",
    b"\n",
    b"\r",
    b"\r\n",
    b"x",
    b" indented",
    b"(A pid=1) ",
    b"(Bee pid=22) ",
    b"INFO 11-23 05:35:4%d [core.py:402] ",
    b"(A pid=1) INFO 11-23 05:35:41 [core.py:402] message\n",
    b"(Bee pid=22) INFO 11-23 05:35:42 [core.py:402] message\n",
    b"(Bee pid=22) ERROR 11-23 05:35:41 [core.py:88] Engine failed\n",
    b"(A pid=1) ERROR 11-23 05:35:41 [core.py:88] Traceback (most recent call last):\n",
    b'(A pid=1) ERROR 11-23 05:35:41 [core.py:88]   File "x.py", line 1, in f\n',
    b"(A pid=1) ERROR 11-23 05:35:41 [core.py:88] KeyError: 'x'\n",
    b"Traceback (most recent call last):\n",
    b'  File "x.py", line 1, in f\n    raise E\n',
    b"E: message\n",
    b"\nDuring handling of the above exception, another exception occurred:\n\n",
    b"config: {\n",
    b"  key: value\n}\n",
    b"  0%| | 0/9\r 50%|#| 5/9",
    b"\x1b[31mred\x1b[0m",
    b"\x1b]0;title\x07",
    b"\xff\xfe\0",
    "é€🙂".encode(),
    b"y" * 500,
    b"%d pid=",
    b"hf_" + b"a" * 33,
    b"INFO:x:Authorization: Bearer 0123456789abcdef01234567\n",
    b"(A pid=1) AKIAABCDEFGHIJKLMNOP\n",
    b"(hf_" + b"b" * 30 + b" pid=1) x\n",
    b'{"level": "info", "msg": "https:\\/\\/u:hunter22@h", "logger": "sk-" }\n',
    b"hf_" + b"c" * 20 + b"\x1b[0m" + b"c" * 20,
    b"wandb login\n0123456789abcdef0123456789abcdef01234567\n",
]
COMMON = len(ATOMS) - 1
DATA = Path(__file__).parent.parent / "data" / "formats"
for path in sorted(DATA.glob("*.log")):
    for line in path.read_bytes().split(b"\n")[:4]:
        ATOMS += [line.replace(b"%", b"#") + b"\n", line[: len(line) // 2].replace(b"%", b"#")]
ODD = (b"\r", b"\x1b", b"\0", b"\xff", b"hf_b")
LINES = [number for number, atom in enumerate(ATOMS) if atom.endswith(b"\n") and not any(byte in atom for byte in ODD)]
REPEATED = [number for number in LINES if number < COMMON and b"[core.py:402] " in ATOMS[number]]
"""What the fast way takes: blocks of plain whole lines, and headers that come again in them."""
texts = st.lists(st.integers(0, COMMON) | st.integers(0, len(ATOMS) - 1), max_size=60)


@dataclass
class Written:
    """A file's bytes as they came: what was seen when, and what was cut."""

    data: bytes = b""
    marks: list[Decision] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    identities: list[Decision] = field(default_factory=list)
    echoes: list[Decision] = field(default_factory=list)
    zones: list[Decision] = field(default_factory=list)
    now: int = NOW

    def view(self, start: int, end: int, upto: int) -> View:
        """What `TextFile` says of what is read between two offsets, of all below `upto`."""
        marks = [mark for mark in self.marks if mark.offset <= upto]
        echoes = [echo for echo in self.echoes if echo.offset < upto]
        edges = {edge for echo in echoes for edge in span(echo) if start < edge <= end}
        cuts = sorted(edges.union(cut for cut in self.cuts if cut <= upto))
        return View(marks, self.identities, cuts, [zone for zone in self.zones if zone.offset < upto], echoes)

    def move(self, east: int) -> None:
        """The zone is another from here on."""
        if not self.zones or self.zones[-1].offset < len(self.data):
            self.zones.append(Decision(0, "out", 0, len(self.data), "zone", east))

    def look(self, data: bytes, passed_ms: int) -> None:
        self.data += data
        self.now += passed_ms * 1_000_000
        self.marks.append(Decision(0, "out", 0, len(self.data), "mark", self.now))


def span(echo: Decision) -> tuple[int, int]:
    return echo.offset, echo.offset + echo.value["bytes"]


class Agent:
    """Reads as `TextFile` does: a block from where the last ended; it may fall back to where it was, and forget caches."""

    def __init__(self, *, fast: bool = True) -> None:
        self.fast = fast
        self.reader = Reader(PREFIX, STREAM, fast=fast)
        self.position, self.state = 0, State()
        self.sent: dict[int, list[bytes]] = {}
        self.scopes: dict[int, bytes] = {}
        self.stops = [(0, State())]

    def read(self, written: Written, upto: int, budget: int = 1 << 20) -> None:
        while self.position < upto:
            start, data = self.position, written.data[self.position : upto]
            view = written.view(start, start + len(data[:budget]), upto)
            result = self.reader.read(data[:budget], start, self.state, view)
            if result.end == start and len(data) > budget:
                view = written.view(start, upto, upto)
                result = self.reader.read(data, start, self.state, view, one=True)
            if result.end == self.position:
                return
            for section in result.sections:
                self.keep(records_of(section), section.scope)
            self.position, self.state = result.end, State.from_json(result.state.to_json())
            self.stops.append((self.position, self.state))

    def keep(self, records: list[bytes], scope: bytes) -> None:
        for record in records:
            start = start_of(record)
            assert self.scopes.setdefault(start, scope) == scope
            assert self.sent.setdefault(start, [record]) == [record], "read twice, differently"

    def crash(self, back: int) -> None:
        self.position, self.state = self.stops[-1 - back % len(self.stops)]
        self.reader = Reader(PREFIX, STREAM, fast=self.fast)

    @property
    def received(self) -> list[Received]:
        """The records as a receiver decodes them, each with its logger."""
        scopes = [otlp.scope_logs(self.scopes[start], self.sent[start]) for start in sorted(self.sent)]
        return decode(otlp.resource_logs(otlp.resource({}), scopes))

    @property
    def records(self) -> list[bytes]:
        return [record for start in sorted(self.sent) for record in self.sent[start]]


def records_of(section: Section) -> list[bytes]:
    """Each record by itself."""
    joined = b"".join(section.records)
    ends = [0, *(end for _, _, end in otlp.fields(joined, 0, len(joined)))]
    assert (section.count, section.size) == (len(ends) - 1, len(joined))
    return [joined[start:end] for start, end in pairwise(ends)]


_UID = re.compile(re.escape(PREFIX) + rb"(\d+)-(\d+)")


def start_of(record: bytes) -> int:
    found = _UID.search(record)
    assert found is not None
    return int(found[1])


def received(records: list[bytes]) -> list[Received]:
    return decode(otlp.resource_logs(otlp.resource({}), [otlp.scope_logs(b"", records)]))


def write(dice: random.Random, atoms: list[int]) -> Written:
    """The atoms in some writes, looked at after each; sometimes what waits is cut."""
    written = Written(identities=[Decision(0, "out", 0, 0, "identity", 0)])
    written.now += dice.choice(
        [0, 2_000_000_000, 2_000_000_000]
    )  # only of a second that is over a header means the same for a while
    is_tidy = set(atoms) <= set(LINES) and dice.random() < 0.8
    left = [ATOMS[atom].replace(b"%d", b"%d" % dice.randrange(9)) for atom in atoms]
    while left:
        count = dice.choice([1, 2, 5, 30])
        data, left = b"".join(left[:count]), left[count:]
        if dice.random() < 0.15:  # noted before anything of it is seen
            low = dice.choice([0, data.find(b"\n") + 1, dice.randrange(len(data) + 1)])
            high = dice.choice([data.find(b"\n", low) + 1, len(data), dice.randrange(low, len(data) + 1)])
            if low < high:
                echo = Decision(0, "out", 0, len(written.data) + low, "echo", {"bytes": high - low})
                written.echoes.append(echo)
        if dice.random() < 0.05:
            written.move(dice.choice([0, 3600, 7200, -5 * 3600]))
        while data:
            size = dice.choice([len(data), dice.randrange(1, len(data) + 1)])
            written.look(data[:size], dice.choice([1, 30, 300]))
            data = data[size:]
            if dice.random() < 0.2:
                newline = written.data.rfind(b"\n") + 1
                cut = newline if is_tidy else dice.choice([len(written.data), newline or len(written.data)])
                if cut and (not written.cuts or written.cuts[-1] < cut):
                    written.cuts.append(cut)
        if dice.random() < 0.1:
            written.identities.append(Decision(0, "out", 0, len(written.data), "identity", len(written.data)))
    if not written.cuts or written.cuts[-1] < len(written.data):
        written.cuts.append(len(written.data))
    return written


def check_bytes(written: Written, found: list[Received]) -> None:
    """Each byte is in exactly one record, and shown there, or in an echo."""
    check_ranges(written, found)
    check_all_is_shown(written.data, found, [zone.value for zone in written.zones])


def check_ranges(written: Written, found: list[Received]) -> None:
    """Each byte is in the range of exactly one record, or in an echo."""
    ranges = [span(echo) for echo in written.echoes]
    for record in found:
        assert record.attributes["log.iostream"] == "stdout"
        start, _, end = record.uid.rpartition("/")[2].partition("-")
        ranges += [(int(start), int(end)), *ranges_of(record.attributes.get("skyrl.more_ranges", ""))]
    position = 0
    for start, end in sorted(ranges):
        assert start == position, f"bytes {position} to {start}"
        position = end
    assert position == len(written.data)


IS_FUZZ = settings().max_examples >= 1000
SHARDS, TEXTS, CASES = (100, 500, 20) if IS_FUZZ else (1, 500, 20)
"""Ways to cut, to crash and to read that are tried of each text: 10,000 cases, and 10⁶ under the profile "fuzz", in shards of
which as many run at once as there are cores."""


@pytest.mark.timeout(3600 if IS_FUZZ else 120)
@pytest.mark.parametrize("shard", range(SHARDS))
@settings(max_examples=TEXTS, deadline=None)
@given(texts, st.integers(0, 1 << 32))
def test_any_cut_any_crash_and_either_way_give_the_same_records(shard: int, atoms: list[int], seed: int) -> None:
    for case in range(CASES):
        dice = random.Random(seed + case)
        check_case(variant(atoms, dice), dice)


def variant(atoms: list[int], dice: random.Random) -> list[int]:
    """The atoms and some more: Hypothesis finds small texts; what comes of many lines, and of lines that repeat, others find.

    Half of the time they are what the fast way takes, for one byte of the others keeps it from a block.
    """
    some = dice.randrange(30)
    if dice.random() < 0.5:
        return [
            *atoms,
            *(dice.choice([*atoms, dice.randrange(COMMON), dice.randrange(len(ATOMS))]) for _ in range(some)),
        ]
    found = [atom for atom in atoms if atom in LINES][:15]
    while len(found) < some:
        found += [dice.choice([*atoms, dice.choice(LINES)])] if dice.random() < 0.3 else dice.choices(REPEATED, k=5)
    return [atom for atom in found if atom in LINES]


def check_case(atoms: list[int], dice: random.Random) -> None:
    written = write(dice, atoms)
    whole = Agent()
    whole.read(written, len(written.data))
    assert whole.position == len(written.data)
    check_bytes(written, whole.received)

    slow = Agent(fast=False)
    slow.read(written, len(written.data))
    assert slow.records == whole.records

    pieces = Agent()
    for mark in written.marks:
        pieces.read(written, mark.offset, dice.choice([40, 200, 1 << 20]))
        if dice.random() < 0.2:
            pieces.crash(dice.randrange(5))
    pieces.read(written, len(written.data), 100)
    assert pieces.records == whole.records


@settings(max_examples=50_000 if IS_FUZZ else 500, deadline=None)
@given(st.binary(max_size=300), st.data())
def test_any_bytes_are_read_to_the_end(data: bytes, choice: st.DataObject) -> None:
    written = Written(identities=[Decision(0, "out", 0, 0, "identity", 0)])
    size = choice.draw(st.integers(0, len(data)))
    for part in (data[:size], data[size:]):
        if part:
            written.look(part, 50)
    written.cuts.append(len(data))
    whole, pieces = Agent(), Agent()
    whole.read(written, len(data))
    for mark in written.marks:
        pieces.read(written, mark.offset)
    assert pieces.records == whole.records
    check_bytes(written, whole.received)


def test_a_zone_that_changes_while_an_event_is_open_holds_for_headers_that_were_met_before() -> None:
    written = Written(identities=[Decision(0, "out", 0, 0, "identity", 0)])
    line = b"INFO 11-23 05:35:4%d [core.py:402] message\n"
    written.look(b"x" * 1000 + b"\n", 1)  # what is known holds for offsets of as many digits
    written.look(line % 1 + line % 2 + line % 2 + b"ERROR 11-23 05:35:42 [core.py:88] x\n", 4000)
    written.move(7200)
    written.look(line % 1 + line % 1 + line % 2 + line % 2, 1)
    whole, slow = Agent(), Agent(fast=False)
    for agent in (whole, slow):
        agent.read(written, len(written.data))
    assert whole.records == slow.records


def test_a_prefix_that_is_masked_is_still_a_childs() -> None:
    """A stream that tears is read by the children that are known in it, so all ways must know the same ones."""
    prefix = b"(hf_" + b"b" * 30 + b" pid=1) "
    written = Written(identities=[Decision(0, "out", 0, 0, "identity", 0)])
    written.look(b"plain\n" + prefix + b"x\n", 1)
    agent = Agent()
    agent.read(written, len(written.data))
    assert agent.state.children == (prefix,)
    assert b"bbb" not in b"".join(agent.records)


ATTRIBUTES = (
    "code.file.path",
    "code.line.number",
    "process.pid",
    "skyrl.child",
    "thread.name",
    "skyrl.bar.states",
    "step",
)


def less(record: Received) -> Iterator[Received]:
    """The record with a byte missing in its body, and with an attribute missing."""
    body = record.body
    for place in {0, len(body) // 2, len(body) - 1} if body else ():
        if not body[place].isspace() and body[place] != "*":
            yield replace(record, body=body[:place] + body[place + 1 :])
    for name in record.attributes.keys() & ATTRIBUTES:
        if str(record.attributes[name]) in body:  # so nothing is missing
            continue
        yield replace(record, attributes={key: value for key, value in record.attributes.items() if key != name})


def test_a_swallowed_byte_is_noticed() -> None:
    """Else the tests above would not test that there is none."""
    noticed = 0
    for seed in range(60):
        dice = random.Random(seed)
        written = write(dice, [dice.randrange(len(ATOMS)) for _ in range(20)])
        agent = Agent()
        agent.read(written, len(written.data))
        for record in agent.received:
            for damaged in less(record):
                with pytest.raises(AssertionError):
                    check_all_is_shown(written.data, [damaged], [zone.value for zone in written.zones])
                noticed += 1
    assert noticed > 1000
