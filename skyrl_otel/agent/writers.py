"""The writers of a run on this node: found, looked at in turn, left to inotify while quiet, removed once delivered.

A *pass* looks at every active writer. One that was quiet for a tenth of a second is left to inotify; it has nothing that is
not delivered.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from selectors import EVENT_READ, BaseSelector

from skyrl_otel.agent.log import say
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.status import Tally
from skyrl_otel.agent.watch import Watcher
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool.layout import RunDir

_QUIET_S = 0.1


class Writers:
    """`selector` wakes the loop when the process of one ends; its events' data are called."""

    def __init__(self, run: RunDir, redactor: Redactor, watcher: Watcher, selector: BaseSelector, tally: Tally) -> None:
        self._run = run
        self._redactor = redactor
        self._watcher = watcher
        self._selector = selector
        self._tally = tally
        self._moments = Moments()
        self._all: OrderedDict[str, Writer] = OrderedDict()
        self._active: dict[str, float] = {}  # with the time of the last news
        self._with_work: dict[str, None] = {}  # who had work at the last look, in the order of their turns
        self._broken: dict[str, str] = {}  # folders that cannot be read at all
        self._troubles: dict[str, str] = {}  # what went wrong with a writer since the last sweep
        self._pidfds: dict[int, str] = {}
        self._watched: set[str] = set()  # whose pidfd is, or was, in _pidfds
        self._last_at = time.monotonic()  # when there was one

    # -- who there is --------------------------------------------------------------------------------------------------

    @property
    def all(self) -> Mapping[str, Writer]:
        return self._all

    @property
    def active(self) -> list[Writer]:
        """Nobody else has a backlog."""
        return [self._all[writer_id] for writer_id in self._active]

    @property
    def has_active(self) -> bool:
        return bool(self._active)

    @property
    def left(self) -> list[Writer]:
        """Those that the agent outlives."""
        return [writer for writer in self._all.values() if not writer.facts.get("until_agent")]

    def idle_s(self) -> float:
        """For how long nobody was there who may still write; 0 while somebody is."""
        if any(not writer.ended or writer.is_alive() for writer in self.left):
            self._last_at = time.monotonic()
        return time.monotonic() - self._last_at

    @property
    def is_drained(self) -> bool:
        """Nobody has work, nor anything that waits for an answer."""
        return not self._with_work and not self._broken and all(writer.is_drained for writer in self.active)

    @property
    def backlog_bytes(self) -> int:
        return sum(writer.backlog_bytes for writer in self.active)

    @property
    def lost_bytes(self) -> int:
        """Of those that are here; those that are gone are in the tally."""
        return sum(writer.own.lost_bytes for writer in self._all.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong with which folder, one line each."""
        return (*self._broken.values(), *self._troubles.values())

    # -- finding -------------------------------------------------------------------------------------------------------

    def find(self, *, broken_too: bool = False) -> None:
        """Look for new folders; with `broken_too` once more at those that could not be read."""
        try:
            found = list(self._run.writers())
        except OSError as error:  # out of descriptors, say
            self._tally.error = f"cannot look into {self._run.path}: {error.strerror}"
            return
        if broken_too:
            there = {writer_id for writer_id, _ in found}
            self._broken = {writer_id: why for writer_id, why in self._broken.items() if writer_id in there}
        for writer_id, folder in found:
            if writer_id not in self._all and (broken_too or writer_id not in self._broken):
                self._open(writer_id, folder)

    def _open(self, writer_id: str, folder: Path) -> None:
        try:
            writer = Writer(self._run.run_id, writer_id, folder, self._moments, self._redactor)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self._broken.get(writer_id) != f"{folder}: {error}":
                say(f"cannot read {folder}: {error!r}")
            self._broken[writer_id] = f"{folder}: {error}"
            return
        self._broken.pop(writer_id, None)
        self._all[writer_id] = writer
        self.activate(writer_id)
        self._last_at = time.monotonic()

    def sweep(self) -> None:
        """Once in a while: troubles that may have passed, folders that nobody told of or that could not be read."""
        self._troubles.clear()
        self.find(broken_too=True)

    # -- looking -------------------------------------------------------------------------------------------------------

    def take_news(self, news: Collection[str | bytes | None]) -> None:
        """What the watcher told: ids of writers with news, names of new folders, None where it lost count."""
        for key in news:
            if isinstance(key, str):
                self.activate(key)
        if None in news:
            self.find()
            for writer_id in self._all:
                self.activate(writer_id)
        elif any(isinstance(key, bytes) and key.startswith(b"w-") for key in news):
            self.find()

    def activate(self, writer_id: str) -> None:
        """Look at it on each pass, until it is quiet."""
        if writer_id in self._all:
            self._active[writer_id] = time.monotonic()

    def look(self) -> None:
        """One pass."""
        now = time.time_ns()
        for writer_id in list(self._active):
            writer = self._all[writer_id]
            # Asked before the look: what the last holder wrote is seen by it.
            is_gone = writer.ended and not writer.is_alive()
            try:
                self._look_at(writer, now)
            except OSError as error:
                self.trouble(writer, error)
                continue
            if is_gone and writer.is_delivered and self._may_remove(writer):
                self._remove(writer)
            elif time.monotonic() - self._active[writer_id] > _QUIET_S:
                self._rest(writer)

    def _look_at(self, writer: Writer, now: int) -> None:
        if writer.observe(now) or writer.backlog_bytes or writer.own.waiting:
            self._active[writer.writer_id] = time.monotonic()
        self._watch_process(writer)
        writer.flush()
        writer.bound_journal()
        if writer.has_work:
            self._with_work.setdefault(writer.writer_id)

    def _rest(self, writer: Writer) -> None:
        """Leave a quiet writer to inotify; without a watch it stays active."""
        if not all(self._watcher.arm(path, writer.writer_id) for path in writer.paths()):
            return
        del self._active[writer.writer_id]
        try:
            if writer.observe(time.time_ns()):  # written between the last look and the watch
                self.activate(writer.writer_id)
        except OSError as error:
            self.trouble(writer, error)

    def look_round(self, share: float) -> None:
        """Look at that share of those that are left to inotify, each in turn: one may have ended without anybody telling."""
        for _ in range(math.ceil(len(self._all) * share)):
            writer_id, writer = next(iter(self._all.items()))
            self._all.move_to_end(writer_id)
            if writer_id in self._active:
                continue
            try:
                if writer.observe(time.time_ns()) or writer.ended:
                    self.activate(writer_id)
            except OSError as error:
                self.trouble(writer, error)

    def _watch_process(self, writer: Writer) -> None:
        if writer.pidfd is None or writer.writer_id in self._watched:
            return
        self._selector.register(writer.pidfd, EVENT_READ, partial(self._process_ended, writer.pidfd))
        self._pidfds[writer.pidfd] = writer.writer_id
        self._watched.add(writer.writer_id)

    def _process_ended(self, pidfd: int) -> None:
        if pidfd in self._pidfds:
            self._selector.unregister(pidfd)
            self.activate(self._pidfds.pop(pidfd))

    # -- turns ---------------------------------------------------------------------------------------------------------

    @property
    def have_work(self) -> bool:
        """Whether somebody had work at the last look."""
        return bool(self._with_work)

    def turns(self) -> Iterator[Writer]:
        """Who has work, those first who had no turn for the longest."""
        for writer_id in list(self._with_work):
            writer = self._all.get(writer_id)
            if writer is not None and writer.has_work:
                yield writer
            else:
                del self._with_work[writer_id]

    def had_turn(self, writer_ids: set[str]) -> None:
        """The next request begins with the others."""
        for writer_id in writer_ids & self._with_work.keys():
            del self._with_work[writer_id]
            self._with_work[writer_id] = None

    # -- leaving -------------------------------------------------------------------------------------------------------

    def remove_delivered(self) -> None:
        """Remove the folders of files that outlive the agent and are delivered: it ends now."""
        for writer in list(self._all.values()):
            if writer.facts.get("until_agent") and writer.is_delivered:
                self._remove(writer)

    def _may_remove(self, writer: Writer) -> bool:
        return not writer.facts.get("until_agent") or not self.left

    def _remove(self, writer: Writer) -> None:
        """All of it is delivered and nobody holds it: the folder goes, in one step, so that a kill leaves no half of it."""
        self._forget(writer)
        self._last_at = time.monotonic()
        rubbish = self._run.path / f"t-{writer.writer_id}"
        try:
            os.rename(writer.folder, rubbish)
        except OSError as error:
            self._broken[writer.writer_id] = f"{writer.folder} is delivered but cannot be removed: {error.strerror}"
            return
        shutil.rmtree(rubbish, ignore_errors=True)

    def trouble(self, writer: Writer, error: OSError) -> None:
        """Whatever it is (a full disk, a lost permission), it may pass: the writer stays. But its folder may be gone."""
        if not writer.folder.exists():
            say(f"{writer.folder} was removed with {writer.backlog_bytes} bytes that are not delivered")
            self._tally.lost_bytes += writer.backlog_bytes
            self._forget(writer)
            return
        message = f"{writer.folder}: {error.strerror}"
        if self._troubles.get(writer.writer_id) != message:
            say(message)
        self._troubles[writer.writer_id] = message
        self.activate(writer.writer_id)

    def _forget(self, writer: Writer) -> None:
        if writer.pidfd is not None and self._pidfds.pop(writer.pidfd, None) is not None:
            self._selector.unregister(writer.pidfd)
        self._watched.discard(writer.writer_id)
        self._troubles.pop(writer.writer_id, None)
        self._tally.lost_bytes += writer.own.lost_bytes
        writer.close()
        self._all.pop(writer.writer_id, None)
        self._active.pop(writer.writer_id, None)
