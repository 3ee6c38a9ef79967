"""Records are a pure function of bytes and decisions: a crash at any point, and a second reading, give the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from skyrl_otel.agent import decided
from skyrl_otel.agent.batch import Batch, build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool import decisions, layout
from skyrl_otel.spool.writer import WriterFolder
from tests.receiver import decode

ATOMS = {
    "line": b"line one\n",
    "part": b"part",
    "end": b"\r\n",
    "broken": b"\xff\xfe",
    "prefix": b"(A pid=1) ",
    "child": b"(B pid=2) x\n",
    "long": b"y" * 3000,
    "huge": b"z" * 300_000,
}
chunks = st.lists(st.sampled_from(sorted(ATOMS)), min_size=1, max_size=5)


class Crashes(RuleBasedStateMachine):
    """A writer writes; an agent looks, builds, sends, is answered or crashes, in any order; the clock is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
        run = layout.open_run(self.root, "run")
        self.folder = WriterFolder.create(run, facts={"role": "r"})
        self.now = 1_000_000_000_000
        self.written = {"out": b"", "err": b""}
        self.sent: dict[str, bytes] = {}
        self.ranges: dict[str, dict[int, int]] = {"out": {}, "err": {}}
        self.moments: dict[int, str] = {}
        self.under_way: list[Batch] = []  # at most two, the older one first: the newer is prepared, not yet sent
        self.rank = 0
        self.disk_full = False
        self.agent = self.start()

    def start(self) -> Writer:
        return Writer("run", self.folder.writer_id, self.folder.path)

    @rule(name=st.sampled_from(["out", "err"]), atoms=chunks)
    def write(self, name: str, atoms: list[str]) -> None:
        data = b"".join(ATOMS[atom] for atom in atoms)
        os.write(self.folder.fds[name], data)
        self.written[name] += data

    @rule()
    def learn(self) -> None:
        self.rank += 1
        self.folder.publish({"rank": self.rank})

    @rule(passed_ms=st.sampled_from([1, 100, 1500]))
    def look(self, passed_ms: int) -> None:
        self.now += passed_ms * 1_000_000
        self.agent.observe(self.now)

    @rule()
    def tidy(self) -> None:
        self.agent.bound_journal()

    @rule(full=st.booleans())
    def disk(self, full: bool) -> None:
        self.disk_full = full

    @precondition(lambda self: len(self.under_way) < 2)
    @rule(budget=st.sampled_from([256, 16 << 10, 1 << 20]))
    def send(self, budget: int) -> None:
        with self.disk_of(self.agent):
            batch = build([self.agent], budget)
        assert not batch.failed or not batch
        if batch:
            self.under_way.append(batch)

    @contextmanager
    def disk_of(self, agent: Writer) -> Iterator[None]:
        """The journal's disk is as `disk` says: a write on a full one writes a few bytes and fails."""

        def write_a_little(descriptor: int, content: bytes) -> None:
            os.write(descriptor, content[:-3])
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            if self.disk_full:
                patch.setattr(decisions, "write_all", write_a_little)
            yield

    def left(self, batch: Batch) -> None:
        """The receiver may have `batch`."""
        for record in decode(batch.body):
            before = self.sent.setdefault(record.uid, record.raw)
            assert before == record.raw, f"sent twice, differently: {record}"
            assert self.moments.setdefault(record.time, record.uid) == record.uid, "two records share a nanosecond"
            _, name, _, offsets = record.uid.split("/")
            if name in self.ranges:
                start, end = map(int, offsets.split("-"))
                assert self.ranges[name].setdefault(start, end) == end
        for item in batch.low_water:
            key, offset = item.split("=")
            for uid in {record.uid for record in decode(batch.body) if record.uid.startswith(key + "/")}:
                assert int(uid.rpartition("/")[2].split("-")[0]) >= int(offset), "sent below its own low-water mark"

    @precondition(lambda self: self.under_way)
    @rule(checkpointed=st.booleans())
    def accept(self, checkpointed: bool) -> None:
        batch = self.under_way[0]
        self.left(batch)
        batch.accept()
        if checkpointed and not self.disk_full:
            del self.under_way[0]
            self.agent.write_checkpoint()
        else:
            self.crash()

    @precondition(lambda self: self.under_way)
    @rule(all_of_it=st.booleans())
    def undo(self, all_of_it: bool) -> None:
        while self.under_way:
            self.under_way.pop().undo()
            if not all_of_it:
                break

    @rule()
    def crash(self) -> None:
        if self.under_way:
            self.left(self.under_way[0])
        self.agent.close()
        self.under_way = []
        self.disk_full = False
        self.agent = self.start()

    @invariant()
    def times_follow_the_bytes(self) -> None:
        times: dict[str, list[tuple[int, int]]] = {}
        for moment, uid in self.moments.items():
            file, _, offsets = uid.rpartition("/")
            times.setdefault(file, []).append((int(offsets.split("-")[0]), moment))
        for pairs in times.values():
            in_order = [moment for _, moment in sorted(pairs)]
            assert in_order == sorted(in_order)

    @invariant()
    def ranges_do_not_overlap(self) -> None:
        for ranges in self.ranges.values():
            position = 0
            for start, end in sorted(ranges.items()):
                assert start >= position
                position = end

    def teardown(self) -> None:
        self.disk_full = False
        for _ in range(40):
            self.look(1500)
            if not self.under_way:
                self.send(1 << 20)
            if self.under_way:
                self.accept(True)
        for name, data in self.written.items():
            position = 0
            for start, end in sorted(self.ranges[name].items()):
                assert start == position, f"{name}: bytes {position} to {start} were never sent"
                position = end
            assert position == len(data)
        self.agent.close()
        self.folder.close()
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def few_marks() -> Iterator[None]:
    """So that a short story has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decided, "_MANY_MARKS", 4)
        yield


TestCrashes = Crashes.TestCase
_STORIES = 60 if settings().max_examples < 1000 else 2_000
TestCrashes.settings = settings(max_examples=_STORIES, stateful_step_count=40, deadline=None)
