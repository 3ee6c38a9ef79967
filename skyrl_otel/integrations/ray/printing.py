"""What Ray prints in the driver of other processes' output: progress to the terminal, the rest nowhere, nothing twice.

Ray sends a worker's lines to the driver, which prints them to its own stdout; there they would be recorded a second time,
as the driver's. So they go to the launcher's descriptor that is shown and not recorded, in Ray's own format. What comes
with no file behind it (errors that Ray pushes to the driver) is recorded here.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

from skyrl_otel.capture import guard
from skyrl_otel.capture.runtime import Runtime
from skyrl_otel.capture.stream import LineStream
from skyrl_otel.integrations import progress
from skyrl_otel.integrations.ray.worker import POINTER
from skyrl_otel.spool.writer import WriterFolder

_HANDLER = "ray_print_logs"
_MOST_NAMES = 10_000

#: Names of the tasks that this driver submitted itself.
submitted: set[str] = set()


def install(running: Runtime, globs: tuple[str, ...]) -> None:
    """Take the place of Ray's printer in this process. To be called after each `ray.init`, which puts its own in."""
    import ray._private.ray_logging as ray_logging
    import ray._private.worker as ray_worker

    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    handlers: dict[str, Any] = dict(dispatcher.handlers)
    original = getattr(ray_worker.print_to_stdstream, "__wrapped__", ray_worker.print_to_stdstream)
    handler = handlers.get(_HANDLER)
    without_prefix = bool(getattr(handler, "keywords", {}).get("ignore_prefix", False))
    printer = Printer(running, globs, without_prefix)
    ray_worker.stdout_deduplicator = printer.deduplicator(ray_worker.stdout_deduplicator, is_err=False)
    ray_worker.stderr_deduplicator = printer.deduplicator(ray_worker.stderr_deduplicator, is_err=True)
    if handler is not None:  # else log_to_driver=False: the user wants nothing of it
        dispatcher.remove_handler(_HANDLER)
        dispatcher.add_handler(_HANDLER, printer.forwarded)

    # Errors that come by the GCS and not from a file: listen_error_messages calls this by its name in the module.
    @functools.wraps(original)
    def print_to_stdstream(data: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        printer.pushed(data)

    ray_worker.print_to_stdstream = print_to_stdstream


def count_submissions() -> None:
    """Note the names of the tasks this process submits: where no table knows the program, they are its progress."""
    from ray.remote_function import RemoteFunction

    original = RemoteFunction._remote

    @functools.wraps(original)
    def _remote(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(submitted) < _MOST_NAMES:  # a program may name each task by its step
            with guard.guarded("ray.submitted"):
                submitted.add(str(kwargs.get("name") or str(self._function_name).rpartition(".")[2]))
        return original(self, *args, **kwargs)

    RemoteFunction._remote = _remote


class Printer:
    """Ray's `print_to_stdstream`, with another place to print to and a choice of what."""

    def __init__(self, running: Runtime, globs: tuple[str, ...], without_prefix: bool) -> None:
        import ray._private.worker as ray_worker

        self._config = running.config
        self._run = running.run
        self._globs = globs
        self._without_prefix = without_prefix
        self._takes_prefix = "ignore_prefix" in inspect.signature(ray_worker.print_worker_logs).parameters
        self._record: WriterFolder | None = None
        known = running.facts
        self._host_facts: dict[str, Any] = {key: known[key] for key in ("host", "job_id", "node_id") if key in known}
        fd = running.config.terminal_fd
        self._terminal = None if fd is None else LineStream(fd, sys.__stdout__)

    def _sink(self, is_err: bool) -> TextIO:
        found = self._terminal or (sys.stderr if is_err else sys.stdout)
        return cast(TextIO, found)

    @guard.never_raises
    def forwarded(self, data: Mapping[str, Any]) -> None:
        """Lines of a worker or of Ray itself, from files that the nodes' agents read."""
        if self._config.show_infra or self._is_progress(data):
            lines = [line for line in data.get("lines", ()) if not line.startswith(POINTER)]
            if lines:
                self._print({**data, "lines": lines})

    @guard.never_raises
    def pushed(self, data: Mapping[str, Any]) -> None:
        """Lines that are in no file: an actor that died, too many workers. Recorded here as Ray's."""
        lines = [str(line) for line in data.get("lines", ())]
        if self._record is None:
            facts: dict[str, Any] = {
                **self._host_facts,
                "channel": "infra",
                "role": "ray",
                "service": "ray",
                "silent_end": True,
            }
            self._record = WriterFolder.create(self._run, files=("err",), facts=facts)
        os.write(self._record.fds["err"], "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        if self._config.show_infra:
            self._print(data)

    def _is_progress(self, data: Mapping[str, Any]) -> bool:
        if data.get("pid") in ("raylet", "autoscaler", "gcs_server"):
            return False
        actor, task = data.get("actor_name"), data.get("task_name")
        if actor:
            # The class's name, or what its __repr__ makes of it, which begins with that name if it says anything.
            return progress.matches(str(actor).partition("(")[0], self._globs)
        if not task:
            return False
        return progress.matches(str(task), self._globs) or (not self._globs and task in submitted)

    def _print(self, data: Mapping[str, Any]) -> None:
        import ray._private.worker as ray_worker

        is_err = bool(data.get("is_err"))
        deduplicator = ray_worker.stderr_deduplicator if is_err else ray_worker.stdout_deduplicator
        batches = [data] if data.get("pid") == "autoscaler" else deduplicator.deduplicate(dict(data))
        for batch in batches:
            self.print_batch(batch, is_err)

    def print_batch(self, batch: Mapping[str, Any], is_err: bool) -> None:
        """One batch in Ray's own format."""
        import ray._private.worker as ray_worker

        if self._takes_prefix:
            ray_worker.print_worker_logs(batch, self._sink(is_err), ignore_prefix=self._without_prefix)
        else:
            ray_worker.print_worker_logs(batch, self._sink(is_err))

    def deduplicator(self, original: Any, *, is_err: bool) -> Any:
        """Ray's deduplicator with its settings; what it still holds when Ray shuts down goes where the rest went."""
        kind = getattr(original, "__ray_type__", type(original))
        printer = self

        class Deduplicator(kind):  # type: ignore[misc, valid-type]
            __ray_type__ = kind

            def flush(self) -> list[Any]:
                with guard.guarded("ray.flush"):
                    for batch in super().flush():
                        printer.print_batch(batch, is_err)
                return []

        made = Deduplicator.__new__(Deduplicator)
        made.__dict__.update(original.__dict__)
        return made
