"""The text files of a run: one for each channel, and those that routes name, opened when their first line comes."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from skyrl_otel.collector.text import TextFile

ROUTE = "route:"
"""What the key of a routed file begins with; its path below the log folder follows. Channels have their names."""

_MOST_OPEN = 256


class Texts:
    """Files by key. All methods belong to the committer's thread."""

    def __init__(self, channels: Mapping[str, TextFile], log_dir: Path, known: Mapping[str, tuple[Path, int]]) -> None:
        """`known`: key → path and committed length, of an earlier life of this run's collector."""
        self._channels = dict(channels)
        self._log_dir = log_dir
        self._known = {key: value for key, value in known.items() if value[0] == self._path(key)}
        self._open: OrderedDict[str, TextFile] = OrderedDict()

    def knows(self, key: str) -> bool:
        """Whether a length of that file is committed."""
        return key in self._channels or key in self._known

    def get(self, key: str) -> TextFile:
        """Raises OSError."""
        if key in self._channels:
            return self._channels[key]
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = self._begin(key)
        self._open.move_to_end(key)
        return found

    def _begin(self, key: str) -> TextFile:
        path, folder = self._path(key), self._log_dir
        for part in path.relative_to(self._log_dir).parts[:-1]:
            folder = folder / part
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink():
                raise OSError(f"{folder} is a link; routed files go below the log folder alone")
        if key in self._known:
            return TextFile(path, self._known[key][1])
        try:
            size = os.stat(path, follow_symlinks=False).st_size  # another run's: it goes on behind
        except FileNotFoundError:
            size = 0
        return TextFile(path, size)

    def _path(self, key: str) -> Path:
        return self._log_dir / key.removeprefix(ROUTE)

    def settle(self) -> None:
        """The transaction is committed; few files stay open."""
        for key, file in self._open.items():
            file.settle()
            self._known[key] = (file.path, file.committed)
        while len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        for file in self._channels.values():
            file.settle()

    def values(self) -> Iterator[TextFile]:
        yield from self._channels.values()
        yield from self._open.values()
