"""The agent's working child: one loop of looking, sending and housekeeping; one thread but for the sender and the reporter."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

from skyrl_otel.agent.delivery import Delivery
from skyrl_otel.agent.link import DONE, replace_parent
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.space import Space
from skyrl_otel.agent.status import Reporter, Status, Tally, place_of
from skyrl_otel.agent.watch import Watcher
from skyrl_otel.agent.writers import Writers
from skyrl_otel.config import Config
from skyrl_otel.spool import leftovers
from skyrl_otel.spool.layout import RunDir

PASS_S = 0.03
"""Shortest time between two looks at a busy writer; grows with the number of writers."""

_PASS_SHARE, _SLOWEST_PASS_S = 10, 0.5
"""A pass may take a tenth of the time, but there is one each half second."""

_HOUSEKEEPING_S = 1.0
_SWEEP_S = 20.0
_STATUS_S = 2.0
_LINGER_S = 5.0
_GIVE_UP_S = 600.0
_GRACE_S = 8.0
_MOST_NOTES = 5


def main(run: RunDir, lock: int, link: socket.socket, restarts: int) -> None:
    """Work until all is delivered and all writers are gone; then tell the parent that this was no crash."""
    agent = Agent(run, lock, link, restarts)
    signal.signal(signal.SIGTERM, agent.terminate)
    if not restarts:  # beside the work: after a year of runs there may be much to look at
        threading.Thread(target=leftovers.tidy, args=(run.path.parent, run.run_id), name="tidy", daemon=True).start()
    agent.work()


class Agent:
    """The loop, and what it drives. `link` leads to the parent, which holds the same `lock`."""

    def __init__(self, run: RunDir, lock: int, link: socket.socket, restarts: int) -> None:
        self._run = run
        self._lock = lock
        self._link = link
        self._restarts = restarts
        self._name = secrets.token_hex(8)
        self._place = place_of(lock)
        self._terminate_at: float | None = None
        self._was_drained = True
        self._next_pass = self._next_keeping = self._next_status = self._next_sweep = 0.0
        self._selector = selectors.DefaultSelector()  # the data of an event is called, if there is any
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watcher = Watcher()
        self._sees_folders = self._watcher.watch_folder(run.path)
        self._wake_by(self._wake_r, self._wake_up)
        self._wake_by(link, self._parent_died)
        if self._watcher.available:
            self._wake_by(self._watcher.fd, self._take_news)
        self._tally = Tally()
        self._reporter = Reporter()
        redactor = self._redactor = Redactor()
        self._writers = Writers(run, redactor, self._watcher, self._selector, self._tally)
        self._space = Space(run, Config.from_env().spool_max_bytes, self._tally)
        self._delivery = Delivery(run, self._writers, self._space, redactor, self._selector, self._tally)

    def terminate(self, *_: object) -> None:
        """SIGTERM: deliver within the grace period, keep the rest."""
        self._terminate_at = self._terminate_at or time.monotonic() + _GRACE_S
        os.write(self._wake_w, b"t")

    # -- the loop ------------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Returns when nothing is left to do."""
        while True:
            now = time.monotonic()
            if now >= self._next_keeping:
                self._next_keeping = now + _HOUSEKEEPING_S
                self._keep_house()
                if not self._run.path.exists():  # somebody removed the run: there is nothing to deliver
                    self._link.send(DONE)
                    return
                if self._is_done():
                    self._finish()
                    return
            if now >= self._next_sweep:
                self._next_sweep = now + _SWEEP_S
                self._writers.sweep()
                leftovers.drop_unborn(self._run)
            if now >= self._next_pass and self._writers.has_active:
                self._pass()
            self._delivery.step()
            if now >= self._next_status or (not self._was_drained and self._is_drained()):
                self._next_status = now + _STATUS_S
                self._report(self._is_drained())
            self._sleep(max(0.0, self._next_at() - time.monotonic()))

    def _keep_house(self) -> None:
        if not self._sees_folders:
            self._writers.find()
        self._delivery.load_shipping()
        self._writers.look_round(_HOUSEKEEPING_S / _SWEEP_S)
        self._space.bound(self._writers.active)
        self._space.keep(self._writers.all)

    def _pass(self) -> None:
        began, spent = time.monotonic(), time.thread_time()
        self._writers.look()
        spent = time.thread_time() - spent
        self._next_pass = began + min(max(PASS_S, _PASS_SHARE * spent), _SLOWEST_PASS_S)

    def _next_at(self) -> float:
        """When there is something to do, if nothing wakes us before."""
        wakes = [self._next_keeping, self._next_status]
        if self._writers.has_active:
            wakes.append(self._next_pass)
        due_at = self._delivery.due_at
        return min(wakes) if due_at is None else min(*wakes, due_at)

    # -- what wakes it -------------------------------------------------------------------------------------------------

    def _wake_by(self, descriptor: int | socket.socket, call: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, call)

    def _sleep(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                key.data()

    def _wake_up(self) -> None:
        os.read(self._wake_r, 64)

    def _take_news(self) -> None:
        news = set(self._watcher.events())
        self._writers.take_news(news)
        if None in news or os.fsencode(self._run.token.name) in news:
            self._delivery.load_shipping()

    def _parent_died(self) -> None:
        self._selector.unregister(self._link)
        self._link.close()
        self._link = replace_parent(self._run, self._lock, os.getpid())
        self._wake_by(self._link, self._parent_died)
        self._restarts += 1

    # -- status and end ------------------------------------------------------------------------------------------------

    def _is_drained(self) -> bool:
        return self._delivery.is_idle and self._writers.is_drained

    def _report(self, drained: bool) -> None:
        if drained:  # the truth of this moment, not of the last look: somebody waits for this word and then goes
            self._sleep(0.0)
            self._writers.look()
            drained = self._is_drained()
        self._was_drained = drained
        status = self._status(drained)
        with contextlib.suppress(OSError):
            status.write(self._run)
        shipping = self._delivery.shipping
        if shipping is not None and shipping.control is not None:
            self._reporter.report(shipping.control, status)

    def _status(self, drained: bool) -> Status:
        writers, tally = self._writers, self._tally
        return Status(
            run=self._run.run_id,
            node=os.uname().nodename,
            place=self._place,
            agent=self._name,
            pid=os.getpid(),
            supervisor_pid=os.getppid(),
            time_unix_nano=time.time_ns(),
            backlog_bytes=writers.backlog_bytes,
            drained=drained,
            writers=len(writers.all),
            writers_alive=sum(not writer.ended for writer in writers.all.values()),
            sent_records=tally.sent_records,
            sent_bytes=tally.sent_bytes,
            lost_bytes=tally.lost_bytes + writers.lost_bytes,
            rejected_records=tally.rejected_records,
            retries=tally.retries,
            restarts=self._restarts,
            redacted=dict(self._redactor.hits),
            error=tally.error,
            notes=writers.notes[:_MOST_NOTES],
        )

    def _is_done(self) -> bool:
        drained = self._is_drained()
        if self._terminate_at is not None and (drained or time.monotonic() >= self._terminate_at):
            return True
        idle_s = self._writers.idle_s()
        return idle_s >= _GIVE_UP_S or (idle_s >= _LINGER_S and drained and not self._writers.left)

    def _finish(self) -> None:
        drained = self._is_drained()
        self._report(drained)
        self._reporter.close()
        if drained:
            self._writers.remove_delivered()
        with contextlib.suppress(OSError):
            leftovers.settle(self._run)
        self._link.send(DONE)
