"""What processes of a job tell each other by the cluster's own key-value store, instead of anything Ray writes to a log:
the receiver's address and secret, and on which nodes the job has had workers. Each job has keys of its own, so that two
drivers of one run on one cluster do not end each other's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from skyrl_otel.spool.token import Shipping

NAMESPACE = "skyrl-otel"
_ENCODED = NAMESPACE.encode()
_DETACHED = b"detached"
_NODES = b"nodes/"


def put_shipping(run_id: str, job_id: str, shipping: Shipping) -> bool:
    """Whether it could be put: false where this process is not connected."""
    from ray.experimental import internal_kv

    if not internal_kv._internal_kv_initialized():
        return False
    key = _prefix(run_id, job_id) + b"shipping"
    internal_kv._internal_kv_put(key, shipping.to_json(), overwrite=True, namespace=NAMESPACE)
    return True


def get_shipping(run_id: str, job_id: str, timeout_s: float | None = None) -> Shipping | None:
    """None where it is not there (yet). Raises ray.exceptions.RpcError for a GCS that does not answer in time."""
    client = _client()
    key = _prefix(run_id, job_id) + b"shipping"
    found = client.internal_kv_get(key, _ENCODED, timeout_s) if client else None
    return Shipping.from_json(found) if found else None


def announce_node(run_id: str, job_id: str, node: str, timeout_s: float) -> None:
    """Tell the driver that this job has workers on `node`, a host name. Raises as `get_shipping`."""
    client = _client()
    if client is not None:
        client.internal_kv_put(_prefix(run_id, job_id) + _NODES + node.encode(), b"", True, _ENCODED, timeout_s)


class Job(NamedTuple):
    """What is there of a job: `nodes` are the host names that were announced, `outlives` whether an actor of it lives on."""

    nodes: list[str]
    outlives: bool


def look(run_id: str, job_id: str, timeout_s: float) -> Job:
    """Raises as `get_shipping`."""
    client, prefix = _client(), _prefix(run_id, job_id)
    keys = [key[len(prefix) :] for key in client.internal_kv_keys(prefix, _ENCODED, timeout_s)] if client else []
    nodes = sorted(key.removeprefix(_NODES).decode() for key in keys if key.startswith(_NODES))
    return Job(nodes, _DETACHED in keys)


def outlives_driver(run_id: str, job_id: str, timeout_s: float) -> None:
    """Tell the driver that this job has a detached actor, which may start again elsewhere. Raises as `get_shipping`."""
    client = _client()
    if client is not None:
        client.internal_kv_put(_prefix(run_id, job_id) + _DETACHED, b"", True, _ENCODED, timeout_s)


def forget(run_id: str, job_id: str, timeout_s: float) -> None:
    """Remove what was put for a job that ends. Raises as `get_shipping`."""
    client = _client()
    if client is not None:
        client.internal_kv_del(_prefix(run_id, job_id), True, _ENCODED, timeout_s)


def _prefix(run_id: str, job_id: str) -> bytes:
    return f"skyrl-otel/{run_id}/{job_id}/".encode()


def _client() -> Any:
    """Ray's own client, which unlike `internal_kv`'s functions takes a time limit; None where we are not connected."""
    from ray.experimental import internal_kv

    return internal_kv.internal_kv_get_gcs_client() if internal_kv._internal_kv_initialized() else None
