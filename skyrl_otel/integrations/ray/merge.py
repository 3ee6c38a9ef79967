"""Our part of a job's runtime environment, put beside the user's: functions from values to values.

Ray refuses a key that stands both in the submitted job's environment and in the driver's, and it shows both in the error.
Where it would refuse, nothing is added, so that the user sees Ray's own words about their own settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

HOOK = "skyrl_otel.integrations.ray.setup_worker"
USER_HOOK_VARIABLE = "SKYRL_OTEL_USER_HOOK"

# How Ray hands the hook to its workers (ray/_private/ray_constants.py); a submitted job's environment has it already.
RAY_HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"

# Fields that Ray takes only alone: a container has its own files, into which our package cannot be shipped.
_ALONE = ("container", "image_uri")


class Addition(NamedTuple):
    """What we add: the folder of our package, and environment variables without secrets."""

    package: str
    env_vars: Mapping[str, str]


class CombinedHook:
    """A setup hook made of ours and a callable of the user's; Ray pickles it and shows the user's name."""

    def __init__(self, user_hook: Callable[[], Any]) -> None:
        self.user_hook = user_hook
        self.__name__ = getattr(user_hook, "__name__", "setup_hook")

    def __call__(self) -> None:
        from skyrl_otel.integrations.ray import setup_worker

        setup_worker()
        self.user_hook()


class CannotMerge(Exception):
    """The runtime environment has no place for us; the message says why."""


def merged(
    base: Mapping[str, Any] | None, addition: Addition, hook_variable: str = RAY_HOOK_VARIABLE
) -> dict[str, Any]:
    """`base` with our hook, package and variables. Idempotent.

    Raises:
        CannotMerge: it runs in a container, or a field has a type that Ray itself will refuse.
    """
    env = dict(base or {})
    for field in _ALONE:
        if env.get(field):
            raise CannotMerge(f"its workers run in a container ({field}), which our package cannot be shipped to")
    variables = env.get("env_vars") or {}
    modules = env.get("py_modules") or []
    hook = env.get("worker_process_setup_hook")
    if not isinstance(variables, Mapping) or not isinstance(modules, list):
        raise CannotMerge("it is not one that Ray accepts")
    if hook is not None and not isinstance(hook, str) and not callable(hook):
        raise CannotMerge("it is not one that Ray accepts")
    variables = {**addition.env_vars, **variables}
    if hook is None:
        env["worker_process_setup_hook"] = HOOK
    elif isinstance(hook, str):
        if hook != HOOK:
            # The variable, where a submitted job has it, is what Ray runs; it may name a pickled function.
            variables[USER_HOOK_VARIABLE] = variables.get(hook_variable, hook)
            env["worker_process_setup_hook"] = HOOK
    elif not isinstance(hook, CombinedHook):
        env["worker_process_setup_hook"] = CombinedHook(hook)
    if hook_variable in variables and isinstance(env["worker_process_setup_hook"], str):
        variables[hook_variable] = HOOK
    if not any(_is_ours(module, addition.package) for module in modules):
        env["py_modules"] = [*modules, addition.package]
    env["env_vars"] = variables
    return env


def merged_into_job(
    job_config: str,
    driver: Mapping[str, Any] | None,
    addition: Addition,
    *,
    override: bool,
    hook_variable: str = RAY_HOOK_VARIABLE,
) -> tuple[str, dict[str, Any] | None]:
    """The same for a submitted job, whose environment (a JSON job config) Ray merges with the driver's.

    Args:
        job_config: the value of RAY_JOB_CONFIG_JSON_ENV_VAR.
        driver: what the driver passes to `ray.init`.
        override: RAY_OVERRIDE_JOB_RUNTIME_ENV is set: the driver's fields win over the job's.

    Returns:
        The job config and the driver's environment to use instead.

    Raises:
        CannotMerge: as `merged`, or Ray is going to refuse the two.
    """
    try:
        config = json.loads(job_config)
        job = dict(config.get("runtime_env") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise CannotMerge(f"its job config cannot be read: {error}") from None
    own = dict(driver or {})
    shared_fields = (job.keys() & own.keys()) - {"env_vars"}
    shared_variables = (job.get("env_vars") or {}).keys() & (own.get("env_vars") or {}).keys()
    if (shared_fields or shared_variables) and not override:
        raise CannotMerge("its job and its driver set the same fields")
    # As Ray will see it; then each of our fields goes to the side where the user has that field.
    together = {**job, **own, "env_vars": {**(job.get("env_vars") or {}), **(own.get("env_vars") or {})}}
    ours = merged(together, addition, hook_variable)
    for field in ("worker_process_setup_hook", "py_modules"):
        if field in ours:
            (own if field in own else job)[field] = ours[field]
    own_variables = {key: ours["env_vars"][key] for key in own.get("env_vars") or {}}
    job_variables = {key: value for key, value in ours["env_vars"].items() if key not in own_variables}
    job["env_vars"] = job_variables
    if own_variables:
        own["env_vars"] = own_variables
    config["runtime_env"] = job
    return json.dumps(config), own or None


def _is_ours(module: Any, package: str) -> bool:
    if isinstance(module, str):
        return module.rstrip("/") == package.rstrip("/") or os.path.basename(module.rstrip("/")) == "skyrl_otel"
    return getattr(module, "__name__", "") == "skyrl_otel"
