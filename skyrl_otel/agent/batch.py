"""A request: records of several writers, and what moves when the receiver accepts it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from skyrl_otel.agent import otlp, ownrecords
from skyrl_otel.agent.tail import Move
from skyrl_otel.agent.writer import Writer

BATCH_BYTES = 1 << 20
_FILE_BYTES = 512 << 10
_LOW_WATER_KEYS = 64
"""Keys of the low-water header in one request: 64 of at most 62 bytes stay below 4 KB."""
_WRITER_KEYS = 4


@dataclass(slots=True)
class Batch:
    """`body` is the ExportLogsServiceRequest. `own` counts the agent's own records about each writer in it.

    `failed` names the writers that could not be read, or whose journal could not be written; nothing of theirs is in it.
    """

    body: bytes = b""
    records: int = 0
    moves: list[Move] = field(default_factory=list)
    own: list[tuple[Writer, int]] = field(default_factory=list)
    low_water: list[str] = field(default_factory=list)
    failed: list[tuple[Writer, OSError]] = field(default_factory=list)

    @property
    def writer_ids(self) -> set[str]:
        return {move.file.writer_id for move in self.moves} | {writer.writer_id for writer, _ in self.own}

    def __bool__(self) -> bool:
        return bool(self.moves or self.own)

    def accept(self) -> None:
        """The receiver has it; of all that is under way it is the oldest. The caller writes the writers' checkpoints."""
        for move in self.moves:
            move.file.accept(move.to)
        for writer, count in self.own:
            writer.own.accept(count)

    def undo(self) -> None:
        """It will not be sent; of all that is under way it is the newest. Its writers have work again."""
        for move in self.moves:
            move.file.undo(move)
        for writer, count in self.own:
            writer.own.undo(count)


def build(writers: Iterable[Writer], budget: int = BATCH_BYTES) -> Batch:
    """Take records from the writers in turn until `budget` bytes are reached; journals are flushed before it returns.

    Never raises OSError: a writer that fails is left out and named.
    """
    parts: list[Batch] = []
    batch = Batch()
    size = 0
    for writer in writers:
        if size >= budget or sum(len(part.low_water) for part in parts) + _WRITER_KEYS > _LOW_WATER_KEYS:
            break
        part = Batch()
        try:
            _fill(part, writer, budget - size)
        except OSError as error:
            part.undo()
            batch.failed.append((writer, error))
            continue
        size += len(part.body)
        parts.append(part)
    for part in parts:
        batch.moves += part.moves
        batch.own += part.own
        batch.low_water += part.low_water
        batch.records += part.records
    batch.body = b"".join(part.body for part in parts)
    return batch


def _fill(part: Batch, writer: Writer, budget: int) -> None:
    """What one writer has, about `budget` bytes of it and at least a record if there is one. Raises OSError."""
    scopes: dict[int, list[bytes]] = {}
    size = 0
    if writer.own.waiting:
        part.low_water.append(f"{writer.writer_id}/decisions/0={writer.low_water}")
        own = writer.own.take(budget)
        part.own.append((writer, len(own)))
        part.records += len(own)
        by_identity: dict[int, list[bytes]] = {}
        for seq, record in own:
            by_identity.setdefault(seq, []).append(record)
            size += len(record)
        for seq, records in by_identity.items():
            scopes.setdefault(seq, []).append(otlp.scope_logs(ownrecords.SCOPE, records))
    for file in writer.files.values():
        if size >= budget:
            break
        move, sections = file.take(min(_FILE_BYTES, budget - size))
        if move is None:
            continue
        part.moves.append(move)
        acked = file.acked.offset if file.acked.generation == move.to.generation else move.before.offset
        part.low_water.append(f"{writer.writer_id}/{file.name}/{move.to.generation}={acked}")
        for section in sections:
            scopes.setdefault(section.identity_seq, []).append(otlp.scope_logs(section.scope, section.records))
            size += section.size
            part.records += section.count
    writer.flush()
    part.body = b"".join(otlp.resource_logs(writer.resource(seq), encoded) for seq, encoded in scopes.items())
