"""A writer's folder for files that somebody else writes and the agent reads in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from skyrl_otel.capture import fds
from skyrl_otel.capture.fds import Place
from skyrl_otel.spool.layout import RunDir
from skyrl_otel.spool.writer import WriterFolder


class FollowedFolder(WriterFolder):
    """`WriterFolder` without `out` and `err`. Its identity lines carry the sizes of the files that are followed."""

    __slots__ = ("_places",)

    _places: dict[str, Place]

    @classmethod
    def follow(
        cls,
        run: RunDir,
        places: Mapping[str, tuple[Place, int]],
        facts: Mapping[str, Any],
        *,
        skip_markers: bool,
    ) -> FollowedFolder:
        """Make the folder.

        Args:
            places: "out" and "err" → the file and the byte offset to read it from.
            facts: identity keys besides `follow`.
            skip_markers: Ray's own lines in it are not to be recorded.

        Raises:
            OSError: as the file system says.
        """
        follow = {
            name: {
                "path": found.path,
                "dev": found.dev,
                "ino": found.ino,
                "offset": offset,
                "skip_markers": skip_markers,
                "echoes": True,
            }
            for name, (found, offset) in places.items()
        }
        folder = cls.create(run, files=(), facts={**facts, "follow": follow})
        assert isinstance(folder, FollowedFolder)
        folder._places = {name: found for name, (found, _) in places.items()}
        return folder

    def descriptors(self) -> list[int]:
        """Those of 1 and 2 that write to a file followed here."""
        followed = {(found.dev, found.ino) for found in self._places.values()}
        return [number for number in (fds.STDOUT, fds.STDERR) if fds.file_of(number) in followed]

    def _sizes(self) -> dict[str, tuple[int, int]]:
        sizes = {}
        for name, found in getattr(self, "_places", {}).items():
            try:
                now = os.stat(found.path)
            except OSError:
                continue
            # After a rotation only the agent knows the generation; then the line holds from where it reads.
            if (now.st_dev, now.st_ino) == (found.dev, found.ino):
                sizes[name] = (0, now.st_size)
        return sizes
