"""The agent's throughput with the redaction rules and without: reading, assembling, encoding, over what vLLM and SkyRL print.

Both in one process, in alternated rounds, over the same files; the requests are built and not sent.
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.writer import Writer
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import Records
from skyrl_otel.capture.taker import make_take
from skyrl_otel.spool.layout import open_run
from skyrl_otel.spool.writer import WriterFolder

_FILE_BYTES = 24 << 20


def run(quick: bool) -> dict[str, object]:
    """Measure; `quick` takes fewer rounds."""
    rounds = 3 if quick else 15
    folder = Path(tempfile.mkdtemp(prefix="sk-redact-", dir="/var/tmp"))
    try:
        text, records = _text_writer(folder), _records_writer(folder)
        result: dict[str, object] = {}
        for name, writer in (("text", text), ("records", records)):
            took: dict[str, list[float]] = {"on": [], "off": []}
            size = 0
            for number in range(rounds):
                for kind in ("on", "off") if number % 2 else ("off", "on"):
                    began = time.thread_time()
                    size = _read(writer, Redactor() if kind == "on" else Redactor(()))
                    took[kind].append(time.thread_time() - began)
            on, off = median(took["on"]), median(took["off"])
            result[f"{name}_ratio"] = round(off / on, 3)
            result[f"{name}_on_mb_s"] = round(size / on / 1e6, 1)
            result[f"{name}_off_mb_s"] = round(size / off / 1e6, 1)
        ratios = [float(str(result["text_ratio"])), float(str(result["records_ratio"]))]
        return {"ratio_to_off": min(ratios), **result, "rounds": rounds}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _text_writer(root: Path) -> WriterFolder:
    chance = random.Random(1)
    folder = WriterFolder.create(open_run(root, "text"), facts={"role": "rollout", "channel": "infra"})
    lines = []
    for number in range(_FILE_BYTES // 150):
        kind = chance.random()
        if kind < 0.8:
            lines.append(
                f"(EngineCore pid=28789) INFO 11-21 14:{number // 60 % 60:02d}:{number % 60:02d} [loggers.py:{number % 500}] "
                f"Engine 000: Avg prompt throughput: {chance.random() * 9000:.1f} tokens/s, Running: {number % 256} reqs\n"
            )
        elif kind < 0.95:
            lines.append(
                f"2026-11-21 14:36:10.{number % 1000:03d} | INFO | skyrl.trainer:train:{number} - step {number}\n"
            )
        else:
            lines.append(f"Fetching https://huggingface.co/meta-llama/task-{number} (user@node-7) disk-usage 12%\n")
    data = "".join(lines).encode()
    with open(folder.path / "out", "ab") as file:
        file.write(data)
    return folder


def _records_writer(root: Path) -> WriterFolder:
    folder = WriterFolder.create(open_run(root, "records"), facts={"role": "rollout", "channel": "infra"})
    records = Records(lambda: None)
    records.use(folder)
    take = make_take(records, Levels({}))
    for number in range(60_000):
        record = logging.LogRecord(
            f"vllm.v1.engine{number % 7}", 20, "/site-packages/vllm/v1/engine/core.py", number % 900,
            "step %d throughput %.1f tokens/s", (number, number * 1.5), None, "run",
        )  # fmt: skip
        take(record)
    return folder


def _read(folder: WriterFolder, redactor: Redactor) -> int:
    """Bytes read. The journal is thrown away afterwards, and nothing is acknowledged."""
    agent = Writer("bench", folder.writer_id, folder.path, redactor=redactor)
    now = time.time_ns()
    agent.observe(now)
    size = 0
    while batch := build([agent]):
        size += sum(move.size for move in batch.moves)
        batch.accept()
    agent.close()
    (folder.path / "decisions").unlink()
    return size
