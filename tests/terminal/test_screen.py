"""Lines from elsewhere among what the child prints."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Callable, Iterator

import pytest

from skyrl_otel.terminal.screen import Screen, columns, last_row


@pytest.fixture
def terminal() -> Iterator[tuple[Screen, Callable[[], bytes]]]:
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    closed = False

    def shown() -> bytes:
        """All that was printed; closes the terminal."""
        nonlocal closed
        os.close(theirs)
        closed = True
        output = b""
        try:
            while data := os.read(ours, 65536):
                output += data
        except OSError:  # EIO: the end
            pass
        return output

    yield Screen(theirs), shown
    os.close(ours)
    if not closed:
        os.close(theirs)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (b"whole\n", b"whole\nINSERT\n"),
        (b"50% |##", b"50% |##\r\x1b[KINSERT\n50% |##"),
        (b"\r10%\r50%", b"\r10%\r50%\r\x1b[KINSERT\n50%"),
        (b"\x1b[32m50%\x1b[0m", b"\x1b[32m50%\x1b[0m\r\x1b[KINSERT\n\x1b[32m50%\x1b[0m"),
        (b"step 5\r", b"step 5\r\r\x1b[KINSERT\nstep 5\r"),
        # What moves the cursor about or does not fit one row cannot be drawn again.
        (b"bar 2\x1b[A", b"bar 2\x1b[A\nINSERT\n"),
        (b"x" * 20, b"x" * 20 + b"\nINSERT\n"),
        ("宽".encode() * 10, "宽".encode() * 10 + b"\nINSERT\n"),
    ],
)
def test_on_a_terminal(terminal: tuple[Screen, Callable[[], bytes]], printed: bytes, expected: bytes) -> None:
    screen, shown = terminal
    screen.print(printed)
    screen.insert(b"INSERT\n")
    assert shown() == expected


def test_in_a_file_a_line_that_is_being_written_may_end_first() -> None:
    ours, theirs = os.pipe()
    screen = Screen(theirs)
    screen.print(b"half")
    threading.Timer(0.05, screen.print, [b" whole\n"]).start()
    screen.insert(b"INSERT\n")
    assert os.read(ours, 100) == b"half whole\nINSERT\n"
    screen.print(b"for ever half")
    screen.insert(b"INSERT\n")
    assert os.read(ours, 100) == b"for ever half\nINSERT\n"
    os.close(ours)
    assert not screen.insert(b"INSERT\n")
    assert screen.gone
    os.close(theirs)


def test_a_full_disk_is_counted() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    screen = Screen(full)
    assert screen.print(b"12345")
    assert (screen.unprinted_bytes, screen.problem) == (5, "No space left on device")
    os.close(full)


def test_a_non_blocking_reader_gets_everything() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    data = b"x" * 1_000_000
    screen = Screen(theirs)
    writer = threading.Thread(target=screen.print, args=[data])
    writer.start()
    received = 0
    while received < len(data):
        received += len(os.read(ours, 65536))
    writer.join()
    os.close(ours)
    os.close(theirs)


def test_row_and_columns() -> None:
    assert last_row(b"a\rbc") == b"bc"
    assert last_row(b"a\x07") is None
    assert columns(b"\x1b[31mab\x1b[0m\r") == 2
    assert columns("é宽".encode()) == 3
