"""What the agent says for people: lines of `agent.log`, which its stderr is."""

from __future__ import annotations

import contextlib
import sys
import time


def say(line: str) -> None:
    """Never raises: the disk may be full."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        print(f"{stamp} {line}", file=sys.stderr, flush=True)
