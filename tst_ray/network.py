"""Which network the workers of a group talk over: the one that Ray does."""

from __future__ import annotations

import os

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def talk_where_ray_does() -> None:
    """Have gloo use the interface of Ray's address in this process, unless one is named already.

    By itself gloo takes the address that the machine's own name stands for. On many machines that
    is one which no other reaches (Debian's 127.0.1.1), and on some the wrong one of several. NCCL
    looks at all interfaces, and needs no help.
    """
    import ray.util

    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(GLOO_INTERFACE, interface)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address; None where none has."""
    import ray  # noqa: F401  brings psutil along, where it is not installed
    import psutil  # isort: skip

    for name, addresses in psutil.net_if_addrs().items():
        if any(address == found.address for found in addresses):
            return str(name)
    return None
