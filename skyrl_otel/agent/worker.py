"""The working child: looks, decides, sends, moves checkpoints; one thread but for the sender and the reporter.

A *pass* looks at every active writer. Writers that were quiet for a tenth of a second are left to inotify; they have
nothing that is not delivered. While a request is under
way the next one is prepared, so that reading and the receiver's work overlap; nothing more is read ahead.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

from skyrl_otel.agent import supervise
from skyrl_otel.agent.ballast import Ballast
from skyrl_otel.agent.batch import BATCH_BYTES, Batch, build
from skyrl_otel.agent.connect import connect
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.redact import Redactor, from_settings
from skyrl_otel.agent.ship import Answer, Sender
from skyrl_otel.agent.status import Reporter, Status
from skyrl_otel.agent.watch import Watcher
from skyrl_otel.agent.writer import Writer
from skyrl_otel.config import Config
from skyrl_otel.spool import leftovers, locks, token
from skyrl_otel.spool.layout import RunDir
from skyrl_otel.spool.token import Shipping

PASS_S = 0.03
"""Shortest time between two looks at a busy writer; grows with the number of writers."""

_PASS_SHARE, _SLOWEST_PASS_S = 10, 0.5
"""A pass may take a tenth of the time, but there is one each half second."""

_QUIET_S = 0.1
_HOUSEKEEPING_S = 1.0
_SWEEP_S = 20.0
_STATUS_S = 2.0
_LINGER_S = 5.0
_GIVE_UP_S = 600.0
_GRACE_S = 8.0
_RUBBISH_S = 60.0
_SMALLEST_BATCH = 256
_RESERVED_BYTES = 256 << 20


def main(run: RunDir, lock: int, link: socket.socket, restarts: int) -> None:
    """Work until all is delivered and all writers are gone; then tell the parent that this was no crash."""
    agent = Agent(run, lock, link, restarts)
    signal.signal(signal.SIGTERM, agent.terminate)
    if not restarts:  # beside the work: after a year of runs there may be much to look at
        threading.Thread(target=leftovers.tidy, args=(run.path.parent, run.run_id), name="tidy", daemon=True).start()
    agent.work()


class Agent:
    """The state of one node's agent. See the module for how it moves."""

    def __init__(self, run: RunDir, lock: int, link: socket.socket, restarts: int) -> None:
        self._run = run
        self._lock = lock
        self._link = link
        self._restarts = restarts
        self._name = secrets.token_hex(8)
        self._node = os.uname().nodename
        self._place = _place(lock)
        self._writers: OrderedDict[str, Writer] = OrderedDict()
        self._active: dict[str, float] = {}
        self._broken: dict[str, str] = {}  # folders that cannot be read at all
        self._troubles: dict[str, str] = {}  # what went wrong with a writer since the last sweep
        self._moments = Moments()
        self._redactor = Redactor()
        self._watcher = Watcher()
        self._epoll = select.epoll()
        self._epoll.register(link.fileno(), select.EPOLLIN)
        if self._watcher.available:
            self._epoll.register(self._watcher.fd, select.EPOLLIN)
        self._sees_writers = self._watcher.watch_folder(run.path)
        self._pidfds: dict[int, str] = {}
        self._watched: set[str] = set()  # whose pidfd is, or was, in _pidfds
        self._reporter = Reporter()
        self._shipping: Shipping | None = None
        self._shipping_stat: tuple[int, int] | None = None
        self._shipping_waits = False
        self._sender: Sender | None = None
        self._ballast = Ballast(run.path / "ballast")
        self._unwritten: set[str] = set()  # writers whose checkpoint on disk is behind
        self._inflight: Batch | None = None
        self._prepared: Batch | None = None
        self._not_before = 0.0
        self._with_work: dict[str, None] = {}  # who had work at the last look, in the order of their turns
        self._budget = BATCH_BYTES
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._wake_r, select.EPOLLIN)
        self._terminate_at: float | None = None
        self._last_writer_at = time.monotonic()
        self._was_drained = True
        self._sent_records = self._sent_bytes = self._rejected = self._retries = self._lost_gone = 0
        self._error: str | None = None
        self._spool_max = Config.from_env().spool_max_bytes

    def terminate(self, *_: object) -> None:
        """SIGTERM: deliver within the grace period, keep the rest."""
        self._terminate_at = self._terminate_at or time.monotonic() + _GRACE_S
        os.write(self._wake_w, b"t")

    # -- the loop ------------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Returns when nothing is left to do."""
        next_pass = next_keeping = next_status = next_sweep = 0.0
        while True:
            now = time.monotonic()
            if now >= next_keeping:
                next_keeping = now + _HOUSEKEEPING_S
                if not self._sees_writers:
                    self._find_writers()
                self._load_shipping()
                self._look_round()
                self._bound_space()
                self._ballast.keep()
                for writer_id in list(self._unwritten):
                    self._checkpoint(self._writers[writer_id])
                if not self._run.path.exists():
                    self._link.send(supervise.DONE)  # somebody removed the run: there is nothing to deliver
                    return
                if self._is_done():
                    self._finish()
                    return
            if now >= next_sweep:
                next_sweep = now + _SWEEP_S
                self._sweep()
            if now >= next_pass and self._active:
                began, spent = time.monotonic(), time.thread_time()
                self._pass()
                spent = time.thread_time() - spent
                next_pass = began + min(max(PASS_S, _PASS_SHARE * spent), _SLOWEST_PASS_S)
            self._answer()
            self._send()
            if now >= next_status or (not self._was_drained and self._is_drained()):
                next_status = now + _STATUS_S
                self._report(self._is_drained())
            wakes = [next_keeping, next_status]
            if self._active:
                wakes.append(next_pass)
            if self._inflight is None and self._prepared is not None:
                wakes.append(self._not_before)
            self._sleep(max(0.0, min(wakes) - time.monotonic()))

    def _sleep(self, timeout_s: float) -> None:
        try:
            ready = self._epoll.poll(timeout_s)
        except InterruptedError:
            return
        for descriptor, _ in ready:
            if descriptor == self._watcher.fd:
                self._woken()
            elif descriptor == self._link.fileno():
                self._parent_died()
            elif descriptor == self._wake_r:
                os.read(self._wake_r, 64)
            elif descriptor in self._pidfds:
                self._epoll.unregister(descriptor)
                self._activate(self._pidfds.pop(descriptor))

    def _woken(self) -> None:
        found: set[str | bytes | None] = set(self._watcher.events())
        for key in found:
            if isinstance(key, str):
                self._activate(key)
        if None in found:
            self._find_writers()
            self._load_shipping()
            for writer_id in self._writers:
                self._activate(writer_id)
        elif any(isinstance(key, bytes) and key.startswith(b"w-") for key in found):
            self._find_writers()
        if os.fsencode(self._run.token.name) in found:
            self._load_shipping()

    def _parent_died(self) -> None:
        self._epoll.unregister(self._link.fileno())
        self._link.close()
        self._link = supervise.replace_parent(self._run, self._lock, os.getpid())
        self._epoll.register(self._link.fileno(), select.EPOLLIN)
        self._restarts += 1

    # -- writers -------------------------------------------------------------------------------------------------------

    def _find_writers(self, *, broken_too: bool = False) -> None:
        try:
            found = list(self._run.writers())
        except OSError as error:  # out of descriptors, say
            self._error = f"cannot look into {self._run.path}: {error.strerror}"
            return
        if broken_too:
            there = {writer_id for writer_id, _ in found}
            self._broken = {writer_id: why for writer_id, why in self._broken.items() if writer_id in there}
        for writer_id, folder in found:
            if writer_id in self._writers or (writer_id in self._broken and not broken_too):
                continue
            try:
                writer = Writer(self._run.run_id, writer_id, folder, self._moments, self._redactor)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                if self._broken.get(writer_id) != f"{folder}: {error}":
                    _say(f"cannot read {folder}: {error!r}")
                self._broken[writer_id] = f"{folder}: {error}"
                continue
            self._broken.pop(writer_id, None)
            self._writers[writer_id] = writer
            self._activate(writer_id)
            self._last_writer_at = time.monotonic()

    def _activate(self, writer_id: str) -> None:
        if writer_id in self._writers:
            self._active[writer_id] = time.monotonic()

    def _pass(self) -> None:
        now = time.time_ns()
        for writer_id in list(self._active):
            writer = self._writers[writer_id]
            # Asked before the look: what the last holder wrote is seen by it.
            is_gone = writer.ended and not writer.is_alive()
            try:
                if writer.observe(now) or writer.backlog_bytes or writer.own.waiting:
                    self._active[writer_id] = time.monotonic()
                self._watch_pid(writer)
                writer.flush()
                writer.bound_journal()
                if writer.has_work:
                    self._with_work.setdefault(writer_id)
            except OSError as error:
                self._trouble(writer, error)
                continue
            if is_gone and writer.is_delivered and self._may_remove(writer):
                self._remove(writer)
            elif time.monotonic() - self._active[writer_id] > _QUIET_S:
                self._rest(writer)

    def _watch_pid(self, writer: Writer) -> None:
        if writer.pidfd is None or writer.writer_id in self._watched:
            return
        self._epoll.register(writer.pidfd, select.EPOLLIN)
        self._pidfds[writer.pidfd] = writer.writer_id
        self._watched.add(writer.writer_id)

    def _rest(self, writer: Writer) -> None:
        """Leave a quiet writer to inotify; without a watch it stays active."""
        if not all(self._watcher.arm(path, writer.writer_id) for path in writer.paths()):
            return
        del self._active[writer.writer_id]
        try:
            if writer.observe(time.time_ns()):  # written between the last look and the watch
                self._activate(writer.writer_id)
        except OSError as error:
            self._trouble(writer, error)

    def _look_round(self) -> None:
        """Look at some of those that are left to inotify, so that within `_SWEEP_S` each one had its turn: it may have ended
        without anybody telling."""
        for _ in range(math.ceil(len(self._writers) * _HOUSEKEEPING_S / _SWEEP_S)):
            writer_id, writer = next(iter(self._writers.items()))
            self._writers.move_to_end(writer_id)
            if writer_id in self._active:
                continue
            try:
                if writer.observe(time.time_ns()) or writer.ended:
                    self._activate(writer_id)
            except OSError as error:
                self._trouble(writer, error)

    def _sweep(self) -> None:
        """Once in a while: writers that nobody told of or could not be read, rubbish of those that never came to be."""
        self._troubles.clear()
        self._find_writers(broken_too=True)
        try:
            rubbish = list(self._run.path.glob("t-*"))
        except OSError:
            return
        for entry in rubbish:
            try:
                old = time.time() - entry.stat().st_mtime > _RUBBISH_S
                if old and not any(locks.is_held(path) for path in entry.iterdir()):
                    shutil.rmtree(entry, ignore_errors=True)
            except OSError:
                continue

    def _may_remove(self, writer: Writer) -> bool:
        if not writer.facts.get("until_agent"):
            return True
        return all(other.facts.get("until_agent") for other in self._writers.values())

    def _remove(self, writer: Writer) -> None:
        """All of it is delivered and nobody holds it: the folder goes, in one step, so that a kill leaves no half of it."""
        self._forget(writer)
        self._last_writer_at = time.monotonic()
        rubbish = self._run.path / f"t-{writer.writer_id}"
        try:
            os.rename(writer.folder, rubbish)
        except OSError as error:
            self._broken[writer.writer_id] = f"{writer.folder} is delivered but cannot be removed: {error.strerror}"
            return
        shutil.rmtree(rubbish, ignore_errors=True)

    def _trouble(self, writer: Writer, error: OSError) -> None:
        """Whatever it is (a full disk, a lost permission), it may pass: the writer stays. But its folder may be gone."""
        if not writer.folder.exists():
            _say(f"{writer.folder} was removed with {writer.backlog_bytes} bytes that are not delivered")
            self._lost_gone += writer.backlog_bytes
            self._forget(writer)
            return
        message = f"{writer.folder}: {error.strerror}"
        if self._troubles.get(writer.writer_id) != message:
            _say(message)
        self._troubles[writer.writer_id] = message
        self._activate(writer.writer_id)

    def _forget(self, writer: Writer) -> None:
        if writer.pidfd is not None and self._pidfds.pop(writer.pidfd, None) is not None:
            self._epoll.unregister(writer.pidfd)
        self._watched.discard(writer.writer_id)
        self._unwritten.discard(writer.writer_id)
        self._troubles.pop(writer.writer_id, None)
        self._lost_gone += writer.own.lost_bytes
        writer.close()
        self._writers.pop(writer.writer_id, None)
        self._active.pop(writer.writer_id, None)

    # -- sending -------------------------------------------------------------------------------------------------------

    def _load_shipping(self) -> None:
        try:
            found = os.stat(self._run.token)
        except OSError:
            return
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp == self._shipping_stat:
            return
        self._shipping_waits = self._inflight is not None
        if self._shipping_waits:
            return  # what is under way is answered first: sent twice, a receiver that is no store of ours has it twice
        shipping = token.read(self._run)
        if shipping is None:
            return
        self._shipping_stat = stamp
        if shipping == self._shipping:
            self._not_before = 0.0
            return
        self._shipping = shipping
        self._load_rules(shipping)
        if self._sender is not None:
            self._epoll.unregister(self._sender.wake_fd)
            self._sender.close()
        self._sender = Sender(shipping, connect)
        self._epoll.register(self._sender.wake_fd, select.EPOLLIN)
        self._not_before = 0.0

    def _load_rules(self, shipping: Shipping) -> None:
        try:
            self._redactor.rules = from_settings(shipping.redact).rules
        except (ValueError, TypeError, re.error) as error:
            _say(f"redaction rules of the settings are not used: {error}")

    def _send(self) -> None:
        if self._shipping_waits and self._inflight is None:
            self._load_shipping()
        if self._sender is None:
            return
        if self._prepared is None and self._with_work:
            self._prepared = self._build()
        if self._inflight is None and self._prepared and not self._prepared.records:
            batch, self._prepared = self._prepared, None
            self._advance(batch)  # past what was given up: there is nothing to say to the receiver
        if self._inflight is None and self._prepared and time.monotonic() >= self._not_before:
            self._inflight, self._prepared = self._prepared, None
            self._sender.submit(self._inflight.body, ",".join(self._inflight.low_water))

    def _build(self) -> Batch | None:
        batch = build(self._turns(), self._budget)
        for writer, error in batch.failed:
            self._trouble(writer, error)
        for writer_id in (
            batch.writer_ids & self._with_work.keys()
        ):  # the next request begins with those who had no turn
            del self._with_work[writer_id]
            self._with_work[writer_id] = None
        return batch or None

    def _turns(self) -> Iterator[Writer]:
        for writer_id in list(self._with_work):
            writer = self._writers.get(writer_id)
            if writer is not None and writer.has_work:
                yield writer
            else:
                del self._with_work[writer_id]

    def _answer(self) -> None:
        answer = self._sender.take_answer() if self._sender else None
        if answer is None or self._inflight is None:
            return
        batch = self._inflight
        if answer.verdict == "accepted":
            self._inflight = None
            self._error = answer.reason or None
            self._accept(batch, answer)
        elif answer.verdict == "too_large" and self._shrink(batch):
            self._inflight = None
            self._undo_prepared()
            self._undo(batch)
        elif answer.verdict in ("refused", "too_large"):
            self._inflight = None
            self._refuse(batch, answer)
        else:
            self._retries += 1
            if answer.reason != self._error:
                _say(answer.reason)
            self._error = answer.reason
            self._not_before = time.monotonic() + answer.wait_s
            self._hold_back(batch)

    def _hold_back(self, batch: Batch) -> None:
        """The same bytes again, later. What was prepared behind them is read again then."""
        self._inflight = None
        self._undo_prepared()
        self._prepared = batch

    def _undo_prepared(self) -> None:
        if self._prepared is not None:
            self._undo(self._prepared)
            self._prepared = None

    def _undo(self, batch: Batch) -> None:
        batch.undo()
        for writer_id in batch.writer_ids:  # one that only had an event may be at rest by now
            self._activate(writer_id)

    def _accept(self, batch: Batch, answer: Answer) -> None:
        self._sent_records += batch.records - answer.rejected
        self._sent_bytes += len(batch.body)
        self._rejected += answer.rejected
        self._budget = min(BATCH_BYTES, self._budget + max(self._budget // 16, 4096))
        self._advance(batch)

    def _advance(self, batch: Batch) -> None:
        batch.accept()
        for writer_id in batch.writer_ids:
            if writer_id not in self._writers:
                continue
            self._checkpoint(self._writers[writer_id])

    def _checkpoint(self, writer: Writer) -> None:
        try:
            self._ballast.with_room(writer.write_checkpoint)
            self._unwritten.discard(writer.writer_id)
        except OSError as error:
            self._unwritten.add(writer.writer_id)  # and with it the space behind it, which is what a full disk needs
            self._error = f"cannot write a checkpoint: {error.strerror}"

    def _shrink(self, batch: Batch) -> bool:
        if self._budget <= _SMALLEST_BATCH or batch.records <= 1:
            return False
        self._budget = max(_SMALLEST_BATCH, min(self._budget, len(batch.body)) // 2)
        return True

    def _refuse(self, batch: Batch, answer: Answer) -> None:
        """The receiver will never take this: say so, count it, go on."""
        _say(f"given up {batch.records} records: {answer.reason}")
        self._error = answer.reason
        for move in batch.moves:
            move.file.refuse(move, f"refused by the receiver: {answer.reason}")
        self._rejected += batch.records
        self._advance(batch)

    # -- bounds and ends -----------------------------------------------------------------------------------------------

    def _bound_space(self) -> None:
        """Past the cap, or with the disk nearly full, the oldest bytes that are not under way go."""
        active = [self._writers[writer_id] for writer_id in self._active]  # nobody else has a backlog
        backlog = sum(w.backlog_bytes for w in active if "follow" not in w.facts)
        if not backlog:
            return
        excess = backlog - self._spool_max
        try:
            disk = os.statvfs(self._run.path)
            reserve = min(_RESERVED_BYTES, disk.f_blocks * disk.f_frsize // 20)
            short = reserve - disk.f_bavail * disk.f_frsize
        except OSError:
            short = 0
        why = "the spool reached its cap (SKYRL_OTEL_SPOOL_MAX)" if excess > 0 else "the spool's disk is nearly full"
        excess = max(excess, short)
        for writer in sorted(active, key=lambda w: -w.backlog_bytes):
            if excess <= 0:
                return
            try:
                for file in writer.files.values():
                    if excess > 0:
                        excess -= file.give_up(min(excess + (1 << 20), file.unsent), why)
                self._ballast.with_room(writer.flush)
                for file in writer.files.values():
                    file.punch_losses()
            except OSError as error:
                self._error = f"cannot bound the spool: {error.strerror}"
                return

    def _is_drained(self) -> bool:
        if self._inflight is not None or self._with_work or self._broken:
            return False
        return all(self._writers[writer_id].is_drained for writer_id in self._active)  # who rests has nothing left

    def _report(self, drained: bool) -> None:
        if drained:  # the truth of this moment, not of the last look: somebody waits for this word and then goes
            self._sleep(0.0)
            self._pass()
            drained = self._is_drained()
        self._was_drained = drained
        status = Status(
            run=self._run.run_id,
            node=self._node,
            place=self._place,
            agent=self._name,
            pid=os.getpid(),
            supervisor_pid=os.getppid(),
            time_unix_nano=time.time_ns(),
            backlog_bytes=sum(self._writers[writer_id].backlog_bytes for writer_id in self._active),
            drained=drained,
            writers=len(self._writers),
            writers_alive=sum(not writer.ended for writer in self._writers.values()),
            sent_records=self._sent_records,
            sent_bytes=self._sent_bytes,
            lost_bytes=self._lost_gone + sum(writer.own.lost_bytes for writer in self._writers.values()),
            rejected_records=self._rejected,
            retries=self._retries,
            restarts=self._restarts,
            redacted=dict(self._redactor.hits),
            error=self._error,
            notes=(*self._broken.values(), *self._troubles.values())[:5],
        )
        try:
            status.write(self._run)
        except OSError:
            pass
        if self._shipping is not None and self._shipping.control is not None:
            self._reporter.report(self._shipping.control, status)

    def _is_done(self) -> bool:
        now = time.monotonic()
        drained = self._is_drained()
        if self._terminate_at is not None and (drained or now >= self._terminate_at):
            return True
        left = [writer for writer in self._writers.values() if not writer.facts.get("until_agent")]
        if any(not writer.ended or writer.is_alive() for writer in left):
            self._last_writer_at = now
            return False
        idle = now - self._last_writer_at
        return (drained and not left and idle >= _LINGER_S) or idle >= _GIVE_UP_S

    def _finish(self) -> None:
        drained = self._is_drained()
        self._report(drained)
        self._reporter.close()
        for writer in list(self._writers.values()):
            if drained and writer.facts.get("until_agent") and writer.is_delivered:
                self._remove(writer)
        with contextlib.suppress(OSError):
            leftovers.settle(self._run)
        self._link.send(supervise.DONE)


def _place(lock: int) -> str:
    """The random name that the first agent of this run on this node wrote into the lock's file."""
    try:
        if not os.fstat(lock).st_size:
            os.pwrite(lock, secrets.token_hex(8).encode(), 0)
        return os.pread(lock, 64, 0).decode(errors="replace")
    except OSError:
        return ""


def _say(line: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # on a full disk too
        print(f"{stamp} {line}", file=sys.stderr, flush=True)
