"""The run's store: SQLite in WAL mode, written by one thread, read by anybody.

Everything that must be true together is one transaction: rows, the spans and marks that recognise repeats, the counters,
the lengths of the text files. ``synchronous=NORMAL``: a commit survives the death of this process, not that of the
machine, which takes the training run with it.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from skyrl_otel.collector import schema
from skyrl_otel.collector.decode import Row
from skyrl_otel.collector.dedup import Deduplicator, Sifted
from skyrl_otel.collector.resource import Resource

# sqlite3 lets go of the GIL and asks for it again at each statement, and a thread that decodes may then hold it for 5 ms;
# many rows in a statement make that rare. 13 columns × 70 rows stay below 999 parameters, the limit before SQLite 3.32.
_ROWS_AT_ONCE = 70
_COLUMNS = (
    "time, observed, severity, severity_text, scope, body, stream, attributes, event_name, resource, source, start, end"
)
_INSERT = f"INSERT INTO records ({_COLUMNS}) VALUES "
_PLACES = f"({', '.join('?' * len(Row._fields))})"
_INSERT_MANY = _INSERT + ", ".join([_PLACES] * _ROWS_AT_ONCE)
_ERROR = 17  # SeverityNumber ERROR
_RESOURCE_COLUMNS = ", ".join(field.name for field in fields(Resource))
_RESOURCE_PLACES = ", ".join("?" * len(fields(Resource)))


class StoreError(Exception):
    """The store cannot be opened; the message names the path and the way out."""


@dataclass(slots=True)
class _Tally:
    """What one transaction adds to a resource's counters."""

    records: int = 0
    errors: int = 0
    size_bytes: int = 0
    first: int = 1 << 62
    last: int = 0


class Store:
    """The writing side. All methods belong to one thread; `begin` … `commit` or `rollback`."""

    def __init__(self, path: Path, *, run_id: str) -> None:
        """Open or make the store.

        Raises:
            StoreError: it is another version's, damaged, or cannot be made.
        """
        self.path = path
        self._ids: dict[tuple[str, str], int] = {}
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-32000")
            self._db.execute("PRAGMA journal_size_limit=67108864")
            self._prepare(run_id)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"cannot open the store {path}: {error}; free the disk or move the file away") from error

    def _prepare(self, run_id: str) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, schema.VERSION):
            raise StoreError(
                f"{self.path} has schema {version}, this version writes {schema.VERSION}; move it away to begin a new one"
            )
        if version == 0:
            meta = {"run": run_id, "store": secrets.token_hex(16), "started_unix_nano": time.time_ns()}
            meta |= dict.fromkeys(("records", "repeats_dropped", "below_low_water_dropped", "requests"), 0)
            self.begin()  # one transaction: a kill leaves no half-made store behind
            for statement in filter(str.strip, schema.TABLES.split(";")):
                self._db.execute(statement)
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            self._db.execute(f"PRAGMA user_version={schema.VERSION}")
            self.commit()

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Take back what was begun. Never raises: SQLite may have done it by itself when the disk was full."""
        self._ids.clear()
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error:
            pass

    def size_bytes(self) -> int:
        """What the store takes on disk, its write-ahead log included."""
        total = 0
        for suffix in ("", "-wal"):
            try:
                total += os.stat(f"{self.path}{suffix}").st_size
            except OSError:
                pass
        return total

    def load_seen(self) -> Deduplicator:
        """What earlier transactions know of each source."""
        spans: dict[int, list[array[int]]] = {}
        for source, blob in self._db.execute("SELECT source, spans FROM seen ORDER BY id"):
            pairs = array("Q")
            pairs.frombytes(blob)
            spans.setdefault(source, []).append(pairs)
        dedup = Deduplicator()
        for number, name, low_water in self._db.execute("SELECT id, name, low_water FROM sources"):
            dedup.restore(name, low_water, spans.get(number, ()))
        return dedup

    def add(self, resources: tuple[Resource, ...], sifted: Sifted) -> None:
        """Write one batch. Raises sqlite3.Error."""
        self._remember(sifted)
        ids = [self._resource_id(resource) for resource in resources]
        scopes = {name: self._scope_id(name) for name in dict.fromkeys(row.scope for row in sifted.fresh)}
        sources = {name: self._source_id(name) for name in sifted.spans}
        rows = sifted.fresh
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[at : at + _ROWS_AT_ONCE]
            values: list[object] = []
            for row in chunk:
                values += row
                values[-9], values[-4] = scopes[row.scope], ids[row.resource]
                values[-3] = sources[row.source] if row.source else None
            sql = _INSERT_MANY if len(chunk) == _ROWS_AT_ONCE else _INSERT + ", ".join([_PLACES] * len(chunk))
            self._db.execute(sql, values)
        self._count(ids, sifted)

    def _count(self, ids: list[int], sifted: Sifted) -> None:
        tallies: dict[int, _Tally] = {}
        for row in sifted.fresh:
            tally = tallies.setdefault(row.resource, _Tally())
            tally.records += 1
            tally.errors += row.severity >= _ERROR
            tally.size_bytes += len(row.body)
            tally.first, tally.last = min(tally.first, row.time), max(tally.last, row.time)
        for index, tally in tallies.items():
            self._db.execute(
                "UPDATE resources SET records = records + ?, errors = errors + ?, bytes = bytes + ?,"
                " first_time = min(coalesce(first_time, ?4), ?4), last_time = max(coalesce(last_time, 0), ?5)"
                " WHERE id = ?6",
                (tally.records, tally.errors, tally.size_bytes, tally.first, tally.last, ids[index]),
            )
        added = Counter(
            records=len(sifted.fresh),
            repeats_dropped=sifted.repeats,
            below_low_water_dropped=sifted.below_low_water,
            requests=1,
        )
        self._db.executemany(
            "UPDATE meta SET value = value + ? WHERE key = ?", [(n, key) for key, n in added.items() if n]
        )

    def _remember(self, sifted: Sifted) -> None:
        for name, mark in sifted.low_water.items():
            source = self._source_id(name)
            self._db.execute("UPDATE sources SET low_water = ? WHERE id = ?", (mark, source))
            self._db.execute("DELETE FROM seen WHERE source = ? AND last < ?", (source, mark))
        for name, pairs in sifted.spans.items():
            self._db.execute(
                "INSERT INTO seen (source, last, spans) VALUES (?, ?, ?)",
                (self._source_id(name), max(pairs[::2]), pairs.tobytes()),
            )

    def _resource_id(self, resource: Resource) -> int:
        key = ("resource", resource.attributes)
        if key not in self._ids:
            self._db.execute(
                f"INSERT OR IGNORE INTO resources ({_RESOURCE_COLUMNS}) VALUES ({_RESOURCE_PLACES})", astuple(resource)
            )
            found = self._db.execute("SELECT id FROM resources WHERE attributes = ?", (resource.attributes,))
            self._ids[key] = found.fetchone()[0]
        return self._ids[key]

    def _scope_id(self, name: str) -> int:
        key = ("scope", name)
        if key not in self._ids:
            self._db.execute("INSERT OR IGNORE INTO scopes (name) VALUES (?)", (name,))
            self._ids[key] = self._db.execute("SELECT id FROM scopes WHERE name = ?", (name,)).fetchone()[0]
        return self._ids[key]

    def _source_id(self, name: str) -> int:
        key = ("source", name)
        if key not in self._ids:
            writer, file, generation = name.split("/")
            self._db.execute(
                "INSERT OR IGNORE INTO sources (name, writer, file, generation) VALUES (?, ?, ?, ?)",
                (name, writer, file, int(generation)),
            )
            self._ids[key] = self._db.execute("SELECT id FROM sources WHERE name = ?", (name,)).fetchone()[0]
        return self._ids[key]

    def texts(self) -> dict[str, tuple[Path, int]]:
        """channel → path and committed length of its text file."""
        return {
            channel: (Path(path), length)
            for channel, path, length in self._db.execute("SELECT channel, path, length FROM texts")
        }

    def set_text(self, channel: str, path: Path, length: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", (channel, str(path), length))

    def followed(self) -> Iterator[tuple[str, str]]:
        """(process, rule) as the router decided it."""
        yield from self._db.execute("SELECT process, rule FROM followed")

    def set_followed(self, decided: Mapping[str, str]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO followed VALUES (?, ?)", decided.items())

    def wait(self, process: str, otherwise: str, text: bytes) -> None:
        """Keep lines until their process is placed."""
        self._db.execute("INSERT INTO waiting (process, otherwise, text) VALUES (?, ?, ?)", (process, otherwise, text))

    def release(self, process: str) -> list[tuple[str, bytes]]:
        """Give back what waits for this process, oldest first, as (file's key if it never was placed, lines)."""
        found = self._db.execute(
            "SELECT otherwise, text FROM waiting WHERE process = ? ORDER BY id", (process,)
        ).fetchall()
        self._db.execute("DELETE FROM waiting WHERE process = ?", (process,))
        return found

    def wait_for(self, process: str) -> list[str]:
        """The files of the lines that wait for this process, if it never is placed."""
        found = self._db.execute("SELECT DISTINCT otherwise FROM waiting WHERE process = ?", (process,))
        return [otherwise for (otherwise,) in found]

    def waiting(self) -> list[str]:
        """The processes whose lines wait."""
        return [process for (process,) in self._db.execute("SELECT DISTINCT process FROM waiting")]

    def agents(self) -> Iterator[tuple[str, int, str]]:
        """(agent, when heard, status JSON) of each agent that earlier lives heard."""
        yield from self._db.execute("SELECT agent, heard_unix_nano, status FROM agents")

    def set_agents(self, reports: Iterable[tuple[str, int, str]]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO agents VALUES (?, ?, ?)", reports)

    def meta(self) -> Mapping[str, int | str]:
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def copy(self, target: Path) -> Path:
        """Copy the store to `target`, complete, on disk and looked at or not at all, and return where it went.

        A file of that name that belongs to another store (a run of the same name, earlier) is kept, and the copy goes
        beside it.

        Raises:
            OSError, sqlite3.Error: nothing is left behind.
        """
        mine = str(self.meta()["store"])
        number = 1
        stem = target.stem
        while target.exists() and store_of(target) != mine:
            number += 1
            target = target.with_name(f"{stem}-{number}{target.suffix}")
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            os.close(os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            copy = sqlite3.connect(scratch, isolation_level=None)
            try:
                copy.execute("PRAGMA synchronous=OFF")
                self._db.backup(copy, pages=-1)
                # A file in WAL mode cannot be read from a folder that the reader may not write to.
                copy.execute("PRAGMA journal_mode=DELETE")
                if _extent(copy) != _extent(self._db):
                    raise OSError(errno.EIO, f"the copy at {scratch} is not what was copied")
            finally:
                copy.close()
            _to_disk(scratch)
            os.replace(scratch, target)
            _to_disk(target.parent)
        except BaseException:
            for suffix in ("", "-journal", "-wal", "-shm"):
                Path(f"{scratch}{suffix}").unlink(missing_ok=True)
            raise
        return target

    def close(self) -> None:
        """Bring the write-ahead log home and close."""
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            pass
        self._db.close()


def _extent(db: sqlite3.Connection) -> list[object]:
    """What two equal stores have in common, without reading them whole."""
    questions = ("PRAGMA page_count", "SELECT max(id) FROM records", "SELECT * FROM meta ORDER BY key")
    return [db.execute(question).fetchall() for question in questions]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def store_of(path: Path) -> str | None:
    """Which store a file is; None where it is none."""
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        try:
            return str(db.execute("SELECT value FROM meta WHERE key = 'store'").fetchone()[0])
        finally:
            db.close()
    except (sqlite3.Error, TypeError):
        return None
