"""What is done with a process's output, as a table."""

import pytest

from skyrl_otel.capture import fds
from skyrl_otel.capture.identity import run_id
from skyrl_otel.capture.plan import Surroundings, plan
from skyrl_otel.config import Channel, Config


@pytest.mark.parametrize(
    ("env", "stdout", "rank", "channel", "notebook", "expected"),
    [
        ({}, "terminal", None, None, False, "leave"),
        ({}, "pipe", None, None, False, "leave"),
        ({}, "file", None, None, False, "follow"),
        ({}, "terminal", 0, None, False, "leave"),
        ({}, "terminal", 1, None, False, "redirect"),
        ({}, "terminal", 1, "progress", False, "leave"),
        ({}, "terminal", None, "infra", False, "redirect"),
        ({}, "pipe", None, "infra", True, "leave"),
        ({"SKYRL_OTEL_CAPTURE": "redirect"}, "terminal", None, None, False, "redirect"),
        ({"SKYRL_OTEL_CAPTURE": "follow"}, "file", 1, None, False, "follow"),
        ({"SKYRL_LOG_LEVEL": "DEBUG"}, "file", 1, None, False, "follow"),
        ({"SKYRL_OTEL_LAUNCHER": "1"}, "file", None, None, False, "leave"),
        ({"SKYRL_OTEL_LAUNCHER": "1"}, "pipe", 2, None, False, "redirect"),
    ],
)
def test_plan(
    env: dict[str, str], stdout: fds.Kind, rank: int | None, channel: Channel | None, notebook: bool, expected: str
) -> None:
    around = Surroundings(stdout, stdout, rank, channel, notebook)
    assert plan(Config.from_env(env), around)[0] == expected


def test_the_run_id_is_what_all_processes_of_a_launch_agree_on() -> None:
    def found(**env: str) -> str:
        return run_id(Config.from_env(env), env)

    assert found(SKYRL_OTEL_RUN_ID="mine", SLURM_JOB_ID="1") == "mine"
    assert found(TORCHELASTIC_RUN_ID="a b/c") == "torchrun-a-b-c"
    assert found(SLURM_JOB_ID="77", SLURM_STEP_ID="2") == "slurm-77-2"
    assert found(TORCHELASTIC_RUN_ID="none") == found(TORCHELASTIC_RUN_ID="none")
    assert found() != found()
