"""Actors and tasks with a `py_modules` or a container of their own, which would start without our package.

Ray lets the fields of an actor's runtime_env replace the job's one by one. The job's hook would then name a module that is
not there, and Ray ends an actor whose hook cannot be imported. So the package is added to such a list, or the hook is taken
out for that actor.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from skyrl_otel.capture import guard

_NAME = "parse_runtime_env_for_task_or_actor"

_uris: list[str] = []
_may_ask = False


def install() -> None:
    """Look at each runtime_env that this process gives to an actor or a task."""
    import ray.actor
    import ray.remote_function

    for module in (ray.actor, ray.remote_function):
        original = getattr(module, _NAME, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(module, _NAME, _wrapped(original))


def may_ask() -> None:
    """From now on Ray may be asked for this process's runtime_env: it is a connected driver, or in its first task.

    In a worker before that the question dereferences a null pointer: `WorkerContext::GetCurrentSerializedRuntimeEnv`, seen in
    Ray 2.60.
    """
    global _may_ask
    _may_ask = True


def _package() -> str | None:
    """The URI under which the job carries our package: the last of its `py_modules`, where `merge` puts it."""
    if not _uris and _may_ask:
        import ray._private.worker as ray_worker

        if not ray_worker.global_worker.connected:
            return None
        env = json.loads(ray_worker.global_worker.runtime_env or "{}")
        modules = env.get("py_modules") or []
        if modules and env.get("worker_process_setup_hook"):
            _uris.append(str(modules[-1]))
    return _uris[0] if _uris else None


def _wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def parse(*args: Any, **kwargs: Any) -> Any:
        env = original(*args, **kwargs)
        if env:
            with guard.guarded("ray.overrides"):
                _keep_alive(env)
        return env

    return parse


def _keep_alive(env: Any) -> None:
    own_modules = env.get("py_modules") is not None
    contained = env.get("container") or env.get("image_uri")
    package = _package() if own_modules and not contained else None
    if package is not None:
        if package not in env["py_modules"]:
            env["py_modules"] = [*env["py_modules"], package]
    elif (own_modules or contained) and "worker_process_setup_hook" not in env:
        # An empty name is no hook to Ray's default_worker.py; the job's own hook, where it is a name, takes its place.
        from skyrl_otel.config import Config
        from skyrl_otel.integrations.ray import merge

        env["env_vars"] = {merge.RAY_HOOK_VARIABLE: Config.from_env().user_hook, **(env.get("env_vars") or {})}
