"""Reading from Loki: the same filters, lines and order as from a store.

Loki's HTTP API: grafana.com/docs/loki, "Loki HTTP API", query_range and label values.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from skyrl_otel.query import logql
from skyrl_otel.query.explain import advice
from skyrl_otel.query.filters import Filter
from skyrl_otel.query.loki_records import record_of
from skyrl_otel.query.merge import in_order
from skyrl_otel.query.records import Record
from skyrl_otel.query.runs import UnknownRun, choose_name

PAGE = 5000
"""Loki's default of `max_entries_limit_per_query`."""

_TIMEOUT_S = 60.0
_POLL_S = 1.0
_BACK_NS = 30 * 86_400 * 10**9 - 3_600 * 10**9
"""How far back is looked without --since: Loki's default `max_query_length` is 30 days and an hour."""
_AHEAD_NS = 600 * 10**9
_GROWTH = 8
"""How much more time is asked for after a page that was not full."""
_LATE_NS = 120 * 10**9
"""`follow` shows what arrives up to this late: lines of a node come in their order, but nodes one after another."""

_OVERLAP_NS, _WIDE_PAUSE = 5 * 10**9, 4.0
"""Between two looks over all of that it goes this little back; pauses between those are this many times their length."""


class LokiError(Exception):
    """Loki did not answer, or answered that it will not; the message says what and what to do."""


class Loki:
    """One Loki and the headers (tenant, authorization) it wants."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, tenant: str = "") -> None:
        self.url = url.rstrip("/")
        self._headers = {"X-Loki-Response-Encoding-Flags": "categorize-labels", **(headers or {})}
        if tenant:
            self._headers["X-Scope-OrgID"] = tenant

    def get(self, path: str, **parameters: str | int) -> bytes:
        """The body of a 2xx answer. Raises LokiError."""
        url = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(parameters)}" if parameters else "")
        try:
            request = urllib.request.Request(url, headers=self._headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            detail = error.read(2000).decode("utf-8", "replace").strip()
            said = f"{self.url} answered {error.code} {error.reason}: {detail}".rstrip(": ")
            raise LokiError(f"{said}{advice(said)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            why = "no answer in time" if isinstance(reason, (TimeoutError, socket.timeout)) else str(reason)
            raise LokiError(f"{self.url}: {why}{advice(why)}") from None

    def json(self, path: str, **parameters: str | int) -> Any:
        """The `data` of an answer. Raises LokiError."""
        try:
            return json.loads(self.get(path, **parameters))["data"]
        except (ValueError, KeyError, TypeError):
            raise LokiError(f"{self.url}{path} did not answer as Loki does; is this its address?") from None

    def runs(self, since_unix_nano: int | None = None) -> list[str]:
        """Names of the runs it holds. Raises LokiError."""
        now = time.time_ns()
        found = self.json(
            "/loki/api/v1/label/skyrl_run_id/values", start=since_unix_nano or now - _BACK_NS, end=now + _AHEAD_NS
        )
        return sorted(found or [])

    def choose_run(self, name: str) -> str:
        """The run of that name or beginning; for "" the one that wrote last.

        Raises:
            UnknownRun, LokiError: there is none, or nobody to ask.
        """
        runs = self.runs()
        if name or not runs:
            return choose_name(runs, name)
        now = time.time_ns()
        newest = self.entries('{skyrl_run_id=~".+"}', now - _BACK_NS, now + _AHEAD_NS, 1, newest_first=True)
        if not newest:
            raise UnknownRun("no run is recorded here")
        return str(newest[0].resource.fields["skyrl.run.id"])

    def entries(self, query: str, start: int, end: int, limit: int, *, newest_first: bool) -> list[Record]:
        """At most `limit` records in [start, end), by time. Raises LokiError."""
        found = self.json(
            "/loki/api/v1/query_range",
            query=query,
            start=start,
            end=end,
            limit=limit,
            direction="backward" if newest_first else "forward",
        )
        records = [
            record_of(
                stream["stream"],
                int(value[0]),
                value[1],
                (value[2] if len(value) > 2 else {}).get("structuredMetadata", {}),
            )
            for stream in found["result"]
            for value in stream["values"]
        ]
        records.sort(key=lambda record: record.time_unix_nano, reverse=newest_first)
        return records


class LokiSource:
    """A run in Loki as a `Source`."""

    def __init__(self, loki: Loki, run_id: str) -> None:
        self._loki = loki
        self._run_id = run_id
        self._began = 0
        self._newest = 0
        self._left_out = False
        self._seen: dict[tuple[int, str, str], None] = {}

    def read(self, wanted: Filter) -> Iterator[Record]:
        """Raises LokiError."""
        self._began = time.time_ns()
        start = wanted.since_unix_nano or self._began - _BACK_NS
        recent = max(start, self._began - _LATE_NS)
        self._seen, self._left_out = {}, wanted.limit is not None
        if wanted.limit is None:
            records = in_order(self._pages(wanted, start, newest_first=False))
        else:
            newest = in_order(self._pages(wanted, start, newest_first=True), newest_first=True)
            records = iter(list(itertools.islice(newest, wanted.limit))[::-1])
        for record in records:
            if record.time_unix_nano >= recent:
                self._seen[_key(record)] = None
            self._newest = max(self._newest, record.time_unix_nano)
            yield record

    def follow(self, wanted: Filter, is_over: Callable[[], bool]) -> Iterator[Record | None]:
        """Raises LokiError.

        What arrives in order is seen at the next look. What arrives late is seen at a look over all of `_LATE_NS`, which is
        taken as often as its length allows: always, but where thousands of lines come each second.
        """
        next_wide, newest = 0.0, self._newest
        while True:
            over, began = is_over(), time.monotonic()
            is_wide = over or began >= next_wide
            oldest = max(time.time_ns() - _LATE_NS, self._began - _LATE_NS, wanted.since_unix_nano or 0)
            horizon = oldest if is_wide else max(oldest, newest - _OVERLAP_NS)
            for record in in_order(self._pages(wanted, horizon, newest_first=False)):
                newest = max(newest, record.time_unix_nano)
                if _key(record) not in self._seen:
                    self._seen[_key(record)] = None
                    # What a limit left out is not new. (A line that came late in this very second passes for such.)
                    if not self._left_out or record.time_unix_nano > self._newest:
                        yield record
            self._left_out = False
            self._seen = {key: None for key in self._seen if key[0] >= oldest}
            if is_wide:
                next_wide = time.monotonic() + _WIDE_PAUSE * (time.monotonic() - began)
            yield None
            if over:
                return
            time.sleep(_POLL_S)

    def _pages(self, wanted: Filter, start: int, *, newest_first: bool) -> Iterator[Record]:
        """All records from `start` on, by time, once: what a resend brought twice Loki may show twice for a while."""
        moment, here = 0, set[tuple[int, str, str]]()
        for page in self._ask(logql.of(wanted, self._run_id), start, newest_first=newest_first):
            for record in page:
                if record.time_unix_nano != moment:
                    moment, here = record.time_unix_nano, set()
                key = _key(record)
                if key not in here and (wanted.grep is None or wanted.grep.search(record.body)):
                    yield record
                here.add(key)

    def _ask(self, query: str, low: int, *, newest_first: bool) -> Iterator[list[Record]]:
        """Pages of [low, now), each of whole nanoseconds.

        After the first, only as much time is asked for as two pages are likely to need: to answer, Loki looks through all
        that it holds in memory of the time that is asked for, however few entries are wanted.
        """
        high = time.time_ns() + _AHEAD_NS
        limit, span = PAGE, high - low
        while low < high:
            first, end = (max(low, high - span), high) if newest_first else (low, min(high, low + span))
            page = self._loki.entries(query, first, end, limit, newest_first=newest_first)
            if len(page) < limit:
                yield page
                low, high = (low, first) if newest_first else (end, high)
                limit, span = PAGE, span * _GROWTH
                continue
            last = page[-1].time_unix_nano
            whole = [record for record in page if record.time_unix_nano != last]
            yield whole
            limit = PAGE if whole else limit * 2  # a page of one nanosecond alone: a larger one
            span = max(2 * abs(last - page[0].time_unix_nano), 1)
            low, high = (low, last + 1) if newest_first else (last, high)


def _key(record: Record) -> tuple[int, str, str]:
    uid = f"{record.writer}/{record.file}/{record.generation}/{record.start}" if record.writer else str(record.body)
    return (record.time_unix_nano, record.resource.attributes, uid)
