"""Line-atomic `sys.stdout` and `sys.stderr`: one line, one write(2), whatever the threads do.

Text waits per thread until its line ends. What has no end yet goes out at flush(), when it goes on beyond 8 KB, before a
fork, at exit, and by the watch thread within a second (`push_partial`). Ray's own stream turns one print into two writes and
tears lines.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from os import write as os_write
from types import TracebackType
from typing import Any

from skyrl_otel.capture import guard
from skyrl_otel.capture.bytestream import ByteStream

PARTIAL_LIMIT_BYTES = 8192

# The disk's failures, which a print must not turn into the training's failure.
_LOSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# Streams are few and live as long as the process; the list is only appended to and copied.
_streams: list[LineStream] = []


class _Pending:
    """Text of one thread whose line has not ended: nothing, or one entry of `kept`.

    The owning thread takes no lock on its way: it pops, which is atomic, and only waits where the watch thread has popped
    and not yet written (`pushing`), so that the two parts of a line keep their order. A signal handler that prints within
    its own thread's print finds either all of the text or none.
    """

    __slots__ = ("__weakref__", "age", "kept", "lock", "pid", "pushing", "stream", "thread")

    def __init__(self, stream: LineStream) -> None:
        self.kept: dict[int, bytes] = {}
        self.age = 0
        self.pushing = False
        self.lock = threading.Lock()  # held by the watch thread (or the exit) while it pops and writes
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.stream = stream

    def wait(self) -> None:
        """Until the watch thread has written what it took."""
        with self.lock:
            pass

    def push(self, timeout_s: float = -1, *, unless_writing: bool = False) -> bool:
        """Write from another thread what the owner has begun; False if the owner is at it, or somebody else."""
        if not self.lock.acquire(timeout=timeout_s):
            return False
        try:
            self.pushing = True
            begun = self.kept.get(0)
            if unless_writing and (_is_writing(self.thread) or self.kept.get(0) is not begun):
                return False
            data = self.kept.pop(0, b"")
            self.age = 0
            if data:
                self.stream._emit(data)
            return True
        finally:
            self.pushing = False
            self.lock.release()

    def __del__(self) -> None:
        # The thread ended in the middle of a line. After a fork the other threads' text belongs to the parent alone.
        data = self.kept.pop(0, b"")
        if data and self.pid == os.getpid():
            self.stream._emit(data)


class LineStream(io.TextIOBase):
    """A text stream over a descriptor.

    Args:
        descriptor: written to, never closed.
        replaced: the stream it stands in for, whose encoding is kept.
        marker: called with each text that begins with a colon, before it is written; true means it is dealt with. This
            is how the Ray integration sees Ray's own lines.
    """

    def __init__(
        self,
        descriptor: int,
        replaced: Any = None,
        marker: Callable[[LineStream, str], bool] | None = None,
    ) -> None:
        self.marker = marker
        self.active = False
        self._fd = descriptor
        self._encoding = str(getattr(replaced, "encoding", None) or "utf-8")
        self._is_utf8 = codecs.lookup(self._encoding).name == "utf-8"
        self._errors = str(getattr(replaced, "errors", None) or "backslashreplace")
        self._closed = False
        self._holds_back = True
        self._local = threading.local()
        self._pendings: dict[int, weakref.ref[_Pending]] = {}
        self._buffer = ByteStream(self)
        _streams.append(self)

    def write(self, text: str, /) -> int:
        # Measured against Ray's stream, which is two calls into C. A print's two texts are dealt with here, without a call
        # of ours: one without an end is kept, and the bare end that follows writes both. All else goes by `_put`.
        if text == "\n":
            try:
                pending: _Pending = self._local.pending
                data = pending.kept.pop(0) + b"\n"
            except (AttributeError, KeyError):
                self._put(b"\n")
                return 1
            if pending.pushing:
                pending.wait()
            pending.age = 0
            try:
                written = os_write(self._fd, data)
            except OSError as error:
                self._lost(error, data)
                return 1
            if written != len(data):
                self._emit(data[written:])
            return 1
        if text[:1] == ":" and self.marker is not None and self.marker(self, text):
            return len(text)
        try:
            data = text.encode() if self._is_utf8 else text.encode(self._encoding, self._errors)
        except UnicodeError:
            data = self._encode_strange(text)
        except AttributeError:
            raise TypeError(f"write() argument must be str, not {type(text).__name__}") from None
        try:
            kept = self._local.pending.kept
        except AttributeError:
            kept = None
        if kept == {} and self._holds_back and b"\n" not in data:
            kept[0] = data
            self.active = True
        else:
            self._put(data)
        return len(text)

    def _encode_strange(self, text: str) -> bytes:
        """A lone surrogate must not end a training run, whatever `errors` says."""
        try:
            return text.encode(self._encoding, self._errors)
        except UnicodeError:
            return text.encode("utf-8", "backslashreplace")

    def writelines(self, lines: Iterable[str], /) -> None:  # type: ignore[override]
        self.write("".join(lines))

    def _put(self, data: bytes) -> None:
        if self._closed:
            raise ValueError("I/O operation on closed file.")
        try:
            pending: _Pending = self._local.pending
        except AttributeError:
            pending = self._new_pending()
        begun = pending.kept.pop(0, None)
        if pending.pushing:
            pending.wait()
        if b"\n" not in data:
            # One print is its text and then its line's end: however long the text, the two become one write. Text that
            # goes on without an end does not pile up.
            goes_on = begun is not None and len(begun) > PARTIAL_LIMIT_BYTES
            if begun is not None:
                data = begun + data
            if not goes_on and self._holds_back:
                pending.kept[0] = data
                self.active = True
                return
        else:
            if begun is not None:
                data = begun + data
            if data[-1] != 10 and self._holds_back:
                cut = data.rfind(b"\n") + 1
                pending.kept[0] = data[cut:]
                data = data[:cut]
                self.active = True
        pending.age = 0
        self._emit(data)

    def _emit(self, data: bytes) -> None:
        try:
            written = os_write(self._fd, data)
            if written != len(data):
                self._emit(data[written:])
        except OSError as error:
            self._lost(error, data)

    def _lost(self, error: OSError, data: bytes) -> None:
        if error.errno not in _LOSING:
            raise error
        guard.counts["stream.lost_bytes"] += len(data)

    def _new_pending(self) -> _Pending:
        pending = _Pending(self)
        key, pendings = id(pending), self._pendings
        pendings[key] = weakref.ref(pending, lambda _: pendings.pop(key, None))
        self._local.pending = pending
        return pending

    def flush(self) -> None:
        """Write what this thread has begun. Never raises for a full disk."""
        self._flush()

    def end_line(self) -> str:
        """Write what this thread has begun; what must follow for the next text to begin a line: "\\n" or nothing."""
        return "\n" if self._flush() else ""

    def _flush(self) -> bool:
        pending: _Pending | None = getattr(self._local, "pending", None)
        if pending is None:
            return False
        data = pending.kept.pop(0, b"")
        if pending.pushing:
            pending.wait()
        if data:
            pending.age = 0
            self._emit(data)
        return bool(data)

    def push_partial(self, min_age: int = 2) -> bool:
        """Write what any thread began `min_age` calls ago; whether some text still waits. For the watch thread."""
        waiting = False
        self.active = False
        for reference in list(self._pendings.values()):
            pending = reference()
            if pending is None or not pending.kept:
                continue
            pending.age += 1
            if pending.age < min_age or not pending.push(unless_writing=True):
                waiting = True
        if waiting:
            self.active = True
        return waiting

    def drain(self) -> None:
        """At exit: write everything that waits, and from now on hold nothing back."""
        self._holds_back = False
        for reference in list(self._pendings.values()):
            pending = reference()
            if pending is not None:
                pending.push(timeout_s=0.2)  # somebody may be inside a write that blocks: not worth an exit that hangs

    def _forget_threads(self) -> None:
        self._local = threading.local()
        self._pendings = {}

    @property
    def buffer(self) -> ByteStream:
        return self._buffer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._errors

    @property
    def newlines(self) -> None:  # type: ignore[override]
        return None

    @property
    def line_buffering(self) -> bool:
        return True

    @property
    def write_through(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return {1: "<stdout>", 2: "<stderr>"}.get(self._fd, f"<fd {self._fd}>")

    @property
    def mode(self) -> str:
        return "w"

    @property
    def closed(self) -> bool:
        return self._closed

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        try:
            return os.isatty(self._fd)
        except OSError:
            return False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def reconfigure(
        self,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        line_buffering: bool | None = None,
        write_through: bool | None = None,
    ) -> None:
        """As `io.TextIOWrapper.reconfigure`; how text is buffered stays ours, since that is what keeps lines whole."""
        self.flush()
        if encoding is not None:
            self._is_utf8 = codecs.lookup(encoding).name == "utf-8"  # LookupError for an unknown one, as the original
            self._encoding = encoding
        if errors is not None:
            self._errors = errors
        elif encoding is not None:
            self._errors = "strict"

    def detach(self) -> Any:
        raise io.UnsupportedOperation("detach")

    def close(self) -> None:
        """Refuse further text. The descriptor stays open: native code and children write there."""
        if not self._closed:
            self.flush()
            self._closed = True
            self._holds_back = False

    def __enter__(self) -> LineStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<skyrl_otel LineStream name={self.name!r} encoding={self._encoding!r}>"

    def __del__(self) -> None:
        # io.IOBase would close() here, perhaps in the middle of the interpreter's end.
        pass


_WRITING = {method.__code__ for method in (LineStream.write, LineStream._put, LineStream.writelines, ByteStream.write)}


def _is_writing(thread: int) -> bool:
    """Whether a thread stands inside a print, between two of its calls of `write`.

    CPython switches threads at a Python function's beginning, so one that lost the interpreter in the middle of a print is
    found in ours. On a busy machine it may stay there for seconds; its line must not be torn for that.
    """
    frame = sys._current_frames().get(thread)
    for _ in range(4):  # what `write` calls may be on top: an encoder, the marker
        if frame is None:
            return False
        if frame.f_code in _WRITING:
            return True
        frame = frame.f_back
    return False


def _before_fork() -> None:
    for stream in list(_streams):
        with guard.guarded("stream.before_fork"):
            stream.flush()


def _in_child() -> None:
    # No thread but this one exists here, and any of their locks may be held for ever.
    for stream in list(_streams):
        stream._forget_threads()


os.register_at_fork(before=_before_fork, after_in_child=_in_child)
