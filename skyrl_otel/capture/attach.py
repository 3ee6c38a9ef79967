"""What of a process is taken, and how: `attach()`, and what stands in its place where nobody calls it.

What the user's own code prints to where the user expects it is never moved: only infra processes (ranks other than 0,
Ray's workers) are redirected. A lone driver keeps its output, which is followed where it is a regular file.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from skyrl_otel.capture import fds, guard, identity, runtime
from skyrl_otel.capture.alone import is_ray_worker
from skyrl_otel.capture.plan import Plan, Surroundings, plan
from skyrl_otel.capture.runtime import Runtime
from skyrl_otel.config import Channel, Config
from skyrl_otel.spool.identity import in_force, parse
from skyrl_otel.spool.writer import WriterFolder

# Frameworks that are looked after once they are imported: module, where our code for it lives.
INTEGRATIONS = (("ray", "skyrl_otel.integrations.ray", "wrap_init"),)


@guard.never_raises
def take_records() -> None:
    """For a process under `run` that nobody has called `attach()` in: its output is the launcher's, its records are its own.

    At the first record (`inject/sitecustomize.py`), and in a driver once it has a cluster. Says nothing, whatever happens:
    the program did not ask for us, and what is not taken here the launcher records as text.
    """
    with runtime.changing():
        config = Config.from_env()
        if config.disabled or config.capture == "off":
            return
        running = runtime.start(config, identity.run_id(config), quietly=True)
        if running is None or running.takes_records:
            return
        parent = next(iter(fds.leading_into(str(running.run.path)).values()), "")
        if running.folder is None:
            running.records_only(_facts_of_child(config, parent) if parent else _facts_of_launched(config, running))
        running.start_recording(attached=False)
        running.look_after(has_rank=not parent)


def _facts_of_child(config: Config, parent: str) -> identity.Facts:
    """Of a process whose output goes into the folder `parent`: it is a child of that writer."""
    with open(os.path.join(parent, "identity"), "rb") as file:
        lines = parse(file.read())
    facts = identity.of_child(in_force(lines, len(lines)), os.path.basename(parent).removeprefix("w-"))
    own = identity.process_facts(config)
    name = identity.child_name()
    return {**own, **facts, "argv0": own["argv0"], **({"child": name} if name else {})}


def _facts_of_launched(config: Config, running: Runtime) -> identity.Facts:
    facts = {"channel": "progress", **running.facts, **_process_facts(config)}
    # How the command ended is for the launcher to tell; a child of it may be killed in passing. Not so a rank.
    is_rank = "rank" in facts
    is_itself = is_rank and identity.is_rank_itself()
    return {"role": "trainer" if is_rank else "driver", "silent_end": not is_itself, **facts}


def watch_records(name: str, path: Any, target: Any) -> Any:
    """For `inject/sitecustomize.py`, in the middle of loguru's first import."""
    take_records()
    return sys.meta_path[0].find_spec(name, path, target)


@guard.never_raises
def start_records() -> None:
    """For `OTelLogHandler` without `attach()`: a place for records, nothing else."""
    with runtime.changing():
        config = Config.from_env()
        if runtime.current() is not None or config.disabled or config.capture == "off":
            return
        run_id = identity.run_id(config)
        running = runtime.start(config, run_id)
        if running is None:
            return
        os.environ["SKYRL_OTEL_RUN_ID"] = run_id
        running.records_only({**identity.process_facts(config), "channel": "progress", **identity.rank_facts()})
        _bring_shipping(config, running)
        running.look_after()


@guard.never_raises
def attach(role: str | None = None, rank: int | None = None, channel: Channel | None = None) -> None:
    """Record this process's output, with who it is.

    Called twice, or where `skyrl-otel run` or the Ray hook attached already, it only adds what its arguments say.
    Never raises: where recording cannot start, output stays where it was and one line on stderr says why.

    Args:
        role: what the process does in the run: policy, rollout, reward, env, …
        rank: its rank, if it is not in RANK.
        channel: "progress" for what belongs on the user's terminal, "infra" for the rest; default by rank.
    """
    given = {"role": role, "rank": rank, "channel": channel}
    stated: identity.Facts = {key: value for key, value in given.items() if value is not None}
    with runtime.changing():
        running = runtime.current()
        if running is not None and running.is_attached:
            running.publish(stated)
            return
        config = Config.from_env()
        if config.disabled or config.capture == "off":
            return
        install_integrations()
        if is_ray_worker():
            _call("skyrl_otel.integrations.ray", "attach_worker", stated)
            return
        _attach_process(config, stated)


def _attach_process(config: Config, stated: identity.Facts) -> None:
    run_id = identity.run_id(config)
    running = runtime.start(config, run_id)
    if running is None:
        return
    os.environ["SKYRL_OTEL_RUN_ID"] = running.run.run_id  # children and Ray's workers belong to this run
    known = {key: value for key, value in running.facts.items() if key != "silent_end"}
    facts = {**known, **_process_facts(config), **stated}
    rank = facts.get("rank")
    around = Surroundings(
        stdout=fds.kind(fds.STDOUT),
        stderr=fds.kind(fds.STDERR),
        rank=rank if isinstance(rank, int) else None,
        channel=stated.get("channel"),
        notebook="ipykernel" in sys.modules,
    )
    what, sentence = plan(config, around)
    facts["channel"] = "infra" if what == "redirect" else "progress"
    if "role" not in facts:
        facts["role"] = "trainer" if around.rank is not None else "driver"
    try:
        _capture(running, what, facts)
    except OSError as error:
        guard.say(f"output is not recorded: {error}")
        return
    if sentence:
        guard.say(sentence)
    _bring_shipping(config, running)
    running.start_recording()
    running.look_after()


def _process_facts(config: Config) -> identity.Facts:
    return {**identity.process_facts(config), **identity.rank_facts()}


def _bring_shipping(config: Config, running: Runtime) -> None:
    if config.launched:
        return
    from skyrl_otel.spool import token

    with guard.guarded("runtime.shipping"):
        shipping = token.from_config(config)
        if shipping is not None:
            token.write(running.run, shipping)


def _capture(running: Runtime, what: Plan, facts: identity.Facts) -> None:
    early = running.folder  # a handler's, or the launcher's for a program that had not asked for us yet
    if what == "redirect":
        running.redirect(facts)
        running.install_streams()
        _silence_end(early)
        return
    places: dict[str, tuple[fds.Place, int]] = {}
    if what == "follow":
        inherited = fds.leading_into(str(running.run.path))  # recorded there already
        for name, descriptor in (("out", fds.STDOUT), ("err", fds.STDERR)):
            found = fds.place(descriptor)
            if not found or descriptor in inherited:
                continue
            if all((found.dev, found.ino) != (other.dev, other.ino) for other, _ in places.values()):
                places[name] = (found, found.size)
    if places:
        running.follow(places, facts, skip_markers=False)
        _silence_end(early)
    elif early is not None:
        running.publish({**facts, "silent_end": False})
    else:
        running.records_only(facts)


def _silence_end(folder: WriterFolder | None) -> None:
    if folder is not None:
        folder.publish({"silent_end": True})  # the process ends once, in its other folder


def install_integrations() -> None:
    """Have each framework looked after: now where it is imported already, else right after its import."""
    from skyrl_otel.capture.postimport import after_import

    for module, home, function in INTEGRATIONS:
        after_import(module, partial(_call_with_module, home, function))


def watch_imports(name: str, path: Any, target: Any) -> Any:
    """For `inject/sitecustomize.py`, in the middle of the first import of a framework: take over from there."""
    install_integrations()
    return sys.meta_path[0].find_spec(name, path, target)


def _call_with_module(home: str, function: str, _: ModuleType) -> None:
    _call(home, function)


def _call(home: str, function: str, *args: Any) -> None:
    getattr(import_module(home), function)(*args)
