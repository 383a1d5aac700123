"""A free port of this node for ranks to meet at. Imports no torch."""

import socket

PORTS = range(12_000, 30_000)  # below those that Linux gives to outgoing connections, which could take it before rank 0 listens


def free(first: int) -> int:
    """The first free one from the `first`-th of PORTS on, around its end; starts that begin apart seldom meet."""
    for shift in range(len(PORTS)):
        port = PORTS[(first + shift) % len(PORTS)]
        with socket.socket() as candidate:
            try:
                candidate.bind(("", port))
                return port
            except OSError:
                continue
    raise RuntimeError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on this node")
