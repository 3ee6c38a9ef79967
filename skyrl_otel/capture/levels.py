"""`SKYRL_OTEL_LEVELS=vllm=INFO,ray=WARNING`: the lowest level that is recorded, by logger and all below it."""

from __future__ import annotations

from collections.abc import Mapping


class Levels:
    """Asked once for each place in the source; the answer is kept by the caller."""

    __slots__ = ("_lowest",)

    def __init__(self, lowest: Mapping[str, int]) -> None:
        """`lowest` maps a logger's name to a level number; the empty name is for all others."""
        self._lowest = dict(lowest)

    def __bool__(self) -> bool:
        """Whether anything is left out."""
        return bool(self._lowest)

    def takes(self, logger: str, level: int) -> bool:
        """Whether a record of this logger and level is recorded: the longest name that holds decides."""
        lowest = self._lowest
        if not lowest:
            return True
        name = logger
        while name:
            if name in lowest:
                return level >= lowest[name]
            name = name.rpartition(".")[0]
        return level >= lowest.get("", 0)
