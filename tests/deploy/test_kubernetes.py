"""The manifests against Kubernetes' own schemas (kubernetes-validate 1.37 bundles them), strictly: unknown keys fail.

Of a RayJob each pod template is checked, wrapped as a Pod; tests/stack/test_rayjob.py has KubeRay's own schema.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kubernetes_validate

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
VERSION = "1.30"


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "pod", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def test_the_collector_is_valid() -> None:
    documents = _documents("collector.yaml")
    assert [document["kind"] for document in documents] == ["Service", "StatefulSet"]
    for document in documents:
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_schema_refuses_what_is_wrong() -> None:
    document = _documents("collector.yaml")[1]
    document["spec"]["template"]["spec"]["containers"][0]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_pods_of_the_ray_job_are_valid() -> None:
    (job,) = _documents("rayjob.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        kubernetes_validate.validate(_pod(group["template"]), VERSION, strict=True)
        spec = group["template"]["spec"]
        names = {entry["name"] for entry in spec["containers"][0]["env"]}
        assert {"OTEL_EXPORTER_OTLP_ENDPOINT", "SKYRL_OTEL_SPOOL_DIR", "OTEL_EXPORTER_OTLP_HEADERS"} <= names
        assert any("emptyDir" in volume for volume in spec["volumes"]), "the spool is on a local disk"
