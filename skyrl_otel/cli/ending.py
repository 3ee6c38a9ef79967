"""How commands end early: one line where something cannot be done, in silence where the reader has had enough."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def fail(message: object, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    typer.echo(f"skyrl-otel: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def quiet_end() -> Iterator[None]:
    """A reader that goes away (`| head`) and Ctrl-C end the command with the codes a shell gives for the signals."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered cannot go anywhere; Python would complain of that when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
