"""What the launcher itself says, on stderr."""

from __future__ import annotations

import os


def say(text: str) -> None:
    """One line with our name in front."""
    write(f"skyrl-otel: {text}\n")


def write(text: str) -> None:
    """Text as it is. A terminal that is gone is not an error."""
    view = memoryview(text.encode(errors="backslashreplace"))
    try:
        while view:
            view = view[os.write(2, view) :]
    except OSError:
        pass
