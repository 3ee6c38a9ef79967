"""deploy/kubernetes/rayjob.yaml against KubeRay's own schema."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.stack.processes import CHECKOUT

pytestmark = [pytest.mark.collector, pytest.mark.timeout(200)]


def _schema() -> dict[str, Any]:
    path = subprocess.run([CHECKOUT / "scripts" / "kuberay-schema"], stdout=subprocess.PIPE, text=True, check=True)
    definition = yaml.safe_load(Path(path.stdout.strip()).read_text())
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
    found: dict[str, Any] = _closed(versions["v1"])
    return found


def _closed(schema: Any) -> Any:
    """The same schema where an object has no other keys than those it names, as `kubectl apply --validate=strict` reads it."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    # An object's metadata is Kubernetes' own; the schema says no more than that it is one.
    if isinstance(closed.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def test_the_ray_job_is_valid() -> None:
    schema = _schema()
    job = yaml.safe_load((CHECKOUT / "deploy/kubernetes/rayjob.yaml").read_text())
    errors = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(job)]
    assert errors == []
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["tempalte"] = {}
    assert any("tempalte" in error.message for error in jsonschema.Draft7Validator(schema).iter_errors(job))
