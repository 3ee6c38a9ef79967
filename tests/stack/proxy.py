"""Stands between the agent and a collector: passes every request on, and tells the test of each acceptance."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

_KEPT = ("content-type", "content-encoding", "authorization", "skyrl-otel-low-water")


class Proxy:
    """`url` is for agents. `accepted(headers, body)` runs after the collector's 2xx and before the agent hears of it,
    and says whether it hears of it at all."""

    def __init__(self, target: str, accepted: Callable[[dict[str, str], bytes], bool]) -> None:
        address = urlsplit(target).netloc
        self.accepted = accepted
        self.requests = 0
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name: self.headers[name] for name in _KEPT if name in self.headers}
                proxy.requests += 1
                try:
                    connection = http.client.HTTPConnection(address, timeout=30)
                    connection.request("POST", self.path, body, headers)
                    response = connection.getresponse()
                    status, content = response.status, response.read()
                    connection.close()
                except OSError as error:
                    status, content = 503, str(error).encode()
                if 200 <= status < 300 and not proxy.accepted(headers, body):
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
