"""A store opened for reading: never changed, never held up."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from skyrl_otel.collector import schema


class WrongVersion(sqlite3.DatabaseError):
    """The store was written by another version of this package."""


@contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection.

    Raises:
        sqlite3.Error: it is no store, damaged, or another version's. FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no store", str(path))
    db = open_read_only(path)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != schema.VERSION:
            raise WrongVersion(f"{path} has schema {version}; this version of skyrl-otel reads {schema.VERSION}")
        yield db
    finally:
        db.close()


def open_read_only(path: Path) -> sqlite3.Connection:
    # SQLite's URI filenames: https://www.sqlite.org/uri.html
    name = f"file:{quote(str(path.absolute()))}?mode=ro"
    db = sqlite3.connect(name, uri=True, isolation_level=None, timeout=10, check_same_thread=False)
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        # A file in WAL mode in a folder that cannot be written, such as a store copied by hand to a read-only place.
        db.close()
        if Path(f"{path}-wal").exists():
            raise
        db = sqlite3.connect(f"{name}&immutable=1", uri=True, isolation_level=None, check_same_thread=False)
    return db
