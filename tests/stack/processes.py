"""The real otelcol and Loki, with the very files that docker-compose.yml mounts, as processes of a test.

Binaries come from scripts/build-stack, which builds them from source where no earlier test did.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.stack.output import keep

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy" / "collector"
TOKEN = "stack-test-token"
HEADERS = f"authorization=Bearer%20{TOKEN}"
DEADLINE_S = 60.0


@lru_cache
def binary(name: str) -> str:
    """The path of otelcol or loki; builds it if need be."""
    done = subprocess.run(
        [CHECKOUT / "scripts" / "build-stack", name], stdout=subprocess.PIPE, text=True, check=True, timeout=2400
    )
    return done.stdout.strip()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(every_s)


def get(url: str, timeout_s: float = 60.0, **parameters: str | int) -> bytes:
    """Raises AssertionError with the server's words for anything but 2xx, OSError where nobody answers."""
    full = f"{url}?{urllib.parse.urlencode(parameters)}" if parameters else url
    try:
        with urllib.request.urlopen(full, timeout=timeout_s) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{full} answered {error.code}: {error.read().decode('utf-8', 'replace')}") from None


class Process:
    """One server that can be killed and started again on the same ports and folder."""

    def __init__(self, folder: Path, command: list[str], environment: Mapping[str, str], ready_url: str) -> None:
        self.folder = folder
        self.command = command
        self.environment = dict(environment)
        self.ready_url = ready_url
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "stderr.log"
        self.stdout = folder / "stdout.log"

    def start(self, **environment: str) -> None:
        """Start with these changes of the environment and wait until it says that it is ready."""
        env = {"PATH": os.environ["PATH"], **self.environment, **environment}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        wait_for(self._is_ready, f"{self.command[0]} is ready; it said: {self.said()[-2000:]}")

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        # A pipe, as a container runtime gives: `path: /dev/stdout` opens it again, and may not truncate.
        assert process.stdout is not None
        with self.stdout.open("ab") as out:
            while data := process.stdout.read1(1 << 16):
                out.write(data)
                out.flush()

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self.command[0]} ended: {self.said()[-2000:]}"
        try:
            get(self.ready_url, 2.0)
        except (OSError, AssertionError):
            return False
        return True

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(DEADLINE_S)
            self._end()

    def _end(self) -> None:
        assert self._process is not None and self._reader is not None and self._process.stdout is not None
        self._process.wait()
        self._reader.join(10)
        self._process.stdout.close()
        self._process = None
        keep(Path(self.command[0]).name, [self.log])

    def cpu_s(self) -> float:
        """Seconds of both kinds that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """The most it ever held, resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
        return 0.0


class Loki(Process):
    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        http, grpc = free_ports(2)
        self.url = f"http://{host}:{http}"
        environment = {
            "LOKI_HOST": host,
            "LOKI_PORT": str(http),
            "LOKI_GRPC_PORT": str(grpc),
            "LOKI_DIR": str(folder / "data"),
        }
        command = [binary("loki"), f"-config.file={DEPLOY / 'loki.yaml'}", "-config.expand-env=true"]
        super().__init__(folder, command, environment, f"{self.url}/ready")

    def query(self, query: str, **parameters: str | int) -> Any:
        """The result of an instant query."""
        return json.loads(get(f"{self.url}/loki/api/v1/query", query=query, **parameters))["data"]["result"]

    def count(self, query: str, by: str = "", window: str = "6h") -> dict[str, int]:
        """``count_over_time`` of a log query by labels, which are joined by "|"; {"": n} without any."""
        grouped = f"sum by ({by}) " if by else "sum"
        found = self.query(f"{grouped}(count_over_time({query} [{window}]))")
        names = by.split(",") if by else []
        return {"|".join(one["metric"].get(name, "") for name in names): int(one["value"][1]) for one in found}

    def metric(self, name: str) -> float:
        """Sum over all labels of one of its own metrics."""
        return _sum_of(name, get(f"{self.url}/metrics"))

    def disk_bytes(self) -> int:
        """What its chunks take, all of them written out first."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/flush", method="POST"), timeout=60.0).close()
        wait_for(lambda: self.metric("loki_ingester_memory_chunks") == 0, "Loki has written its chunks", every_s=1.0)
        return sum(path.stat().st_size for path in (self.folder / "data" / "chunks").rglob("*") if path.is_file())


class Otelcol(Process):
    def __init__(self, folder: Path, loki: Loki | None, host: str = "127.0.0.1", **environment: str) -> None:
        self.host = host
        self.http, self.grpc, self.health, self.metrics = free_ports(4)
        scheme = "https" if environment.get("OTELCOL_TLS") == "true" else "http"
        self.url = f"{scheme}://{host}:{self.http}"
        self.grpc_url = f"{scheme}://{host}:{self.grpc}"
        self.data = folder / "data"
        settings = {
            "OTELCOL_TOKEN": TOKEN,
            "OTELCOL_HOST": host,
            "OTELCOL_HTTP_PORT": str(self.http),
            "OTELCOL_GRPC_PORT": str(self.grpc),
            "OTELCOL_HEALTH_PORT": str(self.health),
            "OTELCOL_METRICS_PORT": str(self.metrics),
            "OTELCOL_DIR": str(self.data),
        }
        if loki is not None:
            settings |= {
                "OTELCOL_LOKI": f"{loki.url}/otlp",
                "OTELCOL_EXPORTERS": "[otlp_http/loki]",
            }
        command = [binary("otelcol"), "--config", str(DEPLOY / "config.yaml")]
        super().__init__(folder, command, {**settings, **environment}, f"http://{host}:{self.health}/")

    def files(self) -> list[Path]:
        """The rotated ones, oldest first, then the newest."""
        rotated = sorted(self.data.glob("infra-*.jsonl"))
        return [*rotated, *self.data.glob("infra.jsonl")]

    def recorded(self) -> list[dict[str, Any]]:
        """Each log record in the files: its body, attributes and resource, flat."""
        found = []
        for path in self.files():
            for line in path.read_bytes().splitlines():
                for resource_logs in json.loads(line)["resourceLogs"]:
                    resource = _attributes(resource_logs["resource"]["attributes"])
                    for scope_logs in resource_logs["scopeLogs"]:
                        for record in scope_logs["logRecords"]:
                            body = record.get("body", {}).get("stringValue", "")
                            found.append({**resource, **_attributes(record.get("attributes", [])), "body": body})
        return found

    def metric(self, name: str) -> float:
        """Sum over all labels of one of its own metrics."""
        return _sum_of(name, get(f"http://{self.host}:{self.metrics}/metrics"))


def _sum_of(name: str, metrics: bytes) -> float:
    lines = metrics.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _attributes(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return {pair["key"]: next(iter(pair["value"].values()), None) for pair in pairs}
