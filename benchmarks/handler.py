"""What a record of `logging` costs its process: ours next to a formatted file, loguru's file sink, and OpenTelemetry's SDK.

All in one process, in alternated rounds, on the same disk, to loggers that nothing else listens to. `own_us` is what ours
adds to a record that a NullHandler takes; the agent reads behind it meanwhile. `write_us` is what of that is the kernel's: the
bare write(2) of a frame of the same size, to a file that nobody reads.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.fd import RECEIVER

ROOT = Path(__file__).resolve().parent.parent
_CALLS = 2000


def run(quick: bool) -> dict[str, object]:
    """Measure in a child process; `quick` takes fewer rounds."""
    with tempfile.TemporaryDirectory(prefix="sk-handler-", dir="/var/tmp", ignore_cleanup_errors=True) as root:
        receiver = subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True)
        try:
            assert receiver.stdout is not None
            env = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SKYRL_OTEL_RUN_ID": "bench",
                "SKYRL_OTEL_SPOOL_DIR": root,
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.stdout.readline().strip()}",
            }
            os.chmod(root, 0o700)
            command = [sys.executable, "-m", "benchmarks.handler", "8" if quick else "60", root]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
            return result
        finally:
            receiver.kill()
            receiver.wait()


def _logger(name: str, handler: logging.Handler) -> logging.Logger:
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return logger


def _sdk_handler() -> logging.Handler:
    import warnings

    warnings.simplefilter("ignore")
    from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult

    class Null(LogRecordExporter):
        def export(self, batch: Any) -> Any:
            return LogRecordExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

        def force_flush(self, timeout_millis: int = 0) -> bool:
            return True

    provider = LoggerProvider()
    provider.add_log_record_processor(BatchLogRecordProcessor(Null()))
    handler: logging.Handler = LoggingHandler(level=logging.NOTSET, logger_provider=provider)
    return handler


def child(rounds: int, root: Path) -> dict[str, object]:
    """What the child measures."""
    from loguru import logger as loguru

    from skyrl_otel import attach, detach
    from skyrl_otel.capture import runtime, takeover

    file = logging.FileHandler(root / "plain.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(filename)s:%(lineno)d %(message)s"))
    silent = _logger("bench.null", logging.NullHandler())
    filed = _logger("bench.file", file)
    sdk = _logger("bench.sdk", _sdk_handler())
    loguru.remove()
    loguru.add(root / "loguru.log")
    attach(channel="infra")
    running = runtime.current()
    assert running is not None and running.recording.records.fd >= 0, "recording did not start"
    recording = running.recording
    before = recording.records.size_bytes
    silent.info("step %d loss %.4f", _CALLS // 2, 0.25)
    frame = b"x" * (recording.records.size_bytes - before)

    def through(log: logging.Logger, extra: dict[str, Any] | None) -> Callable[[], None]:
        def calls() -> None:
            for number in range(_CALLS):
                log.info("step %d loss %.4f", number, 0.25, extra=extra)

        return calls

    def through_loguru() -> None:
        for number in range(_CALLS):
            loguru.info("step {} loss {:.4f}", number, 0.25)

    bare = os.open(root / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        for _ in range(_CALLS):
            os.write(bare, frame)

    extra = {"step": 7, "phase": "rollout"}
    kinds: dict[str, tuple[bool, Callable[[], None]]] = {
        "null": (False, through(silent, None)),
        "ours": (True, through(silent, None)),
        "filehandler": (False, through(filed, None)),
        "loguru_file": (False, through_loguru),
        "sdk_batch": (False, through(sdk, None)),
        "null_extra": (False, through(silent, extra)),
        "ours_extra": (True, through(silent, extra)),
        "filehandler_extra": (False, through(filed, extra)),
        "sdk_batch_extra": (False, through(sdk, extra)),
        "write": (False, write),
    }
    # The peers are measured without us: their records would be taken too.
    recording.stop()
    recording.records.use(running.folder)
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    used: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 2):
        for kind in kinds if number % 2 else reversed(kinds):
            with_us, work = kinds[kind]
            if with_us:
                takeover.install(recording.take, recording.console)
            began, busy = time.perf_counter(), time.thread_time()
            work()
            busy, spent = time.thread_time() - busy, time.perf_counter() - began
            takeover.remove()
            if number >= 2:
                took[kind].append(spent / _CALLS * 1e6)
                used[kind].append(busy / _CALLS * 1e6)
        os.truncate(root / "plain.log", 0)
        os.truncate(bare, 0)
    detach()
    us = {kind: median(values) for kind, values in took.items()}
    return {
        "ratio_to_filehandler": round(us["ours"] / us["filehandler"], 3),
        "own_us": round(us["ours"] - us["null"], 2),
        "ratio_to_filehandler_extra": round(us["ours_extra"] / us["filehandler_extra"], 3),
        "own_us_extra": round(us["ours_extra"] - us["null_extra"], 2),
        **{f"{kind}_us": round(value, 2) for kind, value in us.items()},
        # Of this thread alone: what a busy machine does not blur.
        "cpu_ratio_to_filehandler": round(median(used["ours"]) / median(used["filehandler"]), 3),
        "cpu_own_us": round(median(used["ours"]) - median(used["null"]), 2),
        "cpu_ratio_to_filehandler_extra": round(median(used["ours_extra"]) / median(used["filehandler_extra"]), 3),
        "cpu_own_us_extra": round(median(used["ours_extra"]) - median(used["null_extra"]), 2),
        "frame_bytes": len(frame),
        "calls_a_round": _CALLS,
        "load": round(os.getloadavg()[0], 2),
        "rounds": rounds,
    }


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), Path(sys.argv[2]))))
