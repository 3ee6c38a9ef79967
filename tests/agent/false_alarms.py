"""What the redaction rules would mask in files of real output: `python -m tests.agent.false_alarms FOLDER…`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from skyrl_otel.agent.redact import Redactor

_NAMES = ("*.log", "*.out", "*.err", "out", "err", "*.txt")


def files(folders: list[str]) -> Iterator[Path]:
    for folder in folders:
        for parent, _, names in os.walk(folder):  # what vanishes meanwhile is passed over
            for name in names:
                if any(fnmatch(name, wanted) for wanted in _NAMES):
                    yield Path(parent, name)


def main() -> None:
    redactor = Redactor()
    total = 0
    for path in files(sys.argv[1:]):
        try:
            data = path.read_bytes().replace(b"\0", b"")
        except OSError:
            continue
        total += len(data)
        for line in data.splitlines():
            masked = redactor.text(line)
            if masked != line:
                print(f"{path}: {masked[:200].decode(errors='replace')}")
    print(f"{total / 1e6:.0f} MB, {sum(redactor.hits.values())} matches {dict(redactor.hits)}")


if __name__ == "__main__":
    main()
