"""Makes the samples: real programs log, and say beside it what they logged.

`python make.py NAME` with NAME's program installed writes `NAME-VERSION.log` and `NAME-VERSION.jsonl`. A line of the
latter is what a program meant by one event: severity, logger, message, when, and the exception's type if there was one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
os.environ["TZ"] = "UTC"
time.tzset()
NUMBERS = {"debug": 5, "info": 9, "success": 10, "warning": 13, "error": 17, "critical": 21}
TEXTS = (
    ("debug", "loading shard 1 of 3"),
    ("info", "init engine took 4.87 s: {'a': 1}"),
    ("info", "Avg prompt throughput: 0.0 tokens/s, Running: 0 reqs - idle | ok"),
    ("warning", "écart de 3 ms [retry]"),
    ("error", "request failed: code=500"),
    ("info", "after the error"),
    ("critical", "no GPU left"),
)
EXPECTED: list[dict[str, Any]] = []


def expect(level: str | int, message: str, logger: str = "", **more: Any) -> None:
    """Say what is about to be logged."""
    number = NUMBERS[level] if isinstance(level, str) else level
    EXPECTED.append({"severity": number, "logger": logger, "message": message, "time": time.time(), **more})


def say(log: Any, logger: str) -> None:
    """The texts, then an exception with a cause."""
    for level, text in TEXTS:
        expect(level, text, logger)
        getattr(log, level)(text)
    try:
        try:
            {}["missing"]
        except KeyError as error:
            raise RuntimeError("step 7 failed") from error
    except RuntimeError:
        expect("error", "training stopped", logger, exception="RuntimeError")
        log.exception("training stopped")
    expect("info", "last", logger)
    log.info("last")


def stdlib(layout: str | None, handler: logging.Handler | None = None) -> None:
    handler = handler or logging.StreamHandler()
    handler.setFormatter(logging.Formatter(layout or logging.BASIC_FORMAT)) if layout != "" else None
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    say(logging.getLogger("my_app.train"), "my_app.train" if "%(name)" in (layout or "%(name)") else "")


def make_loguru() -> None:
    from loguru import logger

    say(logger, "__main__")
    expect("success", "saved", "__main__")
    logger.success("saved")


def make_colour() -> None:
    """loguru as SkyRL sets it up: colours forced."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, colorize=True)
    say(logger, "__main__")


def make_structlog() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    for level, text in TEXTS:
        expect(level, text)
        getattr(structlog.get_logger(), level)(text)


def make_structlog_json() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    for level, text in TEXTS:
        expect(level, text)
        getattr(structlog.get_logger(), level)(text, step=7)


def make_python_json_logger() -> None:
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    for level, text in TEXTS:
        expect(level, text, "my_app.train")
        getattr(logging.getLogger("my_app.train"), level)(text)


def make_absl() -> None:
    from absl import logging as absl

    absl.use_absl_handler()
    absl.set_verbosity(absl.INFO)
    expect("warning", "Logging before flag parsing goes to stderr.")
    for level, text in TEXTS:
        if level in ("info", "warning", "error"):
            expect(level, text, "glog")
            getattr(absl, level)(text)


def make_uvicorn() -> None:
    from uvicorn.logging import DefaultFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(DefaultFormatter("%(levelprefix)s %(message)s", use_colors=False))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    say(logging.getLogger("uvicorn.error"), "")


def make_ray() -> None:
    from ray._private import ray_constants

    stdlib(ray_constants.LOGGER_FORMAT)
    for record in EXPECTED:
        record["logger"] = "ray"


def make_torch() -> None:
    """c10's C++ warnings and torch's own Python loggers."""
    import torch

    os.environ["TORCH_CPP_LOG_LEVEL"] = "INFO"
    expect("warning", "triton not found; flop counting will not work for triton kernels", "glog")
    import torch._logging
    import torch.distributed.elastic.utils.logging
    import torch.utils.flop_counter

    assert torch.__version__


def make_warnings() -> None:
    for text in ("first", "second: with colon"):
        expect("warning", f"FutureWarning: {text}\n  warnings.warn(text, FutureWarning, stacklevel=1)", "py.warnings")
        warnings.warn(text, FutureWarning, stacklevel=1)


def make_traceback() -> None:
    """What the interpreter prints of an exception that nobody caught: chained, and a group."""
    programs = {
        "ValueError": "try:\n    {}['x']\nexcept KeyError:\n    raise ValueError('second')",
        "ExceptionGroup": "raise ExceptionGroup('both', [KeyError('a'), OSError(2, 'b')])",
        "AssertionError": "def f(n):\n    assert n\n    f(n - 1)\nf(40)",
        "SyntaxError": "exec('a b')",
    }
    for kind, program in programs.items():
        done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
        expect("error", done.stderr.rstrip("\n"), exception=kind)
        os.write(2, done.stderr.encode())
        print("between", file=sys.stderr, flush=True)
        expect(0, "between")


def make_faulthandler() -> None:
    for program in ("ctypes.string_at(0)", "os.abort()"):
        code = f"import ctypes, faulthandler, os; faulthandler.enable(); {program}"
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
        expect("critical", done.stderr.rstrip("\n"))
        os.write(2, done.stderr.encode())
        print("between", file=sys.stderr, flush=True)
        expect(0, "between")


def make_pretty() -> None:
    """A printed configuration."""
    text = json.dumps({"model": {"layers": [1, 2]}, "lr": 0.1}, indent=2)
    print(text, file=sys.stderr)
    expect(0, text)
    print("trainer:", file=sys.stderr)
    print("  gpus: 8\n  nodes:\n    - a\ndone", file=sys.stderr)
    expect(0, "trainer:\n  gpus: 8\n  nodes:\n    - a")
    expect(0, "done")


def python_version() -> str:
    return platform.python_version()


NAMES: dict[str, tuple[Callable[[], None], str]] = {
    "loguru": (make_loguru, "loguru"),
    "loguru-colour": (make_colour, "loguru"),
    "structlog": (make_structlog, "structlog"),
    "structlog-json": (make_structlog_json, "structlog"),
    "python-json-logger": (make_python_json_logger, "python-json-logger"),
    "absl": (make_absl, "absl-py"),
    "uvicorn": (make_uvicorn, "uvicorn"),
    "ray": (make_ray, "ray"),
    "basic": (lambda: stdlib(None), ""),
    "asctime": (lambda: stdlib("%(asctime)s - %(name)s - %(levelname)s - %(message)s"), ""),
    "asctime-level": (lambda: stdlib("%(asctime)s %(levelname)s %(name)s: %(message)s"), ""),
    "asctime-bracket": (lambda: stdlib("%(asctime)s [%(levelname)s] %(message)s"), ""),
    "warnings": (make_warnings, ""),
    "traceback": (make_traceback, ""),
    "faulthandler": (make_faulthandler, ""),
    "pretty": (make_pretty, ""),
}


@contextlib.contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        keep = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(keep, 2)


def main(name: str) -> None:
    make, package = NAMES[name]
    version = importlib.metadata.version(package) if package else f"python-{python_version()}"
    faulthandler.disable()
    path = HERE / f"{name}-{version}.log"
    with stderr_in(path):
        make()
    text = path.read_text("utf-8")
    for place, instead in ((str(HERE), "/srv/job"), (sys.base_prefix, "/opt/python"), (sys.prefix, "/opt/venv")):
        text = text.replace(place, instead)
        for record in EXPECTED:
            record["message"] = record["message"].replace(place, instead)
    path.write_text(text, "utf-8")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in EXPECTED)
    path.with_suffix(".jsonl").write_text(lines, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
