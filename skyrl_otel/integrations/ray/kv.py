"""The receiver's address and secret, by the cluster's own key-value store instead of anything Ray writes to a log."""

from __future__ import annotations

from skyrl_otel.spool.token import Shipping

NAMESPACE = "skyrl-otel"


def put_shipping(run_id: str, shipping: Shipping) -> bool:
    """Whether it could be put: false where this process is not connected."""
    from ray.experimental import internal_kv

    if not internal_kv._internal_kv_initialized():
        return False
    internal_kv._internal_kv_put(f"skyrl-otel/{run_id}", shipping.to_json(), overwrite=True, namespace=NAMESPACE)
    return True


def get_shipping(run_id: str) -> Shipping | None:
    """None where it is not there (yet)."""
    from ray.experimental import internal_kv

    if not internal_kv._internal_kv_initialized():
        return None
    found = internal_kv._internal_kv_get(f"skyrl-otel/{run_id}", namespace=NAMESPACE)
    return Shipping.from_json(found) if found else None
