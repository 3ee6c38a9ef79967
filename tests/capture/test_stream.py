"""The stream that stands in for sys.stdout: one line, one write(2), and all that libraries ask of a stream."""

import errno
import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_otel.capture import guard
from skyrl_otel.capture import stream as stream_module
from skyrl_otel.capture.stream import PARTIAL_LIMIT_BYTES, LineStream


class Recorded(LineStream):
    """A stream and each of the writes that were made to its descriptor."""

    writes: list[bytes]


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    descriptor = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    made = Recorded(descriptor)
    made.writes = []

    def write(target: int, data: bytes) -> int:
        assert target == descriptor
        made.writes.append(data)
        return os.write(target, data)

    monkeypatch.setattr(stream_module, "os_write", write)
    yield made
    stream_module._streams.remove(made)
    os.close(descriptor)


def test_a_line_is_one_write(stream: Recorded) -> None:
    print("a", 1, None, sep=", ", file=stream)
    print("two\nlines", file=stream)
    stream.writelines(["x\n", "y\n"])
    assert stream.writes == [b"a, 1, None\n", b"two\n", b"lines\n", b"x\ny\n"]


def test_text_without_an_end_waits_for_it_for_flush_and_for_the_watch(stream: Recorded) -> None:
    print("a", end="", file=stream)
    assert stream.writes == []
    stream.flush()
    assert stream.writes == [b"a"]
    print("b", end="", file=stream)
    assert stream.push_partial()
    assert not stream.push_partial()
    assert stream.writes == [b"a", b"b"]
    print("c\nd", end="", file=stream)
    assert stream.writes == [b"a", b"b", b"c\n"]
    print(file=stream)
    assert stream.writes[3:] == [b"d\n"]


def test_a_long_text_without_an_end_is_not_kept(stream: Recorded) -> None:
    for _ in range(PARTIAL_LIMIT_BYTES + 2):
        stream.write("x")
    assert [len(data) for data in stream.writes] == [PARTIAL_LIMIT_BYTES + 2]


def test_a_line_of_a_megabyte_is_one_write(stream: Recorded) -> None:
    print("z" * 1_000_000, file=stream)
    assert [len(data) for data in stream.writes] == [1_000_001]


def test_bytes_and_text_of_one_thread_keep_their_order(stream: Recorded) -> None:
    stream.write("text ")
    stream.buffer.write(b"\xff bytes ")
    stream.write("text\n")
    assert stream.writes == [b"text \xff bytes text\n"]


def test_threads_do_not_share_a_line(stream: Recorded) -> None:
    print("main ", end="", file=stream)
    other = threading.Thread(target=lambda: print("other", file=stream))
    other.start()
    other.join()
    print("thread", file=stream)
    assert stream.writes == [b"other\n", b"main thread\n"]


def test_a_thread_that_ends_within_a_line_leaves_it(stream: Recorded) -> None:
    other = threading.Thread(target=lambda: print("unfinished", end="", file=stream))
    other.start()
    other.join()
    assert stream.writes == [b"unfinished"]


def test_a_lone_surrogate_is_written_and_does_not_raise(stream: Recorded) -> None:
    stream.reconfigure(errors="strict")
    print("\udc80", file=stream)
    assert stream.writes == [b"\\udc80\n"]


def test_a_full_disk_is_counted_and_does_not_raise() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    lost = guard.counts["stream.lost_bytes"]
    made = LineStream(descriptor)
    print("nowhere to go", file=made)
    made.flush()
    assert guard.counts["stream.lost_bytes"] == lost + 14
    stream_module._streams.remove(made)
    os.close(descriptor)


def test_a_closed_descriptor_raises_as_it_always_did(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "x", os.O_CREAT | os.O_WRONLY)
    made = LineStream(descriptor)
    stream_module._streams.remove(made)
    os.close(descriptor)
    with pytest.raises(OSError) as raised:
        print("x", file=made)
    assert raised.value.errno == errno.EBADF


def test_it_answers_what_libraries_ask(stream: Recorded) -> None:
    assert isinstance(stream, io.TextIOBase)
    assert (stream.encoding, stream.newlines, stream.line_buffering, stream.mode) == ("utf-8", None, True, "w")
    assert (stream.writable(), stream.readable(), stream.seekable(), stream.isatty()) == (True, False, False, False)
    assert os.fstat(stream.fileno()).st_size == 0
    assert stream.buffer.fileno() == stream.fileno()
    assert stream.buffer.raw.fileno() == stream.fileno()
    with pytest.raises(TypeError, match="must be str"):
        stream.write(b"x")  # type: ignore[arg-type]
    with pytest.raises(io.UnsupportedOperation):
        stream.read()
    with pytest.raises(io.UnsupportedOperation):
        stream.detach()
    with pytest.raises(LookupError):
        stream.reconfigure(encoding="no such")
    stream.reconfigure(encoding="latin-1", line_buffering=False, write_through=True)
    print("é", file=stream)
    assert stream.writes == [b"\xe9\n"]
    handler = logging.StreamHandler(stream)
    handler.emit(logging.makeLogRecord({"msg": "logged"}))
    assert stream.writes[1:] == [b"logged\n"]
    subprocess.run(["echo", "child"], stdout=stream, check=True)
    assert os.pread(stream.fileno(), 100, 0) == b"\xe9\nlogged\nchild\n"


def test_closed_it_refuses_text_and_keeps_the_descriptor(stream: Recorded) -> None:
    stream.write("last")
    stream.close()
    assert stream.closed and stream.buffer.closed
    assert stream.writes == [b"last"]
    with pytest.raises(ValueError, match="closed file"):
        stream.write("x")
    os.write(stream.fileno(), b"native code goes on")


def test_a_marker_sees_only_texts_that_begin_with_a_colon(stream: Recorded) -> None:
    seen: list[str] = []

    def marker(_: LineStream, text: str) -> bool:
        seen.append(text)
        return text.startswith(":mine")

    stream.marker = marker
    for text in ("plain\n", ":other\n", ":mine\n"):
        stream.write(text)
    assert seen == [":other\n", ":mine\n"]
    assert stream.writes == [b"plain\n", b":other\n"]


def test_a_print_that_waits_for_the_interpreter_is_not_torn(stream: Recorded) -> None:
    """However often the watch thread comes by: a thread inside print is not one that left a line unfinished."""
    lines = [f"one {thread} two {n}\n".encode() for n in range(2000) for thread in range(3)]

    def work(thread: int) -> None:
        for n in range(2000):
            print("one", thread, "two", n, file=stream)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            stream.push_partial(min_age=1)
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert sorted(os.pread(stream.fileno(), 1 << 20, 0).splitlines(True)) == sorted(lines)
