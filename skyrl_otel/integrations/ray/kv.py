"""What processes of a job tell each other by the cluster's own key-value store, instead of anything Ray writes to a log:
the receiver's address and secret, and on which nodes the job has had workers.
"""

from __future__ import annotations

from typing import Any

from skyrl_otel.spool.token import Shipping

NAMESPACE = "skyrl-otel"
_ENCODED = NAMESPACE.encode()


def put_shipping(run_id: str, shipping: Shipping) -> bool:
    """Whether it could be put: false where this process is not connected."""
    from ray.experimental import internal_kv

    if not internal_kv._internal_kv_initialized():
        return False
    internal_kv._internal_kv_put(f"skyrl-otel/{run_id}", shipping.to_json(), overwrite=True, namespace=NAMESPACE)
    return True


def get_shipping(run_id: str, timeout_s: float | None = None) -> Shipping | None:
    """None where it is not there (yet). Raises ray.exceptions.RpcError for a GCS that does not answer in time."""
    client = _client()
    found = client.internal_kv_get(f"skyrl-otel/{run_id}".encode(), _ENCODED, timeout_s) if client else None
    return Shipping.from_json(found) if found else None


def announce_node(run_id: str, job_id: str, node: str, timeout_s: float) -> None:
    """Tell the driver that this job has workers on `node`, a host name. Raises as `get_shipping`."""
    client = _client()
    if client is not None:
        client.internal_kv_put(_nodes_prefix(run_id, job_id) + node.encode(), b"", True, _ENCODED, timeout_s)


def announced_nodes(run_id: str, job_id: str, timeout_s: float) -> list[str]:
    """The host names that were announced. Raises as `get_shipping`."""
    client, prefix = _client(), _nodes_prefix(run_id, job_id)
    keys = client.internal_kv_keys(prefix, _ENCODED, timeout_s) if client else []
    return sorted(key[len(prefix) :].decode() for key in keys)


def _nodes_prefix(run_id: str, job_id: str) -> bytes:
    return f"skyrl-otel/{run_id}/nodes/{job_id}/".encode()


def _client() -> Any:
    """Ray's own client, which unlike `internal_kv`'s functions takes a time limit; None where we are not connected."""
    from ray.experimental import internal_kv

    return internal_kv.internal_kv_get_gcs_client() if internal_kv._internal_kv_initialized() else None
