"""Our agent against the stock collector's log tailer: the same lines, the same sink, one core each, in turn.

Both read a file of vLLM-like lines that four processes wrote, take the header apart, set time, severity and origin, and send
OTLP/HTTP without compression. What arrives is decoded by the official classes and compared record by record. Both are pinned
to one core and the sink to another; lines per second are of the sender's processor time, which on a quiet machine
is the time on the clock, and here is not spoilt by what else runs. `wall_*` is the clock's.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from benchmarks.sink import arrivals
from skyrl_otel.agent import start
from skyrl_otel.spool import layout, library, token
from skyrl_otel.spool.token import Shipping
from skyrl_otel.spool.writer import WriterFolder

ROOT = Path(__file__).resolve().parent.parent
LINES = 2_000_000
_LINES_A_SECOND = 500
_QUIET_S = 4.0
_PIDS = (28741, 28789, 28801, 30012)
_NAMES = ("EngineCore", "EngineCore", "Worker_TP0", "APIServer")
_PLACES = (
    ("INFO", "core.py:402", "init engine (profile, create kv cache, warmup model) took {n}.87 s"),
    ("INFO", "loggers.py:259", "Engine 000: Avg prompt throughput: {n}.3 tokens/s, Running: {k} reqs, Waiting: 0 reqs"),
    ("DEBUG", "scheduler.py:307", "Chunked prefill is enabled with max_num_batched_tokens={n}, request {n:x}"),
    ("WARNING", "block_pool.py:80", "request req-{n:08x} was preempted {k} times: not enough KV cache space"),
    ("INFO", "gpu_worker.py:114", "Memory profiling takes {k}.{n} seconds. Current peak is {k}.1 GiB, 87.2 free"),
)

# regex_parser with time and severity, as its documentation shows; the message stays an attribute, which saves it a `move`.
_REGEX = (
    r"^\((?P<child>\w+) pid=(?P<pid>\d+)\) (?P<level>[A-Z]+) (?P<time>\d\d-\d\d \d\d:\d\d:\d\d) "
    r"\[(?P<logger>[^\]]+)\] (?P<message>.*)$"
)
FILE_LOG = r"""
receivers:
  file_log:
    include: ["{path}"]
    start_at: beginning
    operators:
      - type: regex_parser
        regex: '{regex}'
        timestamp: {{parse_from: attributes.time, layout: '%m-%d %H:%M:%S'}}
        severity: {{parse_from: attributes.level}}
exporters:
  otlp_http:
    endpoint: "http://127.0.0.1:{port}"
    compression: none
    sending_queue: {{block_on_overflow: true}}
service:
  telemetry: {{metrics: {{level: none}}, logs: {{level: warn}}}}
  pipelines: {{logs: {{receivers: [file_log], exporters: [otlp_http]}}}}
"""


@dataclass(slots=True)
class Seen:
    """What a sink got. `digest` does not depend on the order; `first` are some records for people."""

    records: int = 0
    digest: int = 0
    first: tuple[Any, ...] = ()

    def add(self, record: tuple[Any, ...]) -> None:
        self.records += 1
        self.digest += int.from_bytes(hashlib.blake2b(repr(record).encode(), digest_size=16).digest(), "little")
        if self.records <= 2:
            self.first += (record,)


def run(quick: bool) -> dict[str, object]:
    """Measure; `quick` takes a tenth of the lines."""
    lines = LINES // 10 if quick else LINES
    otelcol = subprocess.run([ROOT / "scripts" / "build-file-log"], stdout=subprocess.PIPE, text=True, check=True)
    with tempfile.TemporaryDirectory(prefix="sk-agent-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        corpus, mixture = root / "corpus.log", root / "mixed.log"
        mixed = measure_agent(root / "mixed", mixture, write_mixture(mixture, lines // 10))
        headers = write_corpus(corpus, lines)
        size = corpus.stat().st_size
        ours = measure_agent(root / "ours", corpus, lines)
        peer = measure_file_log(root / "peer", corpus, lines, otelcol.stdout.strip())
        mine = seen(root / "ours" / "sink", our_fields)
        theirs = seen(root / "peer" / "sink", peer_fields)
        same = (mine.records, mine.digest) == (theirs.records, theirs.digest)
        if not same:
            print(f"ours {mine.records} {mine.first}\npeer {theirs.records} {theirs.first}", file=sys.stderr)
    return {
        "lines_per_s_core": round(ours["lines_per_s"]),
        "ratio_to_file_log": round(ours["lines_per_s"] / peer["lines_per_s"], 2),
        "rss_mb": round(ours["rss_mb"], 1),
        "file_log_lines_per_s_core": round(peer["lines_per_s"]),
        "file_log_rss_mb": round(peer["rss_mb"], 1),
        "wall_lines_per_s": round(ours["wall_lines_per_s"]),
        "wall_file_log_lines_per_s": round(peer["wall_lines_per_s"]),
        "same_records": same,
        "mixed_lines_per_s_core": round(mixed["lines_per_s"]),
        "records": mine.records,
        "lines": lines,
        "distinct_headers": headers,
        "bytes_per_line": round(size / lines, 1),
        "sent_bytes_per_line": round(ours["sent"] / lines, 1),
        "file_log_sent_bytes_per_line": round(peer["sent"] / lines, 1),
        "rounds": 1,
    }


def write_corpus(path: Path, lines: int) -> int:
    """Lines as four vLLM processes write them to one fd, ending now; the number of distinct headers."""
    random_ = random.Random(1)
    began = time.time() - lines / _LINES_A_SECOND
    headers = set()
    with path.open("w") as file:
        for number in range(lines):
            when = time.strftime("%m-%d %H:%M:%S", time.gmtime(began + number / _LINES_A_SECOND))
            child = random_.randrange(4)
            level, place, message = _PLACES[random_.randrange(len(_PLACES))]
            header = f"({_NAMES[child]} pid={_PIDS[child]}) {level} {when} [{place}] "
            headers.add(header)
            file.write(f"{header}{message.format(n=number, k=number % 77)}\n")
    return len(headers)


def write_mixture(path: Path, lines: int) -> int:
    """Real output of all formats, a few lines of one after a few of another, as of today; the number of lines."""
    samples = sorted((ROOT / "tests" / "data" / "formats").glob("*.log"))
    texts = [_of_today(sample.read_bytes()).splitlines(keepends=True) for sample in samples]
    random_ = random.Random(1)
    written = 0
    with path.open("wb") as file:
        while written < lines:
            text = texts[random_.randrange(len(texts))]
            at = random_.randrange(len(text))
            few = text[at : at + random_.randrange(1, 9)]
            file.writelines(few)
            written += len(few)
    return written


def _of_today(text: bytes) -> bytes:
    # The samples were made on one day, at about one hour; a time more than a day old is not believed.
    now = time.gmtime(time.time() - 3600)
    found = re.search(rb"(20\d\d)-(\d\d)-(\d\d)", text)
    if found:
        text = text.replace(found[0], time.strftime("%Y-%m-%d", now).encode())
    text = re.sub(rb"\b\d\d-\d\d (?=\d\d:\d\d:\d\d \[)", time.strftime("%m-%d ", now).encode(), text)
    return re.sub(rb"([ T])\d\d(?=:\d\d:\d\d)", rb"\g<1>" + time.strftime("%H", now).encode(), text)


def measure_agent(root: Path, corpus: Path, lines: int) -> dict[str, float]:
    """Our real agent on a spool with the corpus in a writer's `out`."""
    root.mkdir(mode=0o700)
    run = layout.open_run(root, "bench")
    folder = WriterFolder.create(run, files=("out", "err"), facts={"role": "rollout", "rank": 0})
    with corpus.open("rb") as source:
        while data := source.read(1 << 22):
            os.write(folder.fds["out"], data)
    with Sink(root / "sink") as sink:
        token.write(run, Shipping(f"http://127.0.0.1:{sink.port}/v1/logs", {}, compression="none"))
        command = ["taskset", "-c", "0", *start.command(library.ensure(run), run)]
        env = {**os.environ, "SKYRL_OTEL_SPOOL_MAX": "64GB"}
        return sink.measure(command, env, lines)


def measure_file_log(root: Path, corpus: Path, lines: int, otelcol: str) -> dict[str, float]:
    """The stock collector on the same file."""
    root.mkdir()
    with Sink(root / "sink") as sink:
        config = root / "config.yaml"
        config.write_text(FILE_LOG.format(path=corpus, port=sink.port, regex=_REGEX))
        env = {**os.environ, "GOMAXPROCS": "1", "TZ": "UTC"}
        command = ["taskset", "-c", "0", otelcol, "--config", f"file:{config}"]
        return sink.measure(command, env, lines)


class Sink:
    """A `benchmarks.sink` process, and what a sender that is started against it costs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        command = ["taskset", "-c", "1", sys.executable, "-m", "benchmarks.sink", str(path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def measure(self, command: list[str], env: dict[str, str], lines: int) -> dict[str, float]:
        """Run `command` until nothing new came for some seconds."""
        began = time.time()
        sender = subprocess.Popen(command, env=env, stdout=sys.stderr)
        try:
            self._wait_until_quiet(sender)
            pids = tree(sender.pid)
            took_s = sum(map(cpu_s, pids))
            rss_mb = sum(map(peak_rss_mb, pids))
        finally:
            for pid in reversed(tree(sender.pid)):
                os.kill(pid, signal.SIGKILL)
            sender.wait()
        found = self._path.stat()
        return {
            "lines_per_s": lines / took_s,
            "wall_lines_per_s": lines / (found.st_mtime - began),
            "rss_mb": rss_mb,
            "sent": found.st_size,
        }

    def _wait_until_quiet(self, sender: subprocess.Popen[bytes]) -> None:
        size, since = 0, time.monotonic()
        while time.monotonic() - since < (_QUIET_S if size else 60):
            if sender.poll() is not None:
                raise RuntimeError(f"{sender.args!r} ended with {sender.returncode}")
            time.sleep(0.2)
            now = self._path.stat().st_size
            if now != size:
                size, since = now, time.monotonic()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def tree(pid: int) -> list[int]:
    """`pid` and its descendants, parents first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in tree(int(child)))]


def cpu_s(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_mb(pid: int) -> float:
    """The most memory a process had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# -- what arrived ------------------------------------------------------------------------------------------------------


def seen(path: Path, fields: Callable[[Any, Any], tuple[Any, ...]]) -> Seen:
    """Everything in a sink, as (second, severity, pid, file and line, message)."""
    found = Seen()
    for _, body in arrivals(path):
        for resource_logs in ExportLogsServiceRequest.FromString(body).resource_logs:
            for scope_logs in resource_logs.scope_logs:
                for record in scope_logs.log_records:
                    if not record.event_name:
                        found.add(fields(record, {kv.key: kv.value for kv in record.attributes}))
    return found


def our_fields(record: Any, attributes: Any) -> tuple[Any, ...]:
    """A record of ours."""
    place = f"{attributes['code.file.path'].string_value}:{attributes['code.line.number'].int_value}"
    second, pid = record.time_unix_nano // 1_000_000_000, attributes["process.pid"].int_value
    return second, record.severity_number, pid, place, record.body.string_value


def peer_fields(record: Any, attributes: Any) -> tuple[Any, ...]:
    """A record of the stock collector's."""
    second, pid = record.time_unix_nano // 1_000_000_000, int(attributes["pid"].string_value)
    place, message = attributes["logger"].string_value, attributes["message"].string_value
    return second, record.severity_number, pid, place, message
