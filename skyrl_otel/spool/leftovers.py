"""What runs and writers leave behind, and when that goes.

Nothing of a run goes while a line of it is not delivered, or while anybody of it lives. Then first what is large or secret
(our package, the token, the ballast), soon after the end; a week later the folder itself, by the agent of some later run.
The store is the collector's: it stays in the spool until a copy of it is safe in the log folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path

from skyrl_otel.config import is_run_id
from skyrl_otel.spool import library, locks
from skyrl_otel.spool.layout import JOB_FILE, RunDir, existing_runs

KEEP_S = 7 * 86400.0
"""How long a finished run's folder stays: its logs for the doctor, where its store lies for `skyrl-otel logs`."""

_QUIET_S = 60.0
"""A folder that was touched within this is not looked at: its process may have made nothing else yet."""

_UNBORN_S = 60.0
"""A writer's folder that was not finished within this never will be."""

_GRAVE = ".gone."
_DROPPED = ("ballast", "token")


def drop_unborn(run: RunDir) -> None:
    """Remove the folders of writers that never came to be, and what is left of removed ones. Never raises OSError."""
    try:
        unborn = list(run.path.glob("t-*"))
    except OSError:
        return
    for folder in unborn:
        with contextlib.suppress(OSError):
            old = time.time() - folder.stat().st_mtime > _UNBORN_S
            if old and not any(locks.is_held(path) for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def settle(run: RunDir) -> bool:
    """Drop what a delivered run does not need, the token and our package first of all. Whether it is delivered and over.

    The caller holds the agent's lock. Raises OSError.
    """
    if _holds_lines(run.path) or locks.is_held(run.launcher_lock) or locks.is_held(run.store / "lock"):
        return False
    for name in os.listdir(run.path):
        # A worker that comes later is the first of its job on this node again, and brings a new token.
        if name in _DROPPED or name.startswith(JOB_FILE):
            (run.path / name).unlink(missing_ok=True)
    library.drop(run)
    if run.copy_note.exists():
        drop_store(run)  # a collector that was killed between its last two steps
    return True


def settle_as_last(run: RunDir) -> None:
    """`settle` by somebody else than the agent, if that is gone. Raises OSError."""
    lock = locks.take(run.agent_lock)
    if lock is not None:
        try:
            settle(run)
        finally:
            os.close(lock)


def drop_store(run: RunDir) -> None:
    """Remove the store from the spool. The caller has the collector's lock, and a copy of it elsewhere. Raises OSError."""
    gone = run.store / "store.db.gone"
    # The first step decides: from then on the copy is the store. A write-ahead log alone would be taken for another's.
    with contextlib.suppress(FileNotFoundError):
        os.rename(run.store_file, gone)
    for path in (Path(f"{run.store_file}-wal"), Path(f"{run.store_file}-shm"), gone):
        path.unlink(missing_ok=True)


def tidy(root: Path, own: str) -> None:
    """Settle every finished run below `root` but `own`, and remove those that are old. Never raises OSError."""
    for run in existing_runs(root):
        if run.run_id != own:
            with contextlib.suppress(OSError):
                _tidy(run)
    with contextlib.suppress(OSError):
        for grave in root.glob(f"{_GRAVE}*"):
            if _is_quiet(grave):  # else somebody is at it; this one's process was killed over it
                _bury(grave, untouched=True)


def _tidy(run: RunDir) -> None:
    if not _is_quiet(run.path):
        return
    lock = locks.take(run.agent_lock)
    if lock is None:
        return
    try:
        if settle(run) and time.time() - _last_sign(run) > KEEP_S and not run.store_file.exists():
            grave = run.path.with_name(f"{_GRAVE}{run.run_id}.{secrets.token_hex(6)}")
            before = os.stat(run.path).st_mtime_ns
            os.rename(run.path, grave)
            _bury(grave, untouched=os.stat(grave).st_mtime_ns == before)
    finally:
        os.close(lock)


def _bury(grave: Path, *, untouched: bool) -> None:
    """Remove a folder that was taken out of the way; but where somebody came between, it is a run's again.

    Removing takes many steps, so it is not done under the run's name: a process that begins a run of that name meanwhile
    finds nothing, or all.
    """
    run_id = grave.name.removeprefix(_GRAVE).rpartition(".")[0]
    if not untouched or _holds_lines(grave) or locks.is_folder_in_use(grave / "lib"):
        for name in (run_id, f"{run_id[:60]}.{secrets.token_hex(4)}"):
            if is_run_id(name):
                with contextlib.suppress(OSError):  # a new one of that name has begun
                    os.rename(grave, grave.with_name(name))
                    return
        return
    shutil.rmtree(grave, ignore_errors=True)


def _holds_lines(path: Path) -> bool:
    """An agent removes a writer's folder once all of it is delivered: one that is there may hold what is not."""
    names = os.listdir(path)
    unborn = (path / name for name in names if name.startswith("t-"))
    return any(name.startswith("w-") for name in names) or any(
        locks.is_held(file) for folder in unborn for file in folder.iterdir()
    )


def _is_quiet(path: Path) -> bool:
    return time.time() - os.stat(path).st_mtime > _QUIET_S


def _last_sign(run: RunDir) -> float:
    """When a file of the run was written last."""
    times = [0.0]
    for folder in (run.path, run.store):
        with contextlib.suppress(FileNotFoundError):
            times += [entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(folder) if entry.is_file()]
    return max(times) or os.stat(run.path).st_mtime
