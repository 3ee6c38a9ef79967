"""Which way to send: a table of protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from skyrl_otel.agent.grpc import GrpcClient
from skyrl_otel.agent.ship import Client, Connection
from skyrl_otel.spool.token import Shipping

_PROTOCOLS: Mapping[str, Callable[[Shipping], Connection]] = {"http/protobuf": Client, "grpc": GrpcClient}


def connect(shipping: Shipping) -> Connection:
    """A connection that is opened when first needed. A protocol that a newer version wrote is taken as http/protobuf."""
    return _PROTOCOLS.get(shipping.protocol, Client)(shipping)
