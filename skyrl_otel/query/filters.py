"""What a reader asks for, parsed once from what they typed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from datetime import datetime

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class FilterError(ValueError):
    """A filter cannot be understood; the message names it and says what to write."""


@dataclass(frozen=True, slots=True)
class Filter:
    """All conditions must hold; None and "" mean any.

    Attributes:
        actor: the actor's name or class (glob), or the beginning of its id.
        role, node: globs; a node's Ray id may be given by its beginning.
        channel: "infra" or "progress". stream: "stdout" or "stderr".
        since_unix_nano: the earliest time.
        grep: a regular expression that is found in the body.
        limit: only the newest so many.
    """

    actor: str = ""
    role: str = ""
    rank: int | None = None
    node: str = ""
    channel: str = ""
    stream: str = ""
    since_unix_nano: int | None = None
    grep: re.Pattern[str] | None = field(default=None)
    limit: int | None = None

    @property
    def by_resource(self) -> bool:
        """Whether it asks who wrote."""
        return bool(self.actor or self.role or self.node or self.channel) or self.rank is not None


def parse_since(text: str, now_unix_nano: int | None = None) -> int:
    """ "10m", "2h", "1.5d" ago, or an ISO date and time (local unless it says otherwise), as nanoseconds since 1970.

    Raises:
        FilterError: it is neither.
    """
    now = time.time_ns() if now_unix_nano is None else now_unix_nano
    if ago := _AGO.fullmatch(text.strip().lower()):
        return now - int(float(ago[1]) * _UNIT_S[ago[2]] * 1_000_000_000)
    try:
        # Python 3.10 does not know the Z of UTC.
        return int(datetime.fromisoformat(text.strip().replace("Z", "+00:00")).timestamp() * 1_000_000) * 1000
    except (ValueError, OverflowError, OSError):
        raise FilterError(f"--since {text!r} is no time; write 30s, 10m, 2h, 1d, or 2026-11-22T14:30:00") from None


def parse_grep(text: str) -> re.Pattern[str]:
    """A regular expression.

    Raises:
        FilterError: saying what is wrong with it and where.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise FilterError(
            f"--grep {text!r} is no regular expression: {error}; put a backslash before characters meant literally"
        ) from None


def parse_choice(option: str, text: str, *allowed: str) -> str:
    """Raises FilterError unless `text` is empty or one of `allowed`."""
    if text and text not in allowed:
        raise FilterError(f"{option} {text!r} is none of {', '.join(allowed)}")
    return text
