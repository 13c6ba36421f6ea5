"""Which addresses processes listen at."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Socket:
    """A listening TCP socket and the program that has it."""

    address: str
    port: int
    program: str

    @property
    def on_loopback(self) -> bool:
        ip = ipaddress.ip_address(self.address)
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return (mapped or ip).is_loopback


def listening(processes: Iterable[psutil.Process]) -> list[Socket]:
    """The listening sockets of these processes; those that end meanwhile have none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            program = " ".join(process.cmdline())[:200]
            held = [s for s in process.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
            found += [Socket(s.laddr.ip, s.laddr.port, program) for s in held]
    return found


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started."""
    return [process, *process.children(recursive=True)]
