"""How long processes take to end behind their last line, with us and without, whatever the collector does."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Literal, get_args

from tests.agent.conftest import Node

#: It answers; nobody listens there any more; it accepts and never says a word.
State = Literal["alive", "dead", "hanging"]
STATES: tuple[State, ...] = get_args(State)

LIMIT_S = 0.1
_MOST_TURNS = 15


@contextmanager
def node_with_collector(root: Path, state: State) -> Iterator[Node]:
    """A run on this node with an agent that sends to a collector in that state; at the end it has tried to."""
    node = Node(root)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)  # nobody calls accept
    port = listener.getsockname()[1]
    if state == "dead":
        listener.close()
    try:
        node.ship(endpoint=node.receiver.url if state == "alive" else f"http://127.0.0.1:{port}/v1/logs")
        node.start()
        yield node
        assert list(node.run.writers()), "nothing was recorded"
        if state == "alive":
            node.receiver.wait(lambda: bool(node.receiver.records))
        elif state == "hanging":
            listener.settimeout(20)
            listener.accept()[0].close()
    finally:
        node.close()
        listener.close()


def added_s(with_us: Callable[[], float], without: Callable[[], float], *, middle: bool = False) -> float:
    """By how much an exit is later: the least with us less the least without, of runs in turn.

    Whatever else the machine does makes an exit later, never sooner, so the least of a few is the program's own. There are
    more turns, up to a bound, while the answer is not below the limit.

    Args:
        with_us: runs the program and returns how long it took to end.
        without: the same without us.
        middle: compare medians, of more turns: for programs whose own exit has a fast case that is rare.
    """
    of, turns = (median, 5) if middle else (min, 3)
    ours: list[float] = []
    bare: list[float] = []
    while True:
        for _ in range(turns):
            bare.append(without())
            ours.append(with_us())
        added = of(ours) - of(bare)
        if added < LIMIT_S or len(ours) >= _MOST_TURNS:
            return added


def since(stamp: Path) -> float:
    """Seconds from the moment that a program wrote down as its last act."""
    return time.monotonic() - float(stamp.read_text())
