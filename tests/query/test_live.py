"""Reading while the collector writes."""

import itertools
import os
import sqlite3
from pathlib import Path

import pytest

from skyrl_otel.query.filters import Filter
from skyrl_otel.query.runs import UnknownRun, choose_run, find_runs
from skyrl_otel.query.sources import StoreSource
from skyrl_otel.spool.layout import open_run
from tests.collector_process import START, Line, request
from tests.stores import LiveStore, make_store


def test_follow_gives_what_comes_after_the_read_once_and_in_order(tmp_path: Path) -> None:
    live = LiveStore(tmp_path / "store.db")
    live.add(request([Line("a", time=START), Line("b", time=START + 1)], {"skyrl.role": "policy"}))
    source = StoreSource(live.path)
    wanted = Filter(role="policy", limit=1)
    assert [record.body for record in source.read(wanted)] == ["b"]

    following = source.follow(wanted, lambda: False)
    assert next(following) is None
    live.add(request([Line("d", time=START + 3), Line("c", time=START + 2)], {"skyrl.role": "policy"}))
    live.add(request([Line("not asked for")], {"skyrl.role": "ref"}))
    live.add(request([Line("new writer", time=START + 4)], {"skyrl.role": "policy", "skyrl.rank": 1}))

    found = [record.body for record in itertools.islice((r for r in following if r is not None), 3)]
    assert found == ["c", "d", "new writer"]
    following.close()
    live.close()


def test_follow_ends_after_one_more_look_when_all_is_over(tmp_path: Path) -> None:
    live = LiveStore(tmp_path / "store.db")
    source = StoreSource(live.path)
    assert list(source.read(Filter())) == []
    live.add(request([Line("last words")]))

    found = list(source.follow(Filter(), lambda: True))

    assert [record and record.body for record in found] == ["last words", None]
    live.close()


def test_a_reader_that_stands_still_does_not_keep_the_write_ahead_log(tmp_path: Path) -> None:
    live = LiveStore(tmp_path / "store.db")
    live.add(*(request([Line(f"{n}")]) for n in range(20)))
    reader = StoreSource(live.path).read(Filter())
    next(reader)

    db = sqlite3.connect(live.path)
    busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    db.close()

    assert busy == 0
    assert Path(f"{live.path}-wal").stat().st_size == 0
    reader.close()
    live.close()


def test_runs_are_found_in_the_spool_and_in_the_log_folder_once(spool_root: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    make_store(logs / "older.db", [request([Line()])], "older")
    (logs / "notes.db").write_text("not a store")
    (logs / "foreign.db").touch()
    sqlite3.connect(logs / "foreign.db").execute("CREATE TABLE t (x)").connection.close()
    both = LiveStore(open_run(spool_root, "both").store / "store.db", "both")
    both.add(request([Line()]))
    both.close(copy_to=logs / "both.db")
    os.mkdir(spool_root / "no-store", 0o700)

    found = find_runs(spool_root, logs)

    assert [(run.run_id, run.path.parent.name, run.live) for run in found] == [
        ("both", "store", False),
        ("older", "logs", False),
    ]
    assert choose_run(found, "").run_id == "both"
    assert choose_run(found, "old").run_id == "older"
    with pytest.raises(UnknownRun, match="run 'nope' is not recorded here; there are both, older"):
        choose_run(found, "nope")
    with pytest.raises(UnknownRun, match="no run is recorded here"):
        choose_run(find_runs(tmp_path / "nothing", tmp_path / "nothing"), "")
