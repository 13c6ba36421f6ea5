"""The process group of a training's workers, listening only on their nodes' own addresses.

PyTorch's rendezvous, `TCPStore`, listens on every interface of rank 0's machine when Ray Train
starts it. Here it gets a socket bound to the node's address: loopback if Ray runs on one machine,
the private address on a cluster.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
_kept: list[TCPStore] = []  # rank 0's store serves as long as its process lives


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's `TorchConfig` with a `backend` that must be named: nccl or gloo."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        place = worker_group.execute_single(0, _open_store)
        worker_group.execute(_point_at, *place)
        worker_group.execute(_set_torch_distributed_env_vars)
        joined = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method="env://",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joined)


def _open_store() -> tuple[str, int]:
    """Start the rendezvous store in this worker; returns its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    port = listening.getsockname()[1]
    store = TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    _kept.append(store)
    return address, port


def _point_at(address: str, port: int) -> None:
    """Make this worker join as a client, as PyTorch does when an agent holds the store."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
    if address == LOOPBACK:  # gloo listens at the address that the machine's name resolves to
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
