"""Ray: the hook that runs in every worker of a job, and the wrapper round `ray.init` that puts it there.

`setup_worker` is named in jobs by its import path, so this module must stay importable in a bare worker: nothing is
imported before a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def runtime_env(base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A Ray runtime environment that records the job's workers: ``ray.init(runtime_env=skyrl_otel.runtime_env())``.

    Args:
        base: the job's own runtime environment. Everything in it is kept; its setup hook runs after ours.

    Returns:
        A new dict. It holds no secret: Ray writes runtime environments to logs that everybody can read.
    """
    from skyrl_otel.integrations.ray import driver

    return driver.runtime_env(base)


def wrap_init() -> None:
    """Wrap `ray.init` in this process, once: whatever job it starts is recorded. `ray://` and nested calls are left alone."""
    from skyrl_otel.integrations.ray import driver

    driver.wrap_init()


def setup_worker() -> None:
    """Ray's `worker_process_setup_hook`. Never raises on our account; the job's own hook runs after it, as without us."""
    try:
        from skyrl_otel.integrations.ray import worker

        worker.start()
    except Exception:
        if os.environ.get("SKYRL_OTEL_RAISE"):
            raise
    user_hook = os.environ.get("SKYRL_OTEL_USER_HOOK")
    if user_hook:
        _run_user_hook(user_hook)


def _run_user_hook(key: str) -> None:
    # What Ray would have done with it: the end of ray/_private/workers/default_worker.py.
    import ray._private.worker as ray_worker
    from ray._private.runtime_env.setup_hook import load_and_execute_setup_hook

    error = load_and_execute_setup_hook(key)
    if error is not None:
        ray_worker.global_worker.core_worker.drain_and_exit_worker("system", error)


def attach_worker(stated: Mapping[str, Any]) -> None:
    """`attach()` called inside a Ray worker that has no hook of ours."""
    from skyrl_otel.integrations.ray import worker

    worker.attach(stated)
