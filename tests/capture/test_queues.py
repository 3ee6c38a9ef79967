"""Records that reach another process by a `QueueHandler`: once in the spool, whoever has taken them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.capture.conftest import Host, host, spool, written
from tests.capture.frames import taken

__all__ = ["host", "spool"]

# `multiprocessing` starts its children with the main module, which must be a file.
PROGRAM = """
import logging, logging.handlers, multiprocessing, os, sys, threading
HOW, WAY, ATTACH = sys.argv[1:4]

def child(queue, number):
    if ATTACH == "attaching":
        import skyrl_otel; skyrl_otel.attach(role="env", channel="infra")
    root = logging.getLogger(); root.handlers[:] = [logging.handlers.QueueHandler(queue)]; root.setLevel("INFO")
    for line in range(5):
        logging.getLogger("child").info("child %d line %d", number, line, extra={"step": line})

def handle(queue):
    # As the logging cookbook has it: back into a logger here.
    while (record := queue.get()) is not None:
        logging.getLogger(record.name).handle(record)

if __name__ == "__main__":
    start = multiprocessing.get_context(HOW)
    queue = start.Queue()
    import skyrl_otel
    skyrl_otel.attach(role="driver", channel="infra")
    logging.basicConfig(level="INFO", stream=sys.stderr)
    console = logging.StreamHandler()
    if ATTACH == "unrecorded":
        del os.environ["SKYRL_OTEL_CHILD_OF"]
    if WAY == "listener":
        listener = logging.handlers.QueueListener(queue, console, logging.NullHandler(), logging.StreamHandler(sys.stdout))
        listener.start()
    elif WAY == "loggers":
        thread = threading.Thread(target=handle, args=(queue,)); thread.start()
    else:
        sibling = start.Process(target=handle, args=(queue,)); sibling.start()
    children = [start.Process(target=child, args=(queue, number)) for number in range(3)]
    for each in children: each.start()
    for each in children: each.join()
    if WAY == "listener":
        listener.stop()
    else:
        queue.put(None)
        (thread if WAY == "loggers" else sibling).join()
"""


# Not: unrecorded children with a sibling that handles their records. None of them records, so there is nobody to take them.
WAYS = [
    *(
        (kind, way)
        for kind in ("fork plain", "spawn plain", "spawn attaching")
        for way in ("listener", "loggers", "sibling")
    ),
    *(("spawn unrecorded", way) for way in ("listener", "loggers")),
]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_a_record_from_another_process_is_taken_once(
    host: Host, spool: Path, tmp_path: Path, kind: str, way: str
) -> None:
    how, attach = kind.split()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with open(tmp_path / "output", "ab") as output:
        host(
            f"import runpy, sys; sys.argv = [{str(program)!r}, {how!r}, {way!r}, {attach!r}]\n"
            f"runpy.run_path({str(program)!r}, run_name='__main__')",
            stdout=output,
            stderr=output,
        )
    found = [(folder, record) for folder in written(spool) for record in taken(folder.path) if record.scope == "child"]
    wanted = {f"child {number} line {line}" for number in range(3) for line in range(5)}
    assert Counter(record.body for _, record in found) == dict.fromkeys(wanted, 1)
    by_role = {folder.facts["role"] for folder, _ in found}
    assert by_role == ({"env"} if attach == "attaching" else {"driver"})
    children = {folder.facts["pid"] for folder, _ in found}
    assert len(children) == (1 if attach == "unrecorded" else 3), "where the child records, it is its own"
    assert all(folder.text(name) == b"" for folder in written(spool) for name in ("out", "err")), "no echo beside it"
