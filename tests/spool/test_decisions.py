"""The journal survives a kill at any byte, and never gives a sequence number twice."""

from pathlib import Path

import pytest

from skyrl_otel.spool.checkpoint import Checkpoint, Position
from skyrl_otel.spool.decisions import Journal


def test_what_is_flushed_is_read_back(spool_root: Path) -> None:
    journal = Journal.open(spool_root / "decisions")
    made = [journal.add("out", 0, n * 10, "mark", n) for n in range(5)]
    journal.flush()
    journal.add("out", 0, 99, "cut", None)
    journal.close()
    again = Journal.open(spool_root / "decisions")
    assert again.decisions == made
    assert again.next_seq == 5


@pytest.mark.parametrize("kept", range(0, 120, 7))
def test_a_torn_tail_is_cut(spool_root: Path, kept: int) -> None:
    path = spool_root / "decisions"
    journal = Journal.open(path)
    for n in range(2):
        journal.add("out", 0, n, "mark", n)
    journal.flush()
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    again = Journal.open(path)
    added = again.add("err", 0, 7, "mark", 7)
    again.flush()
    last = Journal.open(path)
    assert last.decisions == [*again.decisions, added]
    assert [decision.seq for decision in last.decisions] == list(range(len(last.decisions)))


def test_a_rewritten_journal_keeps_counting(spool_root: Path) -> None:
    journal = Journal.open(spool_root / "decisions")
    made = [journal.add("out", 0, n, "mark", n) for n in range(100)]
    journal.rewrite([made[98], made[99]])
    assert journal.add("out", 0, 100, "mark", 100).seq == 100
    journal.flush()
    assert [d.seq for d in Journal.open(spool_root / "decisions").decisions] == [98, 99, 100]


def test_a_checkpoint_is_the_old_or_the_new_one(spool_root: Path) -> None:
    path = spool_root / "checkpoint"
    assert Checkpoint.read(path) == Checkpoint()
    first = Checkpoint({"out": Position(1, 4096, [2, [], []], 77)}, 5)
    first.write(path)
    assert Checkpoint.read(path) == first
    size_of_first = path.stat().st_size
    second = Checkpoint({"out": Position(1, 8192, None, 78)}, 6)
    second.write(path)
    assert Checkpoint.read(path) == second
    whole = path.read_bytes()
    for size in range(size_of_first, len(whole)):
        path.write_bytes(whole[:size])
        assert Checkpoint.read(path) == first
        second.write(path)  # behind what a full disk, or a kill, left
        assert Checkpoint.read(path) == second
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError):
        Checkpoint.read(path)


def test_a_checkpoint_file_does_not_grow_without_bound(spool_root: Path) -> None:
    path = spool_root / "checkpoint"
    for number in range(2000):
        Checkpoint({"out": Position(0, number)}).write(path)
    assert path.stat().st_size < 100_000
    assert Checkpoint.read(path).files["out"].offset == 1999
