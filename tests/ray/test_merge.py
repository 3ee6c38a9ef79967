"""Our part beside the user's in a runtime environment: values in, values out."""

import json
from typing import Any

import pytest

from skyrl_otel.integrations.ray.merge import HOOK, Addition, CannotMerge, CombinedHook, merged, merged_into_job

OURS = Addition("/run/lib/skyrl_otel", {"SKYRL_OTEL_RUN_ID": "r", "SKYRL_OTEL_CAPTURE": "auto"})
BARE = {"worker_process_setup_hook": HOOK, "py_modules": [OURS.package], "env_vars": dict(OURS.env_vars)}
VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"


def hook() -> None:
    pass


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (None, {}),
        ({"working_dir": "."}, {"working_dir": "."}),
        (
            {"env_vars": {"A": "1", "SKYRL_OTEL_CAPTURE": "follow"}},
            {"env_vars": {"A": "1", "SKYRL_OTEL_CAPTURE": "follow", "SKYRL_OTEL_RUN_ID": "r"}},
        ),
        ({"py_modules": ["mine"]}, {"py_modules": ["mine", OURS.package]}),
        ({"worker_process_setup_hook": "m.hook"}, {"env_vars": {**OURS.env_vars, "SKYRL_OTEL_USER_HOOK": "m.hook"}}),
        # As a submitted job hands it on: Ray runs what the variable names.
        (
            {"worker_process_setup_hook": "hook", "env_vars": {VARIABLE: "ray_runtime_env_func::AAAA"}},
            {"env_vars": {**OURS.env_vars, "SKYRL_OTEL_USER_HOOK": "ray_runtime_env_func::AAAA", VARIABLE: HOOK}},
        ),
    ],
)
def test_what_the_user_has_is_kept(base: dict[str, Any] | None, changes: dict[str, Any]) -> None:
    before = json.dumps(base)
    once = merged(base, OURS)
    assert once == {**BARE, **changes}
    assert merged(once, OURS) == once, "a second time changes nothing"
    assert json.dumps(base) == before, "the user's own dict is not touched"


def test_a_callable_hook_runs_after_ours_under_its_own_name() -> None:
    found = merged({"worker_process_setup_hook": hook}, OURS)["worker_process_setup_hook"]
    assert isinstance(found, CombinedHook) and found.user_hook is hook and found.__name__ == "hook"


@pytest.mark.parametrize(
    "base",
    [
        {"container": {"image": "x"}},
        {"image_uri": "x"},
        {"py_modules": "x"},
        {"env_vars": 1},
        {"worker_process_setup_hook": 1},
    ],
)
def test_what_has_no_place_for_us_is_refused(base: dict[str, Any]) -> None:
    with pytest.raises(CannotMerge):
        merged(base, OURS)


def rays_merge(job: str, driver: Any, override: bool) -> Any:
    from ray.runtime_env.runtime_env import _merge_runtime_env

    return _merge_runtime_env(json.loads(job)["runtime_env"], driver, override=override)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("job", "driver", "override"),
    [
        ({}, None, False),
        ({"env_vars": {"A": "1"}}, {"env_vars": {"B": "2"}}, False),
        ({"worker_process_setup_hook": "m.job"}, {"py_modules": ["x"]}, False),
        ({"py_modules": ["x"]}, {"worker_process_setup_hook": "m.driver"}, False),
        (
            {"worker_process_setup_hook": "m.job", "env_vars": {"A": "1"}},
            {"worker_process_setup_hook": "m.driver", "env_vars": {"A": "2"}},
            True,
        ),
    ],
)
def test_a_submitted_job_comes_to_what_ray_makes_of_it_and_ours(
    job: dict[str, Any], driver: dict[str, Any] | None, override: bool
) -> None:
    text = json.dumps({"runtime_env": job, "metadata": {"k": "v"}})
    expected = merged(rays_merge(text, driver, override), OURS)
    config, own = merged_into_job(text, driver, OURS, override=override)
    assert rays_merge(config, own, override) == expected
    assert json.loads(config)["metadata"] == {"k": "v"}


@pytest.mark.parametrize(
    ("job", "driver"), [({"py_modules": []}, {"py_modules": []}), ({"env_vars": {"A": "1"}}, {"env_vars": {"A": "1"}})]
)
def test_where_ray_refuses_the_two_nothing_is_added(job: dict[str, Any], driver: dict[str, Any]) -> None:
    with pytest.raises(CannotMerge):
        merged_into_job(json.dumps({"runtime_env": job}), driver, OURS, override=False)
