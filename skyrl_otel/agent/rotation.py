"""A file that rotates by rename: where the one that is read lies by now, and which one comes after it.

Its process renames `path` to `path.1`, that to `path.2`, …, and begins a new `path`; the inode tells one from another.
"""

from __future__ import annotations

import os
from pathlib import Path

Inode = tuple[int, int]
"""(device, inode)."""


def inode_of(found: os.stat_result) -> Inode:
    return found.st_dev, found.st_ino


def find(path: Path, inode: Inode) -> Path:
    """The name that the file `inode` has by now; `path` where it has none."""
    for candidate in (path, *_rotated(path)):
        try:
            found = os.stat(candidate, follow_symlinks=False)
        except OSError:
            continue
        if inode_of(found) == inode:
            return candidate
    return path


def has_moved(path: Path, inode: Inode) -> bool:
    """Whether another file lies at `path` by now."""
    found = _stat(path)
    return found is not None and inode_of(found) != inode


def successor(path: Path, mine: os.stat_result) -> os.stat_result | None:
    """What comes after `mine`: the oldest of the file at `path` and the rotated ones that are no older; None if none is there."""
    rotated = [found for name in _rotated(path) if (found := _stat(name)) and found.st_mtime_ns >= mine.st_mtime_ns]
    others = [found for found in (_stat(path), *rotated) if found and inode_of(found) != inode_of(mine)]
    return min(others, key=lambda found: found.st_mtime_ns, default=None)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _rotated(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.parent.iterdir() if entry.name.startswith(path.name + ".")]
    except OSError:
        return []
