"""What each process of the vLLM job says: tokens that nobody else says, each noted in a ledger with the file it belongs to.

Imported by the job's own processes and, as a plugin of vLLM and as its worker's extension, by the engine's children.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import sys
import uuid

VLLM, SKYRL, REST = "vllm.log", "skyrl.log", "rest.log"

PRINTED = ("print", "write", "puts", "c10")


def say(producer: str, file: str, *hows: str) -> None:
    """Say one token in each way: by name of `PRINTED`, or `log:LOGGER`, or `loguru:LOGGER`."""
    for how in hows:
        token = f"tok-{uuid.uuid4().hex}"
        _note({"token": token, "file": file, "producer": producer, "how": how, "pid": os.getpid()})
        text = f"{token} of {producer} by {how}"
        way, _, logger = how.partition(":")
        if way == "print":
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        elif way == "write":
            os.write(2, f"{text}\n".encode())
        elif way == "puts":
            libc = ctypes.CDLL(None)
            libc.puts(text.encode())
            libc.fflush(None)
        elif way == "c10":  # as torch's C++ warns: a format that is known, and names no logger
            os.write(2, f"[W1124 06:30:00.123456789 socket.cpp:755] {text} (function operator())\n".encode())
        elif way == "log":
            logging.getLogger(logger).warning("%s", text)
        else:
            from loguru import logger as loguru

            loguru.bind(stdlib_logger=logger).info(text)


def _note(entry: dict[str, object]) -> None:
    descriptor = os.open(os.environ["SPEAKERS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, json.dumps(entry).encode() + b"\n")
    os.close(descriptor)


def plugin() -> None:
    """A ``vllm.general_plugins`` entry point: vLLM calls it once in each of its processes."""
    if "vllm.model_executor.models.registry" in sys.orig_argv:
        return  # a helper whose output vLLM reads itself
    name = multiprocessing.current_process().name
    say(f"plugin in {name}", VLLM, "print", "write", "puts", "c10", "log:vllm.plugin")


class Extension:
    """A ``worker_extension_cls``."""

    def speak(self) -> None:
        say(f"worker extension in {multiprocessing.current_process().name}", VLLM, *PRINTED, "log:vllm.extension")


class AsJson(logging.Formatter):
    """For the file in which vLLM keeps its own log."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "pid": record.process,
            "time_unix_nano": int(record.created * 1e9),
            "logger": record.name,
            "level": record.levelname,
            "message": record.getMessage(),
            "exception": bool(record.exc_info),
        }
        return json.dumps(fields)
