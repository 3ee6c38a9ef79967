"""The run's name: given, or that of the job we are part of, or made here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from skyrl_otel.capture import identity
from skyrl_otel.config import Config


def choose(config: Config, environ: Mapping[str, str]) -> str:
    """A name that all processes of one job agree on, wherever it is started.

    SKYRL_OTEL_RUN_ID wins; then a submitted Ray job's id; then what `attach` would find by itself (torchelastic, SLURM);
    otherwise a new one, `YYMMDD-HHMMSS-xxxxxx`.
    """
    submission = _ray_submission(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))
    if submission and not config.run_id:
        return re.sub(r"[^A-Za-z0-9._-]", "-", submission).lstrip(".")[:80]
    return identity.run_id(config, environ)


def _ray_submission(text: str) -> str:
    # Ray's job supervisor starts the entrypoint with this (ray/dashboard/modules/job/job_supervisor.py).
    try:
        return str(json.loads(text)["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""
