"""Finding runs: live stores in the spool, finished ones in the log folder that the spool names or that is given."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from skyrl_otel.query.database import connect
from skyrl_otel.spool import locks
from skyrl_otel.spool.layout import existing_runs, started_unix_nano, store_path


class UnknownRun(LookupError):
    """No such run; the message lists those there are."""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run's store. `live`: a collector serves it now."""

    run_id: str
    path: Path
    started_unix_nano: int
    live: bool


def find_runs(spool_root: Path, log_dir: Path) -> list[FoundRun]:
    """All runs with a store, newest first. A run is taken from where the spool says that it lies."""
    found: dict[str, FoundRun] = {}
    for run in existing_runs(spool_root):
        path = store_path(run)
        about = _about(path)
        if about is not None:
            store, _, started = about
            found[store] = FoundRun(
                run.run_id, path, started or started_unix_nano(run), locks.is_held(run.store / "lock")
            )
    for path in sorted(log_dir.glob("*.db")):
        about = _about(path)
        if about is not None and about[0] not in found:
            found[about[0]] = FoundRun(about[1], path, about[2], live=False)
    return sorted(found.values(), key=lambda run: run.started_unix_nano, reverse=True)


def choose_run(runs: list[FoundRun], name: str) -> FoundRun:
    """The run of that name (or whose name begins so, if only one does); the newest for "".

    Raises:
        UnknownRun: there is none.
    """
    chosen = choose_name([run.run_id for run in runs], name)
    return next(run for run in runs if run.run_id == chosen)


def choose_name(names: list[str], name: str) -> str:
    """Of these names that one, or the only one that begins so; the first for "".

    Raises:
        UnknownRun: there is none.
    """
    if not names:
        raise UnknownRun("no run is recorded here; start one with: skyrl-otel run -- python train.py")
    if not name:
        return names[0]
    similar = [known for known in names if known.startswith(name)]
    if name in names or len(similar) == 1:
        return name if name in names else similar[0]
    listed = ", ".join((similar or names)[:10])
    more = f" and {len(similar or names) - 10} more" if len(similar or names) > 10 else ""
    problem = "is ambiguous" if similar else "is not recorded here"
    raise UnknownRun(f"run {name!r} {problem}; there are {listed}{more}")


def _about(path: Path) -> tuple[str, str, int] | None:
    """(store id, run, start) if the file is a store of ours."""
    try:
        with connect(path) as db:
            meta = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('store', 'run', 'started_unix_nano')"))
            return str(meta["store"]), str(meta["run"]), int(meta["started_unix_nano"])
    except (sqlite3.Error, OSError, KeyError, ValueError):
        return None
