"""A driver that nobody launched and that has no endpoint: it starts the run's embedded collector itself."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from skyrl_otel.capture import guard
from skyrl_otel.config import Config
from skyrl_otel.spool import layout

if TYPE_CHECKING:
    from skyrl_otel.capture.runtime import Runtime

COLLECTOR_CHECK_S = 5.0


def gather(config: Config, running: Runtime) -> None:
    """Start the collector, unless somebody else is there to gather this run: we are a rank, or a worker of Ray's."""
    around = ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")
    if any(os.environ.get(name) for name in around) or is_ray_worker():
        return
    from skyrl_otel.capture import launch

    run = running.run
    with guard.guarded("runtime.collector"):
        if config.settings_file and not _can_be_read(config.settings_file):
            config = config._replace(settings_file="")
        layout.write_run_file(run, project=config.project, log_dir=str(config.log_dir), argv=sys.orig_argv)
        if launch.start_collector(run, config.log_dir, config.settings_file):
            watch = launch.CollectorWatch(run, config.log_dir, config.settings_file)
            running.watch.add("collector", watch, COLLECTOR_CHECK_S)
        else:
            guard.say(
                "the embedded collector needs aiohttp and opentelemetry-proto, which are not installed here; "
                f"lines are kept in {run.path} (pip install skyrl-otel, or set OTEL_EXPORTER_OTLP_ENDPOINT)"
            )


def _can_be_read(settings_file: str) -> bool:
    from skyrl_otel.spool import settings

    try:
        settings.read(settings_file)
    except settings.SettingsError as error:
        guard.say(f"{error}; nothing of it is used")
        return False
    return True


def is_ray_worker() -> bool:
    """Whether Ray started this process as a worker. Does not import Ray."""
    worker = sys.modules.get("ray._private.worker")
    found = getattr(worker, "global_worker", None)
    return found is not None and getattr(found, "mode", None) == getattr(worker, "WORKER_MODE", 1)
