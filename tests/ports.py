"""Ports to listen at later, which no connection gets in between."""

import contextlib
import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port that the kernel gives to connections, and to those who ask for any port."""


def free_ports(number: int) -> list[int]:
    """Different ports below the kernel's own that nobody listens at now."""
    first, found = int(EPHEMERAL.read_text().split()[0]), []
    for port in random.SystemRandom().sample(range(10_000, first), 1_000):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError(f"no {number} ports from 10000 to {first} are free")
