from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.collector_process import CollectorProcess


@pytest.fixture
def collector(spool_root: Path, tmp_path: Path) -> Iterator[CollectorProcess]:
    """A collector that is not started yet; killed at the end."""
    process = CollectorProcess(spool_root, tmp_path / "logs")
    yield process
    process.close()
