"""A receiver that takes everything, keeps the bytes and says yes; a process of its own, so that it costs the sender nothing.

`python -m benchmarks.sink FILE` prints its port. FILE gets each body, before it its length as u32le and when it was
all there, in nanoseconds, as u64le; it is read back by `arrivals`.
"""

from __future__ import annotations

import http.server
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_head = struct.Struct("<IQ")


def arrivals(path: Path) -> Iterator[tuple[int, bytes]]:
    """When each body in `path` came, and the body."""
    with path.open("rb") as file:
        while head := file.read(_head.size):
            size, at = _head.unpack(head)
            yield at, file.read(size)


def main(path: str) -> None:
    """Serve until killed."""
    file = open(path, "wb", buffering=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        rbufsize = 1 << 20

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            file.write(_head.pack(len(body), time.time_ns()) + body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
