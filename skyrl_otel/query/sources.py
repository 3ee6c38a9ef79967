"""Where records come from. A source gives records that match a filter, in order; another kind is another class here."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from skyrl_otel.query.database import connect
from skyrl_otel.query.filters import Filter
from skyrl_otel.query.merge import in_order
from skyrl_otel.query.records import Owner, Record

_PAGE = 2000
_POLL_S = 0.3

_COLUMNS = (
    "r.id, r.time, r.observed, r.severity, r.severity_text, r.scope, r.body, r.stream, r.attributes, r.event_name,"
    " r.resource, r.source, r.start, r.end"
)


class Source(Protocol):
    """Somewhere records can be read from."""

    def read(self, wanted: Filter) -> Iterator[Record]:
        """What is there now, in order; with `wanted.limit`, the newest so many."""

    def follow(self, wanted: Filter, is_over: Callable[[], bool]) -> Iterator[Record | None]:
        """What comes after the last `read` began, as it comes; None after each look that found no more."""


class StoreSource:
    """A run's SQLite store, live or finished.

    Reads page by page: a reader who stands still in a pager must not hold a transaction open, for the collector's
    write-ahead log could not be cut meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen_id = 0
        self._owners: dict[int, Owner] = {}
        self._scopes: dict[int, str] = {}
        self._writers: dict[int, tuple[str, str, int]] = {}

    def read(self, wanted: Filter) -> Iterator[Record]:
        """Raises sqlite3.Error, FileNotFoundError."""
        with connect(self._path) as db:
            self._prepare(db, wanted)
            (self._seen_id,) = db.execute("SELECT coalesce(max(id), 0) FROM records").fetchone()
            if wanted.limit is None:
                yield from in_order(self._pages(db, wanted, newest_first=False))
            else:
                newest = in_order(self._pages(db, wanted, newest_first=True), newest_first=True)
                yield from reversed(list(itertools.islice(newest, wanted.limit)))

    def follow(self, wanted: Filter, is_over: Callable[[], bool]) -> Iterator[Record | None]:
        """Raises sqlite3.Error, FileNotFoundError."""
        conditions, values = _where(wanted)
        sql = f"SELECT {_COLUMNS} FROM records r WHERE r.id > ? AND r.id <= ?{conditions} ORDER BY r.id"
        with connect(self._path) as db:
            self._prepare(db, wanted)
            while True:
                over = is_over()  # asked before the look: what was written before the end is seen by it
                (newest,) = db.execute("SELECT coalesce(max(id), 0) FROM records").fetchone()
                if newest > self._seen_id:
                    rows = db.execute(sql, (self._seen_id, newest, *values)).fetchall()
                    self._seen_id = newest
                    yield from sorted((self._record(db, row) for row in rows), key=lambda record: record.order)
                yield None
                if over:
                    return
                time.sleep(_POLL_S)

    def _prepare(self, db: sqlite3.Connection, wanted: Filter) -> None:
        if wanted.grep is not None:
            search = wanted.grep.search
            db.create_function("regexp", 2, lambda _, body: search(_as_text(body)) is not None, deterministic=True)

    def _pages(self, db: sqlite3.Connection, wanted: Filter, *, newest_first: bool) -> Iterator[Record]:
        conditions, values = _where(wanted)
        # The index is (time, resource, id): the order of the pages and the place to go on from are both read from it.
        comparison, direction = ("<", "DESC") if newest_first else (">", "ASC")
        sql = (
            f"SELECT {_COLUMNS} FROM records r INDEXED BY records_by_time"
            f" WHERE (r.time, r.resource, r.id) {comparison} (?, ?, ?) AND r.id <= ?{conditions}"
            f" ORDER BY r.time {direction}, r.resource {direction}, r.id {direction} LIMIT {_PAGE}"
        )
        high = 1 << 62
        place = (high * 2 - 1, high, high) if newest_first else (-1, -1, -1)
        while True:
            rows = db.execute(sql, (*place, self._seen_id, *values)).fetchall()
            for row in rows:
                yield self._record(db, row)
            if len(rows) < _PAGE:
                return
            place = (rows[-1][1], rows[-1][10], rows[-1][0])

    def _record(self, db: sqlite3.Connection, row: tuple[Any, ...]) -> Record:
        writer, file, generation = self._writer(db, row[11]) if row[11] is not None else ("", "", 0)
        body = row[6] if isinstance(row[6], str) else json.loads(row[6]) if row[6] else ""
        return Record(
            time_unix_nano=row[1],
            observed_time_unix_nano=row[2],
            severity_number=row[3],
            severity_text=row[4] or "",
            scope=self._scope(db, row[5]),
            body=body,
            stream=row[7],
            attributes_json=row[8],
            event_name=row[9],
            resource=self._owner(db, row[10]),
            writer=writer,
            file=file,
            generation=generation,
            start=row[12],
            end=row[13],
        )

    def _owner(self, db: sqlite3.Connection, number: int) -> Owner:
        if number not in self._owners:
            (attributes,) = db.execute("SELECT attributes FROM resources WHERE id = ?", (number,)).fetchone()
            self._owners[number] = Owner.of(json.loads(attributes))
        return self._owners[number]

    def _scope(self, db: sqlite3.Connection, number: int) -> str:
        if number not in self._scopes:
            (self._scopes[number],) = db.execute("SELECT name FROM scopes WHERE id = ?", (number,)).fetchone()
        return self._scopes[number]

    def _writer(self, db: sqlite3.Connection, number: int) -> tuple[str, str, int]:
        if number not in self._writers:
            found = db.execute("SELECT writer, file, generation FROM sources WHERE id = ?", (number,)).fetchone()
            self._writers[number] = found
        return self._writers[number]


def _where(wanted: Filter) -> tuple[str, list[Any]]:
    """Conditions on `records r`, each beginning with AND, and their values."""
    who: list[str] = []
    values: list[Any] = []
    if wanted.actor:
        begins = "substr(actor_id, 1, length(?)) = ?"
        who.append(f"({begins} OR actor_name = ? OR actor_name GLOB ? OR actor_class = ? OR actor_class GLOB ?)")
        values += [wanted.actor] * 6
    if wanted.role:
        who.append("(role = ? OR role GLOB ?)")
        values += [wanted.role] * 2
    if wanted.rank is not None:
        who.append("rank = ?")
        values.append(wanted.rank)
    if wanted.node:
        who.append("(node = ? OR node GLOB ? OR substr(node_id, 1, length(?)) = ?)")
        values += [wanted.node] * 4
    if wanted.channel:
        who.append("channel = ?")
        values.append(wanted.channel)
    sql = f" AND r.resource IN (SELECT id FROM resources WHERE {' AND '.join(who)})" if who else ""
    if wanted.since_unix_nano is not None:
        sql += " AND r.time >= ?"
        values.append(wanted.since_unix_nano)
    if wanted.stream:
        sql += " AND r.stream = ?"
        values.append(wanted.stream)
    if wanted.grep is not None:
        sql += " AND regexp('', r.body)"
    return sql, values


def _as_text(body: str | bytes | None) -> str:
    return body if isinstance(body, str) else body.decode("utf-8", "replace") if body else ""
