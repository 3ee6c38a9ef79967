"""Our package on its way into the cluster: all of it, whatever the user excludes from theirs, and without a word.

Ray applies the job's `excludes` to every `py_modules` folder. A pattern like ``agent`` would take part of ours out, and an
actor whose hook cannot be imported is ended.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from skyrl_otel.capture import guard

# ray.init passes its own logger to ray/_private/runtime_env/packaging.py, which uses it for one part and its own for another.
_LOGGERS = ("ray._private.worker", "ray._private.runtime_env.packaging")


@contextmanager
def uploaded_whole(folder: str) -> Iterator[None]:
    """While `ray.init` runs: `folder`, one of its `py_modules`, is uploaded whole and not spoken of."""
    import ray._private.worker as ray_worker

    lines = _UploadLines(folder)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(lines)
    original = getattr(ray_worker, "upload_py_modules_if_needed", None)
    if original is not None:
        ray_worker.upload_py_modules_if_needed = _wrapped(original, folder)
    try:
        yield
    finally:
        if original is not None:
            ray_worker.upload_py_modules_if_needed = original
        for logger in loggers:
            logger.removeFilter(lines)


def _wrapped(original: Any, folder: str) -> Any:
    @functools.wraps(original)
    def upload(runtime_env: Any, *args: Any, **kwargs: Any) -> Any:
        modules = runtime_env.get("py_modules") or []
        if runtime_env.get("excludes") and folder in modules:
            with guard.guarded("ray.upload"):
                [uri] = original({"py_modules": [folder]}, *args, **kwargs)["py_modules"]
                runtime_env["py_modules"] = [uri if module == folder else module for module in modules]
        return original(runtime_env, *args, **kwargs)

    return upload


class _UploadLines(logging.Filter):
    """Drops what Ray says about uploading our package: "Creating …", "Pushing …", "Successfully pushed …"."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder
        self._ours = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.filename != "packaging.py" or record.levelno > logging.INFO:
            return True
        message = record.getMessage()
        if message.startswith("Creating "):
            self._ours = self._folder in message
        return not self._ours
