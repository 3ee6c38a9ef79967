"""The agent's own records about a writer: bytes that were lost, who it is, how it ended. Each is a decision of its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from skyrl_otel.agent import otlp
from skyrl_otel.agent.identify import event_attributes
from skyrl_otel.spool.decisions import Decision

KINDS = ("loss", "end", "event")
"""Of the decisions that are records; `event` tells the identity. Their values have `time` and `identity`, a seq."""

SCOPE = otlp.scope("skyrl_otel.agent")

_INFO, _WARN, _ERROR = (9, "INFO"), (13, "WARN"), (17, "ERROR")
_STREAMS = {"out": "stdout", "err": "stderr"}


class OwnRecords:
    """Those that wait and those under way, oldest first. `encode` makes a decision a LogRecord."""

    __slots__ = ("_encode", "_under_way", "lost_bytes", "once", "waiting")

    def __init__(self, encode: Callable[[Decision], bytes]) -> None:
        self._encode = encode
        self.waiting: list[Decision] = []
        self._under_way: list[Decision] = []
        self.once: list[Decision] = []
        """Delivered or not, they stay in the journal, so that a later agent does not decide them again."""
        self.lost_bytes = 0

    def restore(self, decisions: Iterable[Decision], low_water: int) -> None:
        """Those of an earlier agent; what lies below `low_water` is delivered."""
        for decision in decisions:
            if decision.kind in KINDS:
                self.add(decision)
        self.waiting = [decision for decision in self.waiting if decision.seq >= low_water]

    def add(self, decision: Decision) -> None:
        self.waiting.append(decision)
        if decision.kind == "loss":
            self.lost_bytes += decision.value["bytes"]
        if decision.kind != "loss" or "of" in decision.value:
            self.once.append(decision)

    def has(self, kind: str) -> bool:
        """Whether an end, or the identity, was decided."""
        return any(decision.kind == kind for decision in self.once)

    def has_counted(self, identity_seq: int) -> bool:
        """Whether the records that identity line tells of as lost are counted."""
        return any(decision.value.get("of") == identity_seq for decision in self.once)

    @property
    def all_delivered(self) -> bool:
        return not self.waiting and not self._under_way

    def low_water(self, next_seq: int) -> int:
        """The lowest journal seq that may be sent again, where `next_seq` is the next decision's."""
        oldest = self._under_way or self.waiting
        return oldest[0].seq if oldest else next_seq

    def kept(self) -> list[Decision]:
        """What a rewritten journal must still hold."""
        return [*self._under_way, *self.waiting, *self.once]

    def take(self, budget: int) -> list[tuple[int, bytes]]:
        """(identity seq, record) of the oldest that wait, at least one, about `budget` bytes of them; they are under way now."""
        records: list[tuple[int, bytes]] = []
        size = 0
        for decision in self.waiting:
            records.append((decision.value["identity"], self._encode(decision)))
            size += len(records[-1][1])
            if size >= budget:
                break
        self._under_way += self.waiting[: len(records)]
        del self.waiting[: len(records)]
        return records

    def accept(self, count: int) -> None:
        """The oldest `count` under way are acknowledged."""
        del self._under_way[:count]

    def undo(self, count: int) -> None:
        """The newest `count` taken were not sent."""
        keep = len(self._under_way) - count
        self.waiting[:0] = self._under_way[keep:]
        del self._under_way[keep:]


def encode(decision: Decision, writer_id: str, facts: Mapping[str, Any]) -> bytes:
    """The LogRecord of a decision about a writer whose identity was `facts`."""
    uid = {"log.record.uid": f"{writer_id}/decisions/0/{decision.seq}-{decision.seq + 1}"}
    if decision.kind == "loss":
        return _loss(decision.file, decision.value, uid)
    if decision.kind == "event":
        return _identity(decision.value, facts, uid)
    return _end(decision.value, facts, uid)


def _loss(file: str, value: Mapping[str, Any], uid: Mapping[str, otlp.Value]) -> bytes:
    stream = _STREAMS.get(file)
    attributes: dict[str, otlp.Value] = {"log.iostream": stream} if stream else {}
    attributes |= {"skyrl.lost.bytes": value["bytes"], "skyrl.lost.reason": value["why"]}
    body = f"{value['bytes']} bytes of {stream or 'records'} were lost: {value['why']}"
    return otlp.event_record(value["time"], "skyrl.loss", _WARN, body, {**attributes, **uid})


def _identity(value: Mapping[str, Any], facts: Mapping[str, Any], uid: Mapping[str, otlp.Value]) -> bytes:
    body = f"{facts.get('role') or 'process'} {facts.get('pid', '')} is recorded"
    return otlp.event_record(value["time"], "skyrl.identity", _INFO, body, {**event_attributes(facts), **uid})


def _end(value: Mapping[str, Any], facts: Mapping[str, Any], uid: Mapping[str, otlp.Value]) -> bytes:
    """`value` is `ending.describe`'s."""
    attributes: dict[str, otlp.Value] = {"skyrl.exit.clean": value["clean"], "skyrl.last_line": value["last"]}
    if value["code"] is not None:
        attributes["process.exit.code"] = value["code"]
    if value["signal"] is not None:
        attributes["skyrl.exit.signal"] = value["signal"]
    if value["oom"]:
        attributes["skyrl.oom_kill"] = True
    body = f"process {facts.get('pid', '')} {value['how']}"
    severity = _INFO if value["fine"] else _WARN if value["by_ray"] else _ERROR
    return otlp.event_record(value["time"], "skyrl.process.end", severity, body, {**attributes, **uid})
