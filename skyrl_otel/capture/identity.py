"""Who this process is: what it knows at the start, and the facts that come later (its rank, above all).

RANK appears in the environment while an actor's ``__init__`` runs, or with ``init_process_group``. Both are looked for:
the environment by a slow and bounded watch, the call by a wrapper.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from skyrl_otel.capture import guard
from skyrl_otel.config import Config, is_run_id

Facts = dict[str, Any]

# What of an identity is one process's alone, and not its children's.
_OF_PROCESS = ("follow", "goodbye", "awaits", "lost", "errors")

_RANK_VARIABLES = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}

# How long a rank may be on its way (a model's download comes before init_process_group), and how often we look.
WATCH_S = 1800.0
FAST_WATCH_S = 20.0


def process_facts(config: Config) -> Facts:
    """What holds for the whole process."""
    facts: Facts = {"pid": os.getpid(), "parent_pid": os.getppid(), "host": os.uname().nodename, "argv0": _argv0()}
    if config.project:
        facts["project"] = config.project
    if config.service_name:
        facts["service"] = config.service_name
    if config.role:
        facts["role"] = config.role
    if config.resource_attributes:
        facts["user_attributes"] = dict(config.resource_attributes)
    return facts


def of_child(parent: Mapping[str, Any], writer_id: str) -> Facts:
    """The facts of a child of this kind: it is who its parent is, which has the folder `writer_id`, but for its process."""
    facts = {key: value for key, value in parent.items() if key not in _OF_PROCESS}
    return {**facts, "pid": os.getpid(), "parent_pid": os.getppid(), "parent": writer_id, "silent_end": True}


def child_name() -> str:
    """What multiprocessing calls this process, as vLLM's prefixes do; "" where it has started another program."""
    module = sys.modules.get("multiprocessing.process")
    name = str(module.current_process().name) if module is not None else ""
    return "" if name == "MainProcess" else name


def rank_facts(environ: Mapping[str, str] | None = None) -> Facts:
    """`rank`, `local_rank` and `world_size` as far as the environment names them in numbers."""
    env = os.environ if environ is None else environ
    return {key: int(env[name]) for key, name in _RANK_VARIABLES.items() if env.get(name, "").isdigit()}


def is_rank_itself() -> bool:
    """Whether this is the process that was started as a rank, no child of it: `inject/sitecustomize.py` says so."""
    return os.environ.get("SKYRL_OTEL_RANK_OF", "") in ("", str(os.getpid()))


def run_id(config: Config, environ: Mapping[str, str] | None = None) -> str:
    """The configured run id, else one that all processes of the same launch find by themselves, else a new one."""
    if config.run_id:
        return config.run_id
    env = os.environ if environ is None else environ
    elastic = env.get("TORCHELASTIC_RUN_ID", "")
    slurm = env.get("SLURM_JOB_ID", "")
    if elastic and elastic != "none":  # torchrun's default rendezvous id is the word "none"
        return _plain(f"torchrun-{elastic}")
    if slurm:
        return _plain(f"slurm-{slurm}-{env.get('SLURM_STEP_ID', '0')}")
    if elastic:
        return f"torchrun-{os.getppid()}-{_started(os.getppid())}"
    return f"{time.strftime('%y%m%d-%H%M%S')}-{os.urandom(3).hex()}"


def _plain(name: str) -> str:
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)[
        :80
    ]
    return plain if is_run_id(plain) else os.urandom(8).hex()


def _started(pid: int) -> str:
    # Field 22 of /proc/<pid>/stat, counted behind the name, which may hold spaces: proc(5).
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return "0"


def _argv0() -> str:
    return os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""


class RankWatch:
    """A task for the watch thread: publishes the rank once it is known, then ends.

    Args:
        publish: takes the new facts.
    """

    def __init__(self, publish: Callable[[Facts], None]) -> None:
        self._publish = publish
        self._began = time.monotonic()

    def __call__(self) -> float | None:
        found = _process_group_facts() or rank_facts()
        if "rank" in found:
            self._publish({**found, "awaits": ""})
            return None
        age_s = time.monotonic() - self._began
        if age_s > WATCH_S:
            return None
        return 0.1 if age_s < FAST_WATCH_S else 2.0


def _process_group_facts() -> Facts:
    module = sys.modules.get("torch.distributed")
    is_initialized = getattr(module, "is_initialized", None)
    if module is None or is_initialized is None or not is_initialized():
        return {}
    return {**rank_facts(), "rank": int(module.get_rank()), "world_size": int(module.get_world_size())}


def on_process_group(publish: Callable[[Facts], None]) -> None:
    """Publish rank and world size at the moment `torch.distributed.init_process_group` returns, now or once imported."""

    def wrap(module: ModuleType) -> None:
        original = getattr(module, "init_process_group", None)
        if original is None or hasattr(original, "__skyrl_otel__"):
            return

        @functools.wraps(original)
        def init_process_group(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            with guard.guarded("identity.process_group"):
                facts = _process_group_facts()
                if facts:
                    publish({**facts, "awaits": ""})
            return result

        init_process_group.__skyrl_otel__ = True  # type: ignore[attr-defined]
        module.init_process_group = init_process_group  # type: ignore[attr-defined]

    from skyrl_otel.capture.postimport import after_import

    after_import("torch.distributed", wrap)
