"""The address under which this node's collector is reached by the run's other nodes."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # linux/sockios.h
# Where `ray start` and `ray.init` note the cluster's GCS address (ray/_private/utils.py, write_ray_address).
_RAY_CURRENT_CLUSTER = "ray_current_cluster"
# TEST-NET-1 (RFC 5737): routed by the default route, and nobody's. connect(2) on UDP sends no packet.
_ANYWHERE = ("192.0.2.1", 9)


def find(environ: Mapping[str, str], *, given: str = "") -> str:
    """An IPv4 address (or what the user gave) of this node.

    `given` wins. Else the address from which this node reaches the Ray cluster it is to join; else the one it uses on
    its default route; else that of its first interface; a node without any network is alone, on 127.0.0.1.
    """
    if given:
        return given
    for peer in (*_ray_peers(environ), _ANYWHERE):
        address = _address_towards(*peer)
        if address:
            return address
    return _first_interface() or _LOOPBACK


def _ray_peers(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    texts = [environ.get("RAY_ADDRESS", "")]
    folder = Path(environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    try:
        texts.append((folder / _RAY_CURRENT_CLUSTER).read_text())
    except (OSError, ValueError):
        pass
    peers = []
    for text in texts:
        host, colon, port = text.strip().rpartition(":")
        if colon and port.isdigit() and 0 < int(port) < 65536 and "/" not in host:
            peers.append((host.strip("[]"), int(port)))
    return peers


def _address_towards(host: str, port: int) -> str:
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
    except OSError:
        return ""
    # A Ray head on this very node is reached over loopback where it listens there: nobody else is in that cluster.
    return "" if ipaddress.ip_address(address.partition("%")[0]).is_unspecified else address


def _first_interface() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(name)[:15]))
            except OSError:
                continue
            address = socket.inet_ntoa(reply[20:24])
            if not address.startswith("127."):
                return address
    return ""
