"""Stores for tests of the readers, made by the collector's own code from real requests."""

import os
from collections.abc import Iterable
from pathlib import Path

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from skyrl_otel.collector.committer import Committer
from skyrl_otel.collector.decode import decode
from skyrl_otel.collector.store import Store
from skyrl_otel.collector.text import TextFile
from skyrl_otel.collector.texts import Texts


class LiveStore:
    """A store that a collector in this process keeps open, as one does during a run."""

    def __init__(self, path: Path, run_id: str = "run-1") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._store = Store(path, run_id=run_id)
        self._texts = {name: TextFile(path.parent / f"{name}.log", 0) for name in ("infra", "progress")}
        self._committer = Committer(self._store, Texts(self._texts, path.parent, {}), max_bytes=1 << 40, say=print)
        self._committer.start()

    def add(self, *requests: ExportLogsServiceRequest) -> None:
        for request in requests:
            batch = decode(request.SerializeToString(), low_water={}, now_unix_nano=1)
            self._committer.submit(batch).result(30)

    def close(self, copy_to: Path | None = None) -> None:
        self._committer.stop(30)
        for text in self._texts.values():
            text.close()
        if copy_to is not None:
            self._store.copy(copy_to)
        self._store.close()


def make_store(path: Path, requests: Iterable[ExportLogsServiceRequest], run_id: str = "run-1") -> Path:
    """A finished store."""
    os.makedirs(path.parent, mode=0o700, exist_ok=True)
    store = LiveStore(path, run_id)
    store.add(*requests)
    store.close()
    return path
