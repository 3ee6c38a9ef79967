"""A collector's life: start, readiness, trouble with disks, an orderly end, the next life."""

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_otel.query.filters import Filter
from skyrl_otel.query.health import check_run
from skyrl_otel.query.runs import find_runs
from skyrl_otel.query.sources import StoreSource
from tests.collector_process import START, CollectorProcess, Line, is_root, request, wait_until


def test_invariant_8_nothing_is_open_to_other_users(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request([Line()]))
    folders = [collector.run.store, collector.log_dir]
    files = [path for folder in folders for path in folder.iterdir()]

    assert len(files) >= 7  # lock, secret, ready, store with its two companions, two text files
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in files} == {str(path): 0o600 for path in files}
    assert collector.stop()[0] == 0
    assert stat.S_IMODE((collector.log_dir / "run-1.db").stat().st_mode) == 0o600
    assert client.token not in Path(f"/proc/{os.getpid()}/cmdline").read_text()


def test_the_users_own_log_folder_keeps_its_mode(collector: CollectorProcess) -> None:
    collector.log_dir.mkdir(mode=0o755)

    collector.start()

    assert stat.S_IMODE(collector.log_dir.stat().st_mode) == 0o755


def test_it_listens_on_the_given_address_only(collector: CollectorProcess) -> None:
    client = collector.start()
    port = client.host.split(":")[1]
    wanted = f"0100007F:{int(port):04X}"  # 127.0.0.1, in the byte order of /proc/net/tcp

    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]

    assert [address for address in listening if address.endswith(wanted[8:])] == [wanted]


def test_a_second_collector_of_the_run_says_so_and_goes(collector: CollectorProcess, spool_root: Path) -> None:
    client = collector.start()
    second = CollectorProcess(spool_root, collector.log_dir)

    process = second.spawn()
    said = second.said()

    assert process.returncode == 3
    assert f"run run-1 has a collector already: http://{client.host}, pid {collector.pid}" in said
    assert client.post(request([Line()])).status == 200


def test_the_next_life_has_the_same_address_token_and_files(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request([Line("before")]))
    first = collector.ready()
    collector.kill()

    again = collector.start()

    assert (again.host, again.token) == (client.host, client.token)
    second = collector.ready()
    assert first is not None and second is not None and second["pid"] == collector.pid
    assert {**first, "pid": 0} == {**second, "pid": 0}
    again.post(request([Line("after")]))
    assert [line.split(maxsplit=5)[5] for line in collector.text().splitlines()] == ["before", "after"]


def test_two_runs_that_begin_in_one_second_have_their_own_files(collector: CollectorProcess, spool_root: Path) -> None:
    others = [CollectorProcess(spool_root, collector.log_dir, f"other-{number}") for number in range(2)]
    try:
        for process in (collector, *others):
            process.spawn()
        wait_until(lambda: all(process.ready() for process in (collector, *others)), "all ready")
        paths = [process.ready()["infra"] for process in (collector, *others)]  # type: ignore[index]
        assert len(set(paths)) == 3
    finally:
        for process in others:
            process.close()


def test_sigterm_commits_what_is_under_way_and_copies_the_store(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request([Line("kept", (0, 5))]))

    code, said = collector.stop()

    assert (code, "Traceback" in said) == (0, False)
    assert not list(collector.run.store.glob("*-wal"))
    copy = collector.log_dir / "run-1.db"
    collector.log_dir.chmod(0o500)  # a reader need not be able to write there
    try:
        db = sqlite3.connect(f"file:{copy}?mode=ro", uri=True)
        assert db.execute("SELECT body FROM records").fetchall() == [("kept",)]
        db.close()
    finally:
        collector.log_dir.chmod(0o700)


def test_the_store_leaves_the_spool_once_its_copy_is_safe_and_is_found_there(
    collector: CollectorProcess, spool_root: Path, tmp_path: Path
) -> None:
    collector.start().post(request([Line("kept", (0, 5))]))
    assert collector.stop()[0] == 0
    assert not list(collector.run.store.glob("*.db*"))
    [found] = find_runs(spool_root, tmp_path / "not the log folder")
    assert (found.run_id, found.path, found.live) == ("run-1", collector.log_dir / "run-1.db", False)
    assert [record.body for record in StoreSource(found.path).read(Filter())] == ["kept"]
    assert any("1 records" in finding.text for finding in check_run(collector.run, is_newest=True))


def test_the_next_life_goes_on_with_the_copy_and_knows_what_it_has(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request([Line("before", (0, 7))]))
    collector.stop()
    again = collector.start()
    again.post(request([Line("before", (0, 7)), Line("after", (7, 13))]))
    assert collector.rows() == ["before", "after"] and collector.store.parent == collector.run.store
    assert collector.meta()["repeats_dropped"] == 1
    collector.stop()
    assert collector.store == collector.log_dir / "run-1.db" and collector.rows() == ["before", "after"]
    assert [path.name for path in collector.log_dir.glob("*.db")] == ["run-1.db"]


@pytest.mark.parametrize("killed", ["before its last step", "amid its last step", "while it was brought back"])
def test_a_collector_killed_around_the_handover_loses_and_repeats_nothing(
    collector: CollectorProcess, killed: str
) -> None:
    collector.start().post(request([Line("one", (0, 3))]))
    collector.stop()
    spooled = collector.run.store_file
    if killed == "before its last step":
        shutil.copyfile(collector.store, spooled)
    elif killed == "amid its last step":
        shutil.copyfile(collector.store, collector.run.store / "store.db.gone")
        Path(f"{spooled}-wal").write_bytes(b"of an earlier life")
    else:
        (collector.run.store / ".store.db").write_bytes(b"SQLite format 3")
    collector.start().post(request([Line("one", (0, 3)), Line("two", (3, 6))]))
    assert collector.rows() == ["one", "two"]
    collector.kill()  # with rows that no copy has
    collector.start()
    collector.stop()
    assert collector.rows() == ["one", "two"] and collector.store.parent == collector.log_dir


def test_a_store_that_cannot_be_copied_stays(collector: CollectorProcess, tmp_path: Path) -> None:
    collector.start().post(request([Line("kept")]))
    collector.log_dir.rename(tmp_path / "moved away")
    code, said = collector.stop()
    assert code == 1 and f"the store stays at {collector.run.store_file}" in said
    assert not collector.run.copy_note.exists() and collector.rows() == ["kept"]


def test_a_copy_that_was_moved_away_is_no_reason_not_to_start(collector: CollectorProcess, tmp_path: Path) -> None:
    collector.start().post(request([Line("one")]))
    collector.stop()
    collector.store.rename(tmp_path / "archive.db")
    collector.start().post(request([Line("two")]))
    assert collector.rows() == ["two"]


def test_a_copy_never_replaces_another_runs_store_of_that_name(
    collector: CollectorProcess, spool_root: Path, tmp_path: Path
) -> None:
    collector.start().post(request([Line("old")]))
    collector.stop()
    for _ in range(2):  # the same store again, then a store whose spool is another: two runs named alike
        collector.start()
        collector.stop()
    elsewhere = tmp_path / "spool-2"
    other = CollectorProcess(elsewhere, collector.log_dir)
    other.start().post(request([Line("new")]))
    other.stop()
    other.close()

    bodies = {}
    for path in sorted(collector.log_dir.glob("*.db")):
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        bodies[path.name] = db.execute("SELECT body FROM records").fetchall()
        db.close()
    assert bodies == {"run-1-2.db": [("new",)], "run-1.db": [("old",)]}


def test_a_request_under_way_at_sigterm_is_answered(collector: CollectorProcess) -> None:
    client = collector.start()
    body = request([Line(f"{n}", (n, n + 1)) for n in range(20_000)]).SerializeToString()
    pid = os.fork()
    if pid == 0:
        time.sleep(0.05)
        os.kill(collector.pid, signal.SIGTERM)
        os._exit(0)
    try:
        status = client.post(body).status
    except OSError:
        status = 0  # it came too late, and nothing of it is there
    os.waitpid(pid, 0)
    assert collector.wait() == 0

    assert len(collector.rows()) == (20_000 if status == 200 else 0)


@pytest.mark.parametrize("bad", ["file", "unwritable"])
def test_a_log_folder_that_cannot_be_used_is_named_with_the_way_out(collector: CollectorProcess, bad: str) -> None:
    if bad == "file":
        collector.log_dir.write_text("")
    elif is_root():
        collector.log_dir = Path("/proc/nothing/logs")  # root may write anywhere else
    else:
        collector.log_dir.mkdir(mode=0o500)

    process = collector.spawn()
    said = collector.said()

    assert process.returncode == 2
    assert said.count("\n") == 1
    assert str(collector.log_dir) in said and "set SKYRL_OTEL_LOG_DIR" in said


def test_a_store_of_another_version_is_not_touched(collector: CollectorProcess) -> None:
    collector.start()
    collector.stop()
    db = sqlite3.connect(collector.store)
    db.execute("PRAGMA user_version=99")
    db.close()

    process = collector.spawn()

    assert "has schema 99" in collector.said()
    assert process.returncode == 2


def test_a_store_at_its_limit_refuses_and_says_which_setting(collector: CollectorProcess) -> None:
    client = collector.start("--store-max-bytes", "2000000")
    for step in range(1000):
        answer = client.post(request([Line("x" * 1000, (n, n + 1)) for n in range(step * 100, step * 100 + 100)]))
        if answer.status != 200:
            break

    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert b"SKYRL_OTEL_STORE_MAX" in answer.body
    assert client.status({"agent": "a", "drained": False}).status == 204
    code, said = collector.stop()
    assert code == 0
    assert said.count("takes nothing now") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MB."""
    if not is_root():
        pytest.skip("needs root to mount a small tmpfs")
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", path], capture_output=True)
    if done.returncode:
        pytest.skip(f"this machine lets nobody mount a tmpfs: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("what", ["store", "text"])
def test_a_full_disk_stops_nothing_half_way_and_recovers_by_itself(
    collector: CollectorProcess, small_disk: Path, tmp_path: Path, what: str
) -> None:
    if what == "store":
        process = CollectorProcess(small_disk / "spool", tmp_path / "logs")
    else:
        process = CollectorProcess(collector.run.path.parent, small_disk / "logs", "run-2")
    try:
        client = process.start()
        sent: list[str] = []
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"\0" * (3 << 20))
        at = 0
        refused = None
        while refused is None and at < 100_000:
            batch = [Line(f"{n} " + "x" * 500, (n, n + 1), time=START + n) for n in range(at, at + 200)]
            answer = client.post(request(batch), low_water="")
            if answer.status == 200:
                sent += [line.body for line in batch]
                at += 200
            else:
                refused = answer
        assert refused is not None and refused.status == 503, refused
        assert refused.headers["retry-after"] == "5"
        folder = str(process.run.store if what == "store" else process.log_dir)
        assert folder in refused.body.decode() and "full" in refused.body.decode()
        for _ in range(3):
            assert client.post(request(batch)).status == 503
        assert process.rows() == sent
        assert [line.split(maxsplit=5)[5] for line in process.text().splitlines()] == sent

        ballast.unlink()
        assert client.post(request(batch)).status == 200
        sent += [line.body for line in batch]
        assert process.rows() == sent
        assert [line.split(maxsplit=5)[5] for line in process.text().splitlines()] == sent
        _, said = process.stop()
        assert said.count("takes nothing now") == 1 and said.count("takes records again") == 1
        assert folder in said and "Traceback" not in said
    finally:
        process.close()


def test_it_ends_by_itself_when_nobody_is_left(collector: CollectorProcess) -> None:
    process = collector.spawn("--exit-when-drained", "--silence-s", "0.5")

    assert process.wait(30) == 0
    assert (collector.log_dir / "run-1.db").exists()


def test_it_stays_while_an_agent_that_holds_bytes_may_come_back(collector: CollectorProcess) -> None:
    client = collector.start("--exit-when-drained", "--silence-s", "0.5")
    began = time.monotonic()
    client.status({"agent": "a", "drained": False})

    assert collector.wait() == 0
    assert time.monotonic() - began > 2.5
