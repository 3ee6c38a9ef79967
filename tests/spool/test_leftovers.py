"""What goes of a finished run, and what never does."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skyrl_otel.spool import leftovers, library, locks
from skyrl_otel.spool.layout import RunDir, existing_runs, open_run
from skyrl_otel.spool.writer import WriterFolder

OLD_S = leftovers.KEEP_S + 3600


def finished(root: Path, name: str, *, age_s: float = OLD_S) -> RunDir:
    """A run as one leaves it whose processes and agent are gone and all of whose lines are delivered."""
    run = open_run(root, name)
    library.ensure(run)
    run.store.mkdir(mode=0o700)
    for path in ("token", "ballast", "job-01000000", "agent.lock", "agent.log", "status", "run.json", "store/secret"):
        (run.path / path).write_text("x")
    grow_old(run, age_s)
    return run


def grow_old(run: RunDir, age_s: float) -> None:
    then = time.time() - age_s
    for path in (*run.path.rglob("*"), run.path):
        os.utime(path, (then, then))


def names(run: RunDir) -> set[str]:
    return set(os.listdir(run.path))


def test_secret_and_package_go_at_the_next_start_and_an_old_run_as_a_whole(spool_root: Path) -> None:
    recent, old = finished(spool_root, "recent", age_s=3600), finished(spool_root, "old")
    own = finished(spool_root, "own")
    leftovers.tidy(spool_root, "own")
    assert names(recent) == {"agent.lock", "agent.log", "status", "run.json", "store"}
    assert not old.path.exists()
    assert {"token", "lib"} <= names(own)
    grow_old(recent, OLD_S)
    leftovers.tidy(spool_root, "own")
    assert os.listdir(spool_root) == ["own"]


def test_a_run_with_undelivered_bytes_is_never_touched(spool_root: Path) -> None:
    run = finished(spool_root, "r")
    writer = WriterFolder.create(run)
    os.write(writer.fds["out"], b"not delivered\n")
    writer.close()
    grow_old(run, OLD_S)
    before = names(run)
    leftovers.tidy(spool_root, "")
    assert names(run) == before and (writer.path / "out").read_bytes() == b"not delivered\n"
    assert not leftovers.settle(run) and names(run) == before


@pytest.mark.parametrize("lock", ["agent.lock", "launcher.lock", "store/lock"])
def test_a_run_of_which_anybody_lives_is_not_touched(spool_root: Path, lock: str) -> None:
    run = finished(spool_root, "r")
    held = locks.take(run.path / lock)
    grow_old(run, OLD_S)
    leftovers.tidy(spool_root, "")
    assert {"token", "lib"} <= names(run)
    assert held is not None
    os.close(held)
    leftovers.tidy(spool_root, "")
    assert not run.path.exists()


def test_a_store_that_has_no_copy_stays(spool_root: Path) -> None:
    run = finished(spool_root, "r")
    run.store_file.write_text("the only one")
    grow_old(run, OLD_S)
    leftovers.tidy(spool_root, "")
    assert run.store_file.read_text() == "the only one" and "token" not in names(run)


def test_a_collector_killed_between_its_note_and_its_last_step(spool_root: Path) -> None:
    run = finished(spool_root, "r", age_s=3600)
    for name in ("store.db", "store.db-wal", "store.db.gone"):
        (run.store / name).write_text("also copied")
    run.copy_note.write_text(json.dumps({"path": "/logs/r.db", "store": "1"}))
    grow_old(run, 3600)
    leftovers.tidy(spool_root, "")
    assert sorted(os.listdir(run.store)) == ["copied", "secret"]


def test_the_package_stays_for_a_process_that_handed_its_path_on(spool_root: Path) -> None:
    run = finished(spool_root, "r")
    keeper = f"""
import sys
from pathlib import Path
from skyrl_otel.spool import library
from skyrl_otel.spool.layout import RunDir
print(library.keep(RunDir(Path({str(run.path)!r}), "r")), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", keeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == f"{run.lib}\n".encode()
    leftovers.tidy(spool_root, "")
    assert (run.lib / "skyrl_otel" / "agent" / "start.py").exists() and "token" not in names(run)
    process.stdin.close()
    process.wait()
    process.stdout.close()
    grow_old(run, OLD_S)
    leftovers.tidy(spool_root, "")
    assert not run.path.exists()


@contextmanager
def just_before_it_goes(monkeypatch: pytest.MonkeyPatch, act: object) -> Iterator[None]:
    rename = os.rename

    def slowly(source: Path, target: Path) -> None:
        if ".gone." in Path(target).name and ".gone." not in Path(source).name:
            act()  # type: ignore[operator]
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", slowly)
        yield


def test_a_run_id_that_is_used_again_at_that_moment(spool_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(spool_root, "r")
    writers: list[WriterFolder] = []
    with just_before_it_goes(monkeypatch, lambda: writers.append(WriterFolder.create(open_run(spool_root, "r")))):
        leftovers.tidy(spool_root, "")
    os.write(writers[0].fds["out"], b"kept")
    assert (writers[0].path / "out").read_bytes() == b"kept" and [r.run_id for r in existing_runs(spool_root)] == ["r"]
    writers[0].close()
    assert run.path.exists()


def test_what_came_between_is_found_even_where_the_name_is_taken_again(
    spool_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(spool_root, "r")

    def come_between() -> None:
        writer = WriterFolder.create(open_run(spool_root, "r"))
        os.write(writer.fds["out"], b"kept")
        writer.close()

    bury = leftovers._bury

    def late(grave: Path, *, untouched: bool) -> None:
        open_run(spool_root, "r").token.write_text("of a new run")
        bury(grave, untouched=untouched)

    monkeypatch.setattr(leftovers, "_bury", late)
    with just_before_it_goes(monkeypatch, come_between):
        leftovers.tidy(spool_root, "")
    runs = {run.run_id: list(run.path.glob("w-*/out")) for run in existing_runs(spool_root)}
    assert len(runs) == 2 and runs.pop("r") == []
    [[found]] = runs.values()
    assert found.read_bytes() == b"kept"


def test_a_removal_that_was_killed_is_finished_but_never_over_lines(spool_root: Path) -> None:
    for name in ("empty", "full"):
        run = finished(spool_root, name)
        if name == "full":
            WriterFolder.create(run).close()
        grow_old(run, OLD_S)
        run.path.rename(spool_root / f".gone.{name}.00ff")
    leftovers.tidy(spool_root, "")
    assert os.listdir(spool_root) == ["full"]


def test_two_that_tidy_at_once(spool_root: Path) -> None:
    for number in range(30):
        finished(spool_root, f"r{number}")
    tidy = f"""
from pathlib import Path
from skyrl_otel.spool import leftovers
leftovers.tidy(Path({str(spool_root)!r}), "")
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", tidy], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate()[1] for process in processes] == [b"", b""]
    assert not os.listdir(spool_root)


def test_a_lock_on_a_file_that_is_gone_is_no_lock(spool_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spool_root / "lock"
    opened = locks.open_file

    def then_it_goes(*arguments: object) -> int:
        descriptor = opened(*arguments)  # type: ignore[arg-type]
        path.unlink()
        return descriptor

    monkeypatch.setattr(locks, "open_file", then_it_goes)
    assert locks.take(path) is None
