"""A record's console echo: on the user's terminal as ever, and recorded once."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool import marks
from tests.capture.conftest import Host, written
from tests.receiver import decode

NONCE = b"0123456789abcdef"


@given(
    st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=9000)), max_size=6), st.lists(st.integers(1, 50))
)
def test_marks_are_taken_out_however_the_stream_is_cut(texts: list[tuple[bool, bytes]], cuts: list[int]) -> None:
    texts = [(marked, text.replace(b"\x1b", b"e")) for marked, text in texts]
    stream = b"".join(b"".join(marks.wrapped(text, NONCE)) if marked else text for marked, text in texts)
    unmarker = marks.Unmarker(NONCE)
    pieces: list[tuple[bytes, bool]] = []
    position = 0
    for cut in [*cuts, len(stream)]:
        pieces += unmarker.feed(stream[position : position + cut])
        position += cut
    pieces.append((unmarker.rest(), True))
    assert b"".join(piece for piece, _ in pieces) == b"".join(text for _, text in texts)
    recorded = b"".join(piece for piece, is_recorded in pieces if is_recorded)
    assert recorded == b"".join(text for marked, text in texts if not marked)


def test_a_writer_that_died_within_its_marks_hides_nothing() -> None:
    unmarker = marks.Unmarker(NONCE)
    pieces = unmarker.feed(marks.opening(NONCE) + b"half of an echo\n")
    for _ in range(10):
        pieces += unmarker.feed(b"others go on " * 400)
    pieces.append((unmarker.rest(), True))
    assert all(is_recorded for _, is_recorded in pieces)
    assert b"".join(piece for piece, _ in pieces) == b"half of an echo\n" + b"others go on " * 4000


PROGRAM = """
import logging, sys
import skyrl_otel; skyrl_otel.attach()
from loguru import logger
from rich.logging import RichHandler
logging.basicConfig(level="INFO", format="%(name)s %(message)s")
log = logging.getLogger("app")
for number in range(100):
    print("printed", number, file=sys.stderr)
    log.info("logged %d", number)
logger.remove(); logger.add(sys.stderr, format="loguru {message}", enqueue=True, colorize=True)
logger.warning("said"); logger.complete()
print("done", file=sys.stderr); log.info("done")
import threading
def work(name):
    for number in range(500):
        log.info("thread %s %d", name, number)
        sys.stderr.write(f"by {name} {number}\\n")
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
logging.root.handlers = [RichHandler()]
log.info("rich")
"""


def test_in_a_followed_file_the_echo_stays_and_is_read_over(host: Host, spool: Path, tmp_path: Path) -> None:
    output = tmp_path / "err"
    with open(output, "ab") as file:
        host(PROGRAM, stderr=file, stdout=file)
    text = output.read_text()
    assert text.count("app logged") == 100 and "loguru said" in text and text.count("done") == 2
    [folder] = written(spool)
    agent = Writer("run", folder.path.name[2:], folder.path)
    bodies: list[str] = []
    now = 10**12
    for _ in range(40):
        now += 200_000_000
        agent.observe(now)
        batch = build([agent])
        bodies += [record.body for record in decode(batch.body) if not record.event]
        batch.accept()
    agent.close()
    wanted = [f"printed {n}" for n in range(100)] + [f"logged {n}" for n in range(100)]
    wanted += [f"thread {name} {n}" for name in range(4) for n in range(500)]
    wanted += [f"by {name} {n}" for name in range(4) for n in range(500)] + ["said", "done", "done", "rich"]
    # Where two threads write at once an echo may stand beside its record; nothing may be missing.
    extra = sorted(bodies)
    for body in wanted:
        assert body in extra, body
        extra.remove(body)
    assert all(body.startswith("app thread") for body in extra), extra
    assert len(extra) < 40


def test_in_a_followed_file_the_echo_by_its_name_is_read_over_too(host: Host, spool: Path, tmp_path: Path) -> None:
    """`/dev/stderr`, and the file's own name: a description of its own, with an offset of its own."""
    output = tmp_path / "err"
    with open(output, "ab") as file:
        host(
            f"""
import logging, sys
import skyrl_otel; skyrl_otel.attach()
log = logging.getLogger("app"); log.setLevel(20)
log.addHandler(logging.FileHandler("/dev/stderr")); log.addHandler(logging.FileHandler({str(output)!r}))
for number in range(50):
    log.info("logged %d", number)
    print("printed", number, file=sys.stderr)
""",
            stderr=file,
            stdout=file,
        )
    assert output.read_text().count("logged") == 100
    [folder] = written(spool)
    agent = Writer("run", folder.path.name[2:], folder.path)
    bodies: list[str] = []
    now = 10**12
    for _ in range(40):
        now += 200_000_000
        agent.observe(now)
        batch = build([agent])
        bodies += [record.body for record in decode(batch.body) if not record.event]
        batch.accept()
    agent.close()
    assert sorted(bodies) == sorted(f"{word} {number}" for number in range(50) for word in ("logged", "printed"))


def test_a_second_reading_passes_over_the_same_echoes(host: Host, spool: Path, tmp_path: Path) -> None:
    with open(tmp_path / "err", "ab") as file:
        host(PROGRAM, stderr=file, stdout=file)
    [folder] = written(spool)
    first, again = {}, {}
    for found in (first, again):
        agent = Writer("run", folder.path.name[2:], folder.path)
        now = 10**12
        for _ in range(40):
            now += 200_000_000
            agent.observe(now)
            found.update({record.uid: record.raw for record in decode(build([agent]).body) if not record.event})
        agent.close()
    assert first == again


def test_without_a_reader_the_console_is_left_alone(host: Host, spool: Path) -> None:
    done = host(
        """
import logging, skyrl_otel; skyrl_otel.attach()
logging.basicConfig(level=20)
logging.info("seen")
"""
    )
    assert b"INFO:root:seen" in done.stderr
    assert os.listdir(spool)
