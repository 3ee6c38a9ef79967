"""Which tasks and actors are the user's progress, and what role an actor's class plays, by framework.

The tables are the place to add a framework or a class. Names are those of SkyRL 0.3, verl 0.9 and
slime (November 2026); slime trains in its driver, which is progress anyway.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple


class Framework(NamedTuple):
    """`modules`: one of them is imported in a driver that uses it. `progress`: globs of its visible tasks and actors."""

    name: str
    modules: tuple[str, ...]
    progress: tuple[str, ...]


FRAMEWORKS: tuple[Framework, ...] = (
    Framework("skyrl", ("skyrl_train", "skyrl", "skyrl_gym", "skyrl_tx"), ("skyrl_entrypoint",)),
    Framework("verl", ("verl",), ("TaskRunner", "main_task", "OneStepOffTaskRunner", "FullyAsyncTaskRunner")),
)

# (glob of the class's name, role); the first that matches wins.
ROLES: tuple[tuple[str, str], ...] = (
    # SkyRL: skyrl_train/workers/*, inference_engines/*
    ("*PolicyWorker*", "policy"),
    ("*PolicyRayActor*", "policy"),
    ("*CriticWorker*", "critic"),
    ("*CriticRayActor*", "critic"),
    ("*RefWorker*", "ref"),
    ("*RefRayActor*", "ref"),
    ("*RewardWorker*", "reward"),
    ("VLLM*", "rollout"),
    ("AsyncVLLM*", "rollout"),
    ("*InferenceEngine*", "rollout"),
    ("SGLang*", "rollout"),
    # verl: workers/*, experimental/agent_loop
    ("ActorRolloutRef*", "policy"),
    ("*ActorRolloutRefWorker*", "policy"),
    ("WorkerDict", "policy"),
    ("RewardModel*", "reward"),
    ("RewardManager*", "reward"),
    ("RewardLoop*", "reward"),
    ("vLLM*", "rollout"),
    ("AgentLoop*", "rollout"),
    ("TaskRunner", "trainer"),
    # slime: ray/*, backends/*
    ("*TrainRayActor*", "policy"),
    ("RolloutManager", "rollout"),
    ("RolloutRayActor", "rollout"),
    # vLLM's own Ray executor
    ("RayWorkerWrapper", "rollout"),
)

# For classes no table knows: the words of a class's name, in the order in which they decide.
_WORDS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"critic", "value"}), "critic"),
    (frozenset({"ref", "reference"}), "ref"),
    (frozenset({"reward", "rm", "verifier", "judge", "grader"}), "reward"),
    (frozenset({"env", "environment", "sandbox", "tool"}), "env"),
    (frozenset({"rollout", "vllm", "sglang", "engine", "generator", "inference", "sampler", "server"}), "rollout"),
    (frozenset({"policy", "learner"}), "policy"),
    (frozenset({"trainer", "train"}), "trainer"),
)

_WORD = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+"

#: Roles whose processes are ranks of a process group: their first lines wait for RANK a little.
RANKED = frozenset({"policy", "critic", "ref", "reward", "trainer"})

#: Passed to workers by a driver that no table knows: there, what the driver itself submits is progress.
TABLE: tuple[str, ...] = tuple(glob for framework in FRAMEWORKS for glob in framework.progress)


def framework_of(modules: Container[str]) -> Framework | None:
    """The framework a driver uses, by the modules it has imported."""
    return next((found for found in FRAMEWORKS if any(name in modules for name in found.modules)), None)


def matches(name: str, globs: Sequence[str] = ()) -> bool:
    """Whether a task or an actor class of this name is progress, by the table or the user's globs."""
    short = name.rpartition(".")[2]
    return any(_fits(candidate, glob) for glob in (*TABLE, *globs) for candidate in (name, short))


def role_of(class_name: str) -> str | None:
    """The role of an actor by the name of its class, or None where nothing says so."""
    for glob, role in ROLES:
        if _fits(class_name, glob):
            return role
    words = {word.lower() for word in re.findall(_WORD, class_name)}
    return next((role for known, role in _WORDS if words & known), None)


def _fits(name: str, glob: str) -> bool:
    """`fnmatchcase`, which takes 0.1 ms for each new glob while an actor waits; the tables have stars at the ends only."""
    core = glob.strip("*")
    if any(letter in core for letter in "*?["):
        return fnmatchcase(name, glob)
    before, after = glob.startswith("*"), glob.endswith("*")
    if before and after:
        return core in name
    return name.endswith(core) if before else name.startswith(core) if after else name == core
