"""`sys.stdout.buffer` of a `LineStream`: for libraries that write bytes where text goes."""

from __future__ import annotations

import io
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_otel.capture.stream import LineStream


class ByteStream(io.BufferedIOBase):
    """`sys.stdout.buffer`: bytes keep their place between the same thread's text, and lines stay whole."""

    def __init__(self, text: LineStream) -> None:
        self._text = weakref.ref(text)

    def _stream(self) -> LineStream:
        text = self._text()
        if text is None or text.closed:
            raise ValueError("write to closed file")
        return text

    def write(self, data: Any, /) -> int:
        content = bytes(data)
        self._stream()._put(content)
        return len(content)

    def flush(self) -> None:
        text = self._text()
        if text is not None:
            text.flush()

    @property
    def raw(self) -> io.FileIO:
        return io.FileIO(self.fileno(), "w", closefd=False)

    @property
    def closed(self) -> bool:
        text = self._text()
        return text is None or text.closed

    @property
    def name(self) -> int:
        return self.fileno()

    @property
    def mode(self) -> str:
        return "wb"

    def fileno(self) -> int:
        return self._stream().fileno()

    def isatty(self) -> bool:
        return self._stream().isatty()

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self.flush()

    def __del__(self) -> None:
        pass
