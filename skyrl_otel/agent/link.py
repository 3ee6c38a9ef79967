"""The tie between the agent's parent and its working child, a socket pair: each sees by it that the other died."""

from __future__ import annotations

import os
import signal
import socket

from skyrl_otel.agent import start
from skyrl_otel.spool.layout import RunDir

DONE = b"d"
"""Written by a child that ends because all is delivered: do not restart it."""


def replace_parent(run: RunDir, lock: int, child: int) -> socket.socket:
    """Called by a child whose parent died: start a new one that watches `child`; returns the child's end of the pair.

    Raises:
        OSError: no process could be started.
    """
    mine, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    os.set_inheritable(lock, True)
    arguments = start.command(run.lib, run, str(lock), str(theirs.fileno()), str(child))
    os.posix_spawn(arguments[0], arguments, os.environ, setsigdef=[signal.SIGTERM])
    os.set_inheritable(lock, False)
    theirs.close()
    return mine
