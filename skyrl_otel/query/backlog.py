"""What the spool still holds that no receiver has acknowledged, read from the folders alone: it needs no agent."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_otel.spool import frames, identity, locks
from skyrl_otel.spool.checkpoint import Checkpoint, Position
from skyrl_otel.spool.layout import RunDir, read_file


@dataclass(frozen=True, slots=True)
class Backlog:
    """One run on this node. `alive` counts writers whose process, or a child of it, still runs."""

    size_bytes: int
    writers: int
    alive: int
    holding: int


def measure(run: RunDir) -> Backlog:
    """Look at each writer's folder. One that vanishes meanwhile holds nothing."""
    writers = alive = holding = total = 0
    for _, folder in run.writers():
        try:
            names = os.listdir(folder)
            size = _unacknowledged(folder, names)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        writers += 1
        total += size
        holding += size > 0
        alive += any(locks.is_held(folder / n) for n in names if n in ("out", "err") or n.startswith("records."))
    return Backlog(total, writers, alive, holding)


def _unacknowledged(folder: Path, names: list[str]) -> int:
    checkpoint = Checkpoint.read(folder / "checkpoint")
    nothing = Position(0, 0)
    total = 0
    for name in ("out", "err"):
        if name in names:
            total += _beyond(folder / name, checkpoint.files.get(name, nothing).offset)
    for name, followed in _followed(folder).items():
        first = Position(0, int(followed["offset"]))
        total += _beyond(Path(followed["path"]), checkpoint.files.get(name, first).offset)
    # For records the checkpoint's first number is the segment.
    done = checkpoint.files.get("records", nothing)
    for name in names:
        number = name.removeprefix("records.")
        if name.startswith("records.") and number.isdigit() and int(number) >= done.generation:
            total += _beyond(folder / name, done.offset if int(number) == done.generation else 0)
    return total


def oldest_unix_nano(run: RunDir) -> int | None:
    """The time of the oldest line that an agent has seen and that is not acknowledged; None where there is none.

    What no agent has seen yet gets its time when one does.
    """
    moments = []
    for _, folder in run.writers():
        try:
            checkpoint = Checkpoint.read(folder / "checkpoint")
            found = [
                item.payload
                for item in frames.scan(read_file(folder / "decisions", 1 << 30))
                if isinstance(item, frames.Frame)
            ]
        except (OSError, ValueError, TypeError, KeyError):
            continue
        for payload in found:
            _, file, generation, offset, kind, value, *_ = json.loads(payload)
            done = checkpoint.files.get(file, Position(0, 0))
            if kind == "mark" and file and (generation, offset) > (done.generation, done.offset):
                moments.append(int(value))
                break  # a file's marks only grow
    return min(moments, default=None)


def _beyond(path: Path, offset: int) -> int:
    try:
        return max(os.stat(path).st_size - offset, 0)
    except FileNotFoundError:
        return 0


def _followed(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = identity.parse(read_file(folder / "identity"))
    except FileNotFoundError:
        return {}
    follow = identity.in_force(lines, lines[-1].seq).get("follow") if lines else None
    return follow if isinstance(follow, dict) else {}
