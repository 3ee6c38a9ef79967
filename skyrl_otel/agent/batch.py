"""A request: records of several writers, and what moves when the receiver accepts it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from skyrl_otel.agent import otlp
from skyrl_otel.agent.textfile import TEXT_SCOPE, Move
from skyrl_otel.agent.writer import EVENT_SCOPE, Writer

BATCH_BYTES = 1 << 20
_FILE_BYTES = 256 << 10
_LOW_WATER_KEYS = 64
"""Keys of the low-water header in one request: 64 of at most 62 bytes stay below 4 KB."""


@dataclass(slots=True)
class Batch:
    """`body` is the ExportLogsServiceRequest. `events` counts the own records of each writer in it."""

    body: bytes = b""
    records: int = 0
    moves: list[Move] = field(default_factory=list)
    events: list[tuple[Writer, int]] = field(default_factory=list)
    low_water: str = ""

    @property
    def writer_ids(self) -> set[str]:
        return {move.file.writer_id for move in self.moves} | {writer.writer_id for writer, _ in self.events}

    def __bool__(self) -> bool:
        return bool(self.moves or self.events)


def build(writers: Iterable[Writer], budget: int = BATCH_BYTES) -> Batch:
    """Take records from the writers in turn until `budget` bytes are reached; journals are flushed before it returns.

    Raises:
        OSError: a journal could not be written; nothing of this batch may be sent, rewind the writers.
    """
    batch = Batch()
    parts: list[bytes] = []
    low_water: list[str] = []
    size = 0
    for writer in writers:
        if size >= budget or len(low_water) + 3 > _LOW_WATER_KEYS:
            break
        scopes: dict[int, list[bytes]] = {}
        if writer.events:
            low_water.append(f"{writer.writer_id}/decisions/0={writer.events_low_water}")
            by_identity: dict[int, list[bytes]] = {}
            events = writer.take_events()
            for seq, record in events:
                by_identity.setdefault(seq, []).append(record)
                size += len(record)
            for seq, records in by_identity.items():
                scopes.setdefault(seq, []).append(otlp.scope_logs(EVENT_SCOPE, records))
            batch.events.append((writer, len(events)))
            batch.records += len(events)
        for file in writer.files.values():
            move, sections = file.take(min(_FILE_BYTES, budget))
            if move is None:
                continue
            batch.moves.append(move)
            acked = file.acked.offset if file.acked.generation == move.to.generation else move.before.offset
            low_water.append(f"{writer.writer_id}/{file.name}/{move.to.generation}={acked}")
            for section in sections:
                scopes.setdefault(section.identity_seq, []).append(otlp.scope_logs(TEXT_SCOPE, section.records))
                size += section.size
                batch.records += len(section.records)
        writer.flush()
        parts += [otlp.resource_logs(writer.resource(seq), encoded) for seq, encoded in scopes.items()]
    batch.body = b"".join(parts)
    batch.low_water = ",".join(low_water)
    return batch
