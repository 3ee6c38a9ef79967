"""A worker's side: the setup hook, and what happens when Ray's own lines pass through our streams.

Ray prints `:actor_name:` and `:task_name:` through `sys.stdout`, from its compiled loop, so that the Python frame that
prints is `Worker.main_loop` itself. That tells Ray's lines from those that user code makes up. At that moment, on the main
thread, the actor's id and name are valid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from skyrl_otel.capture import fds, guard, identity, runtime
from skyrl_otel.capture.runtime import Runtime
from skyrl_otel.capture.stream import LineStream
from skyrl_otel.config import Config
from skyrl_otel.spool import locks
from skyrl_otel.spool.layout import RunDir, open_file

POINTER = "skyrl-otel: output of this actor is recorded"
# A raylet that was started under `skyrl-otel run` hands these on; they are about another process's terminal.
_NOT_FOR_WORKERS = ("SKYRL_OTEL_LAUNCHER", "SKYRL_OTEL_TERMINAL_FD", "SKYRL_OTEL_ECHO", "SKYRL_OTEL_CHILD_OF")
_ACTOR, _TASK, _JOB = ":actor_name:", ":task_name:", ":job_id:"

# How long the first worker on a node may wait for the cluster's key-value store, which answers in a millisecond.
_KV_S = 1.0

# How long it may wait for the agent's launcher, which is an interpreter's start: 0.05 s.
_LAUNCH_S = 1.0

# A worker's start is over by then, as a rule.
_REST_S = 0.2

# After so many changes of task a worker stops saying which one it runs: identity files must not grow without bound.
_MOST_TASK_CHANGES = 2000


@guard.never_raises
def start() -> None:
    """Our part of the hook: this worker's files are followed from their first byte, its streams become line-atomic."""
    running = _begin(Config.from_env())
    if running is not None:
        running.install_streams(Markers(running))
        _follow_streams(running)
        _open_node(running)


@guard.never_raises
def attach(stated: Mapping[str, Any]) -> None:
    """`attach()` in a worker: as the hook, and if this is an actor, as its marker."""
    config = Config.from_env()
    running = _begin(config)
    if running is None:
        return
    markers = Markers(running)
    running.install_streams(markers)
    _follow_streams(running)
    _open_node(running)
    markers.enter_actor(None)
    running.publish(stated)


def _begin(config: Config) -> Runtime | None:
    import ray._private.worker as ray_worker

    worker = ray_worker.global_worker
    if config.disabled or config.capture == "off" or not worker.connected or worker.mode != ray_worker.WORKER_MODE:
        return None
    if worker.current_job_id.is_nil():
        return None  # a cluster nested below one of ours; its workers without a job may not be asked anything
    run_id = config.run_id or identity.run_id(config, {**_own_run(worker)})
    running = runtime.start(config, run_id)
    if running is None:
        return None
    os.environ["SKYRL_OTEL_RUN_ID"] = running.run.run_id
    for name in _NOT_FOR_WORKERS:
        os.environ.pop(name, None)
    return running


def _own_run(worker: Any) -> dict[str, str]:
    # Without a run id from a driver of ours all workers of a job agree on session and job: job ids begin anew per cluster.
    session = os.path.basename(worker.node.get_session_dir_path())
    return {"SLURM_JOB_ID": "", "TORCHELASTIC_RUN_ID": f"{session}-{worker.current_job_id.hex()}"}


def _follow_streams(running: Runtime) -> None:
    import ray._private.worker as ray_worker

    worker = ray_worker.global_worker
    facts: identity.Facts = {
        **identity.process_facts(running.config),
        "channel": "infra",
        "job_id": worker.current_job_id.hex(),
        "node_id": str(worker.node.node_id),
        "worker_id": worker.worker_id.hex(),
        "awaits": "actor",
    }
    facts.pop("role", None)
    places = {}
    # By path: under RAY_ROTATION_MAX_BYTES the descriptors are pipes.
    for name, path in (("out", worker.get_out_file_path()), ("err", worker.get_err_file_path())):
        found = fds.place_of(path)
        if found is not None:
            places[name] = (found, 0)
    if places:
        running.follow(places, facts, skip_markers=True)
    else:
        running.records_only(facts)
    running.start_recording()
    running.watch.add("rest", Rest(running), _REST_S if _is_looked_after(running.run) else 0.0)


def _is_looked_after(run: RunDir) -> bool:
    """Whether the node's agent is there and knows where to send, so that nothing waits for what `Rest` does."""
    return os.path.exists(run.token) and locks.is_held(run.agent_lock)


def _open_node(running: Runtime) -> None:
    """For the first worker of a job on a node: an agent that knows where to send, and a driver that knows of the node.

    Not left to the watch thread: a short job is over, and its workers are killed, before that has had its turn; then their
    lines would lie on a node that nobody waits for. All later workers pay one failing open(2).
    """
    import ray._private.worker as ray_worker

    job_id = ray_worker.global_worker.current_job_id.hex()
    try:
        os.close(open_file(running.run.path / f"job-{job_id}", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    from skyrl_otel.integrations.ray import kv
    from skyrl_otel.spool import token

    running.ensure_agent()
    with guard.guarded("ray.open_node"):
        kv.announce_node(running.run.run_id, job_id, os.uname().nodename, _KV_S)
        if (
            token.read(running.run) is None
            and (found := kv.get_shipping(running.run.run_id, job_id, _KV_S)) is not None
        ):
            token.write(running.run, found)
    from skyrl_otel.capture import launch

    launch.await_launchers(_LAUNCH_S)


class Rest:
    """A task for the watch thread: what the worker's start need not wait for, the imports first of all."""

    def __init__(self, running: Runtime) -> None:
        self._running = running

    def __call__(self) -> None:
        import ray._private.worker as ray_worker

        from skyrl_otel.integrations import progress  # noqa: F401  (the marker needs it, soon)
        from skyrl_otel.integrations.ray import node, overrides

        worker, running = ray_worker.global_worker, self._running
        overrides.install()
        running.look_after()
        running.watch.add("shipping", Shipping(running))
        session = worker.node.get_session_dir_path()
        job_id = worker.current_job_id.hex()
        files = node.SessionFiles(running.run, session, job_id, from_start=False, facts=node.facts(worker))
        files.start(running.watch)


class Shipping:
    """A task for the watch thread: bring the receiver's address from the KV to this node's agent, once per node."""

    def __init__(self, running: Runtime) -> None:
        self._running = running
        self._tries = 0

    def __call__(self) -> float | None:
        import ray._private.worker as ray_worker

        from skyrl_otel.integrations.ray import kv
        from skyrl_otel.spool import token

        run = self._running.run
        if token.read(run) is not None:
            return None
        found = kv.get_shipping(run.run_id, ray_worker.global_worker.current_job_id.hex())
        self._tries += 1
        if found is None and self._tries > 5:
            # Nobody puts one: the import string alone was named in the job. An endpoint of the environment will do.
            found = token.from_config(self._running.config)
        if found is None:
            return 0.5 if self._tries < 40 else 5.0
        token.write(run, found)
        return None


class Markers:
    """Sees Ray's lines before they are written: learns who this worker is now, and redirects an actor at its first."""

    def __init__(self, running: Runtime) -> None:
        self._running = running
        self._redirected = False
        self._sees_overrides = False
        self._actor_id = ""
        self._task = ""
        self._task_changes = 0

    def __call__(self, stream: LineStream, text: str) -> bool:
        if not text.startswith((_ACTOR, _TASK, _JOB)) or not _is_rays_own(sys._getframe(2)):
            return False
        try:
            if text.startswith(_ACTOR):
                self._watch_overrides()
                self.enter_actor(text[len(_ACTOR) :].strip())
            elif text.startswith(_TASK):
                self._watch_overrides()
                self._enter_task(text[len(_TASK) :].strip())
        except Exception as error:
            guard.failed("ray.marker", error)
        return self._redirected

    def _watch_overrides(self) -> None:
        """Before the user's code runs, which may give actors of its own a runtime_env."""
        if self._sees_overrides:
            return
        from skyrl_otel.integrations.ray import overrides

        overrides.install()
        overrides.may_ask()
        self._sees_overrides = True

    def enter_actor(self, token_text: str | None) -> None:
        """The worker is an actor's from here on."""
        import ray

        from skyrl_otel.integrations import progress

        if not ray.is_initialized():
            return
        worker = ray._private.worker.global_worker
        if worker.actor_id.is_nil():
            return
        actor_id = worker.actor_id.hex()
        if actor_id == self._actor_id:
            return
        self._actor_id = actor_id
        with guard.guarded("ray.detached"):
            _tell_detached(self._running)
        name = ray.get_runtime_context().get_actor_name()
        instance = worker.actors.get(worker.actor_id)
        class_name = token_text or (type(instance).__name__ if instance is not None else "")
        facts: identity.Facts = {"actor_id": actor_id, "awaits": ""}
        if class_name:
            facts["actor_class"] = class_name
        if name:
            facts["actor_name"] = name
        running = self._running
        running.await_rank()
        role = progress.role_of(class_name)
        if role:
            facts["role"] = role
        facts.update(identity.rank_facts())
        visible = progress.matches(class_name, running.config.progress)
        facts["channel"] = "progress" if visible else "infra"
        stays = visible or running.config.show_infra or running.config.capture == "follow"
        if stays:
            running.publish({**facts, "task_name": None})
            return
        try:
            self._redirect(facts, token_text)
        except OSError as error:
            guard.say(f"this actor's output stays in Ray's files: {error}")
            running.publish({**facts, "task_name": None})

    def _redirect(self, facts: identity.Facts, token_text: str | None) -> None:
        from skyrl_otel.integrations import progress

        running = self._running
        early = running.folder
        known = {key: value for key, value in running.facts.items() if key not in ("task_name", "awaits")}
        awaits = "rank" if "rank" not in facts and facts.get("role") in progress.RANKED else ""
        # Ray's log monitor shows what follows a marker under the actor's name, the pointer too.
        marker = f"{_ACTOR}{token_text}\n" if token_text else ""
        pointer = f"{POINTER}: skyrl-otel logs --actor {facts['actor_id']}\n"
        ends = {stream.fileno(): stream.end_line() for stream in running.streams()}
        last_words = {
            fds.STDOUT: ends.get(fds.STDOUT, "") + marker + pointer,
            fds.STDERR: ends.get(fds.STDERR, "") + marker,
        }
        running.redirect({**known, **facts, "awaits": awaits}, last_words)
        self._redirected = True
        # SkyRL's actors and engines would move their output on into this file, and out of the record: its
        # `redirect_actor_output_to_file` reads the variable when their __init__ runs, which is after this.
        os.environ.pop("SKYRL_LOG_FILE", None)
        if early is not None:
            with guard.guarded("ray.early"):
                # What Ray's file got so far is this actor's too; its end is told by the other folder.
                early.publish({**facts, "silent_end": True})

    def _enter_task(self, name: str) -> None:
        from skyrl_otel.integrations import progress

        if self._actor_id or name == self._task or self._task_changes > _MOST_TASK_CHANGES:
            return
        self._task, self._task_changes = name, self._task_changes + 1
        if self._task_changes > _MOST_TASK_CHANGES:
            self._running.publish({"task_name": None, "channel": "infra", "awaits": ""})
            return
        visible = progress.matches(name, self._running.config.progress) or self._is_drivers_own()
        self._running.publish({"task_name": name, "channel": "progress" if visible else "infra", "awaits": ""})

    def _is_drivers_own(self) -> bool:
        """A task that the driver itself submitted is progress in a program for which no table or glob says what is."""
        import ray

        if self._running.config.progress or not ray.is_initialized():
            return False
        depth = getattr(ray._private.worker.global_worker.core_worker, "get_task_depth", None)
        return depth is not None and depth() == 1


def _tell_detached(running: Runtime) -> None:
    """The driver leaves the secret in the cluster for an actor, and those that it makes, which outlive it."""
    import ray._private.worker as ray_worker

    worker = ray_worker.global_worker
    root = getattr(worker.core_worker, "get_current_root_detached_actor_id", None)
    if root is not None and not root().is_nil():
        from skyrl_otel.integrations.ray import kv

        kv.outlives_driver(running.run.run_id, worker.current_job_id.hex(), _KV_S)


def _is_rays_own(frame: Any) -> bool:
    worker = sys.modules.get("ray._private.worker")
    main_loop = getattr(getattr(worker, "Worker", None), "main_loop", None)
    return main_loop is not None and frame.f_code is main_loop.__code__
