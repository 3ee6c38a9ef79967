"""The one place through which our code runs inside somebody else's process: it swallows and counts, never raises.

Under SKYRL_OTEL_RAISE=1 it raises, so that the tests see what a user would not.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from skyrl_otel.config import Config

P = ParamSpec("P")
R = TypeVar("R")

#: How often something of ours failed or was lost, by place; read by `doctor` and the tests.
counts: Counter[str] = Counter()

_said: set[str] = set()


@contextmanager
def guarded(place: str) -> Iterator[None]:
    """Run a block of ours: an `Exception` is counted under `place` and goes no further."""
    try:
        yield
    except Exception as error:
        failed(place, error)


def never_raises(function: Callable[P, R]) -> Callable[P, R | None]:
    """`guarded` for a whole function, which returns None where it failed."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            failed(f"{function.__module__}.{function.__qualname__}", error)
            return None

    return wrapper


def failed(place: str, error: Exception) -> None:
    """Count an error that was caught at `place`. Raises it under SKYRL_OTEL_RAISE=1."""
    counts[place] += 1
    counts[f"{place}: {type(error).__name__}: {error}"[:200]] += 1
    if Config.from_env().raise_errors:
        raise error


def say(message: str, descriptor: int = 2) -> None:
    """Tell the user one thing once, as one line, past every buffer."""
    if message in _said:
        return
    _said.add(message)
    try:
        os.write(descriptor, f"skyrl-otel: {message}\n".encode(errors="backslashreplace"))
    except OSError:
        counts["say"] += 1
