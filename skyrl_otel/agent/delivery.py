"""Requests to the receiver: one under way, one prepared behind it, and what the answer moves.

While a request is under way the next one is prepared, so that reading and the receiver's work overlap; nothing more is read
ahead. Where it goes stands in the run's `token` file, which may change at any time.
"""

from __future__ import annotations

import os
import re
import time
from selectors import EVENT_READ, BaseSelector

from skyrl_otel.agent.batch import BATCH_BYTES, Batch, build
from skyrl_otel.agent.connect import connect
from skyrl_otel.agent.log import say
from skyrl_otel.agent.redact import Redactor, from_settings
from skyrl_otel.agent.ship import Answer, Sender
from skyrl_otel.agent.space import Space
from skyrl_otel.agent.status import Tally
from skyrl_otel.agent.writers import Writers
from skyrl_otel.spool import token
from skyrl_otel.spool.layout import RunDir
from skyrl_otel.spool.token import Shipping

_SMALLEST_BATCH = 256


class Delivery:
    """`shipping` is where to and with which secret, None until it is known. `redactor` gets the rules that come with it."""

    def __init__(
        self, run: RunDir, writers: Writers, space: Space, redactor: Redactor, selector: BaseSelector, tally: Tally
    ) -> None:
        self._run = run
        self._writers = writers
        self._space = space
        self._redactor = redactor
        self._selector = selector  # woken by an answer; `step` takes it
        self._tally = tally
        self.shipping: Shipping | None = None
        self._shipping_stamp: tuple[int, int] | None = None
        self._shipping_waits = False
        self._sender: Sender | None = None
        self._under_way: Batch | None = None
        self._prepared: Batch | None = None
        self._not_before = 0.0
        self._budget = BATCH_BYTES

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return self._under_way is None

    @property
    def due_at(self) -> float | None:
        """When the request that is prepared may go, by the monotonic clock; None where nothing waits for the clock."""
        return self._not_before if self._under_way is None and self._prepared is not None else None

    def step(self) -> None:
        """Take the answer that is there, send what may go. Never blocks."""
        answer = self._sender.take_answer() if self._sender else None
        if answer is not None and self._under_way is not None:
            batch, self._under_way = self._under_way, None
            self._take_answer(batch, answer)
        self._send()

    # -- where to ------------------------------------------------------------------------------------------------------

    def load_shipping(self) -> None:
        """Read the `token` file if it changed, but not while a request is under way: sent twice, a receiver that is no store
        of ours has it twice."""
        try:
            found = os.stat(self._run.token)
        except OSError:
            return
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp == self._shipping_stamp:
            return
        self._shipping_waits = self._under_way is not None
        shipping = None if self._shipping_waits else token.read(self._run)
        if shipping is None:
            return
        self._shipping_stamp = stamp
        self._not_before = 0.0
        if shipping != self.shipping:
            self._ship_to(shipping)

    def _ship_to(self, shipping: Shipping) -> None:
        self.shipping = shipping
        try:
            self._redactor.rules = from_settings(shipping.redact).rules
        except (ValueError, TypeError, re.error) as error:
            say(f"redaction rules of the settings are not used: {error}")
        if self._sender is not None:
            self._selector.unregister(self._sender.wake_fd)
            self._sender.close()
        self._sender = Sender(shipping, connect)
        self._selector.register(self._sender.wake_fd, EVENT_READ)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        if self._shipping_waits and self._under_way is None:
            self.load_shipping()
        if self._sender is None:
            return
        if self._prepared is None and self._writers.have_work:
            self._prepared = self._build()
        if self._under_way is None and self._prepared and not self._prepared.records:
            batch, self._prepared = self._prepared, None
            self._advance(batch)  # past what was given up: there is nothing to say to the receiver
        if self._under_way is None and self._prepared and time.monotonic() >= self._not_before:
            self._under_way, self._prepared = self._prepared, None
            self._sender.submit(self._under_way.body, ",".join(self._under_way.low_water))

    def _build(self) -> Batch | None:
        batch = build(self._writers.turns(), self._budget)
        for writer, error in batch.failed:
            self._writers.trouble(writer, error)
        self._writers.had_turn(batch.writer_ids)
        return batch or None

    # -- answers -------------------------------------------------------------------------------------------------------

    def _take_answer(self, batch: Batch, answer: Answer) -> None:
        if answer.verdict == "accepted":
            self._accept(batch, answer)
        elif answer.verdict == "too_large" and self._shrink(batch):
            self._undo_prepared()
            self._undo(batch)
        elif answer.verdict in ("refused", "too_large"):
            self._refuse(batch, answer)
        else:
            self._hold_back(batch, answer)

    def _accept(self, batch: Batch, answer: Answer) -> None:
        self._tally.error = answer.reason or None
        self._tally.sent_records += batch.records - answer.rejected
        self._tally.sent_bytes += len(batch.body)
        self._tally.rejected_records += answer.rejected
        self._budget = min(BATCH_BYTES, self._budget + max(self._budget // 16, 4096))
        self._advance(batch)

    def _refuse(self, batch: Batch, answer: Answer) -> None:
        """The receiver will never take this: say so, count it, go on."""
        say(f"given up {batch.records} records: {answer.reason}")
        self._tally.error = answer.reason
        for move in batch.moves:
            move.file.refuse(move, f"refused by the receiver: {answer.reason}")
        self._tally.rejected_records += batch.records
        self._advance(batch)

    def _hold_back(self, batch: Batch, answer: Answer) -> None:
        """The same bytes again, later. What was prepared behind them is read again then."""
        self._tally.retries += 1
        if answer.reason != self._tally.error:
            say(answer.reason)
        self._tally.error = answer.reason
        self._not_before = time.monotonic() + answer.wait_s
        self._undo_prepared()
        self._prepared = batch

    def _shrink(self, batch: Batch) -> bool:
        """Send less at a time; False where that is not possible."""
        if self._budget <= _SMALLEST_BATCH or batch.records <= 1:
            return False
        self._budget = max(_SMALLEST_BATCH, min(self._budget, len(batch.body)) // 2)
        return True

    def _undo_prepared(self) -> None:
        if self._prepared is not None:
            self._undo(self._prepared)
            self._prepared = None

    def _undo(self, batch: Batch) -> None:
        batch.undo()
        for writer_id in batch.writer_ids:  # one that only had a record of our own may be at rest by now
            self._writers.activate(writer_id)

    def _advance(self, batch: Batch) -> None:
        batch.accept()
        for writer_id in batch.writer_ids:
            writer = self._writers.all.get(writer_id)
            if writer is not None:
                self._space.checkpoint(writer)
