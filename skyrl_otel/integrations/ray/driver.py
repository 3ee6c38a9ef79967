"""The driver's side: `ray.init` wrapped, so that a job carries our hook, and what is done once it has a cluster."""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from skyrl_otel.capture import attach, guard, identity, runtime
from skyrl_otel.capture.postimport import after_import
from skyrl_otel.config import VARIABLES, Config
from skyrl_otel.integrations import progress
from skyrl_otel.integrations.ray import kv, merge, node, overrides, packaging, printing
from skyrl_otel.spool import library, token
from skyrl_otel.spool.layout import RunDir, replace_file

# ray/_private/ray_constants.py, not exported there under every version.
_JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Settings a worker needs too. The endpoint travels by the KV, since a URL may hold a password.
_PASSED_ON = frozenset(
    {
        "allow_tmpfs",
        "capture",
        "dump_infra",
        "levels",
        "log_level",
        "project",
        "raise_errors",
        "resource_attributes",
        "run_id",
        "service_name",
        "spool_max_bytes",
        "spool_root",
    }
)
# What a cluster that is started here must not see: Ray copies the driver's environment into every worker.
_HIDDEN = frozenset({"launched", "terminal_fd"})
# How often the driver looks on which nodes it has workers, and how long each of its last two words to the cluster may take.
_LOOK_S, _LAST_S = 10.0, 0.05
_served: set[str] = set()
_ended_jobs: set[str] = set()
_HIDDEN_NAMES = tuple(name for v in VARIABLES if v.secret or v.field in _HIDDEN for name in v.names)


def runtime_env(base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """See `skyrl_otel.runtime_env`."""
    env = dict(base or {})
    with guard.guarded("ray.runtime_env"):
        after_import("ray", lambda _: wrap_init())
        addition = _addition(Config.from_env())
        running = runtime.current()
        if running is not None:
            running.watch.add("ray.init", _Unwrapped(), 1.0)
        if addition is not None:
            try:
                env = merge.merged(env, addition)
            except merge.CannotMerge as reason:
                guard.say(f"workers of this job are not recorded: {reason}")
    return env


@guard.never_raises
def wrap_init() -> None:
    """See `skyrl_otel.integrations.ray.wrap_init`."""
    import ray
    import ray._private.worker as ray_worker

    if hasattr(ray.init, "__skyrl_otel__"):
        return
    original = ray.init

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> Any:
        prepared = _prepare(ray, args, kwargs)
        if prepared is None:
            return original(*args, **kwargs)
        whole = packaging.uploaded_whole(str(prepared.run.lib / "skyrl_otel"))
        with _shielded("ray.environment", _environment(prepared)), _shielded("ray.upload", whole):
            context = original(*args, **prepared.kwargs)
        with guard.guarded("ray.after_init"):
            _after_init(prepared.run)
        return context

    init.__skyrl_otel__ = True  # type: ignore[attr-defined]
    ray.init = init
    ray_worker.init = init
    _wrap_shutdown(ray, ray_worker)
    printing.count_submissions()
    overrides.install()


def _wrap_shutdown(ray: Any, ray_worker: Any) -> None:
    """Note when the driver begins to end its cluster: workers that end from then on did not fail."""
    original = ray.shutdown

    @functools.wraps(original)
    def shutdown(*args: Any, **kwargs: Any) -> Any:
        _note_shutdown()
        return original(*args, **kwargs)

    ray.shutdown = shutdown
    ray_worker.shutdown = shutdown
    atexit.register(_note_shutdown)  # runs before what Ray registered for itself when it was imported


@guard.never_raises
def _note_shutdown() -> None:
    running = runtime.current()
    if running is None or "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return
    from ray.exceptions import RpcError

    replace_file(running.run.path / "shutdown", str(time.time_ns()).encode())
    with suppress(RpcError):  # a GCS that is gone or slow: it will not hold the driver up
        _take_leave(running)


def _take_leave(running: runtime.Runtime) -> None:
    """Leave the launcher a last list of nodes, and take the receiver's address and secret out of the cluster, which may live
    for months. Nobody needs them from here on: each node with workers has a token, and no other will get one, for Ray ends a
    job's workers with its driver. Raises RpcError."""
    import ray._private.worker as ray_worker

    job_id = ray_worker.global_worker.current_job_id.hex()
    _ended_jobs.add(job_id)
    if not _note_nodes(running, _LAST_S).outlives:
        kv.forget(running.run.run_id, job_id, _LAST_S)


def _note_nodes(running: runtime.Runtime, timeout_s: float) -> kv.Job:
    """Leave the launcher a list of the nodes on which this job has had workers: it waits for their agents at the end.

    Raises RpcError.
    """
    import ray._private.worker as ray_worker

    found = kv.look(running.run.run_id, ray_worker.global_worker.current_job_id.hex(), timeout_s)
    if found.nodes:
        replace_file(running.run.path / "nodes", json.dumps(found.nodes).encode())
    return found


class _NodesTask:
    """A task: keep that list up to date while the job runs, for a driver that ends without a word."""

    def __init__(self, running: runtime.Runtime) -> None:
        self._running = running

    def __call__(self) -> float | None:
        import ray._private.worker as ray_worker
        from ray.exceptions import RpcError

        if not ray_worker.global_worker.connected:
            return None
        with suppress(RpcError):
            _note_nodes(self._running, _LOOK_S)
        return _LOOK_S


class _Prepared:
    """What one call of `ray.init` is going to be made with."""

    def __init__(self, run: RunDir, kwargs: dict[str, Any], job_config: str | None) -> None:
        self.run = run
        self.kwargs = kwargs
        self.job_config = job_config


@guard.never_raises
def _prepare(ray: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Prepared | None:
    """The arguments with our part in them, or None where the call is to be made as it is."""
    config = Config.from_env()
    if config.disabled or config.capture == "off" or ray.is_initialized():
        return None
    address = args[0] if args else kwargs.get("address")
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if isinstance(address, str) and "://" in address:
        guard.say(
            f"{address.partition('://')[0]}:// is Ray Client, whose workers cannot be recorded from here; "
            "run the program on the cluster, for example with `ray job submit`"
        )
        return None
    addition = _addition(config)
    if addition is None:
        return None
    running = runtime.current()
    assert running is not None  # _addition started it
    prepared = dict(kwargs)
    job_config = os.environ.get(_JOB_CONFIG_VARIABLE)
    given = kwargs.get("runtime_env")
    try:
        if job_config is not None:
            override = os.environ.get("RAY_OVERRIDE_JOB_RUNTIME_ENV") == "1"
            job_config, own = merge.merged_into_job(job_config, given, addition, override=override)
            if own is not None:
                prepared["runtime_env"] = own
        else:
            # Ray takes the argument in place of what job_config says; so does the merge.
            given = given or getattr(kwargs.get("job_config"), "runtime_env", None)
            prepared["runtime_env"] = merge.merged(given, addition)
    except merge.CannotMerge as reason:
        guard.say(f"workers of this job are not recorded: {reason}")
        return None
    return _Prepared(running.run, prepared, job_config)


def _addition(config: Config) -> merge.Addition | None:
    run_id = identity.run_id(config)
    running = runtime.start(config, run_id)
    if running is None:
        return None
    os.environ["SKYRL_OTEL_RUN_ID"] = running.run.run_id
    passed = {
        name: os.environ[name]
        for variable in VARIABLES
        if variable.field in _PASSED_ON and not variable.secret
        for name in variable.names
        if os.environ.get(name)
    }
    globs = _progress_globs(config)
    if globs:
        passed["SKYRL_OTEL_PROGRESS"] = ",".join(globs)
    return merge.Addition(str(library.keep(running.run) / "skyrl_otel"), passed)


def _progress_globs(config: Config) -> tuple[str, ...]:
    """The user's globs, and those of the framework in use; empty where nobody knows what is progress."""
    framework = progress.framework_of(sys.modules)
    return (*config.progress, *(framework.progress if framework else ()))


@contextmanager
def _environment(prepared: _Prepared) -> Iterator[None]:
    """Hide secrets and the launcher's injection while a cluster may start, and put everything back."""
    changed: dict[str, str | None] = {name: os.environ.get(name) for name in _HIDDEN_NAMES}
    for name in _HIDDEN_NAMES:
        os.environ.pop(name, None)
    path = os.environ.get("PYTHONPATH")
    injected = str(prepared.run.lib)
    if path is not None and injected in path.split(os.pathsep):
        changed["PYTHONPATH"] = path
        rest = [entry for entry in path.split(os.pathsep) if entry != injected]
        if rest:
            os.environ["PYTHONPATH"] = os.pathsep.join(rest)
        else:
            del os.environ["PYTHONPATH"]
    if prepared.job_config is not None:
        changed[_JOB_CONFIG_VARIABLE] = os.environ.get(_JOB_CONFIG_VARIABLE)
        os.environ[_JOB_CONFIG_VARIABLE] = prepared.job_config
    try:
        yield
    finally:
        for name, value in changed.items():
            if value is not None:
                os.environ[name] = value


@contextmanager
def _shielded(place: str, ours: AbstractContextManager[None]) -> Iterator[None]:
    """`ours` round a call of the host's: what fails in it at either end, in another version of Ray say, stays here."""
    entered = False
    with guard.guarded(place):
        ours.__enter__()
        entered = True
    try:
        yield
    finally:
        if entered:
            with guard.guarded(place):
                ours.__exit__(None, None, None)


def _after_init(run: RunDir) -> None:
    """What a connected driver does for its run. Once per connection."""
    running = runtime.current()
    if running is None:
        return
    import ray._private.worker as ray_worker

    _served.add(run.run_id)
    if running.config.launched:
        attach.take_records()  # also of a driver that has logged nothing yet: its folder says which job it is
    own_session = bool(getattr(ray_worker._global_node, "head", False))
    config = running.config
    worker = ray_worker.global_worker
    job_id = worker.current_job_id.hex()
    with guard.guarded("ray.publish"):
        running.publish({"job_id": job_id, "node_id": str(worker.node.node_id)})
    if not _put_shipping(running.run, config, job_id):
        running.watch.add("shipping", lambda: None if _put_shipping(running.run, config, job_id) else 0.5, 0.2)
    overrides.may_ask()
    printing.install(running, _progress_globs(config))
    session = ray_worker._global_node.get_session_dir_path()
    files = node.SessionFiles(running.run, session, job_id, from_start=own_session, facts=node.facts(worker))
    files.start(running.watch)
    running.watch.add("agent", running.ensure_agent)
    running.watch.add("nodes", _NodesTask(running), _LOOK_S)


class _Unwrapped:
    """A task: a program that took `ray.init` before we wrapped it (``from ray import init``) is noticed a little later."""

    def __init__(self) -> None:
        self._tries = 0

    def __call__(self) -> float | None:
        ray = sys.modules.get("ray")
        running = runtime.current()
        self._tries += 1
        if running is None or _served or self._tries > 3600:
            return None
        if ray is None or not hasattr(ray, "is_initialized") or not ray.is_initialized():
            return 0.5 if self._tries < 600 else 5.0
        _after_init(running.run)
        return None


def _put_shipping(run: RunDir, config: Config, job_id: str) -> bool:
    """Hand the receiver's address and secret to the cluster's KV; false while they are not known yet."""
    if job_id in _ended_jobs:
        return True
    shipping = token.read(run) or token.from_config(config)
    return shipping is not None and kv.put_shipping(run.run_id, job_id, shipping)
