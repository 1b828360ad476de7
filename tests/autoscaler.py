"""A Ray cluster on this machine with a real autoscaler, which orders raylets for machines.

    with AutoscaledCluster(folder, most=6, idle_s=12) as cluster:
        driver = Popen([..., "-m", "tst_ray.run"], env=os.environ | cluster.environment)
        cluster.orders()        when which machine was started, and when it was taken away

Ray's own `AutoscalingCluster` lacks a file in its wheels, and ends every Ray of the machine. Here
Ray's fake provider is given as an external one; `RecordingProvider` writes down what it is told.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)
from ray.autoscaler.v2.sdk import get_cluster_status

from cluster.local import _free_port
from cluster.processes import end_tree, is_running
from tests.chaos import wait_until

ROOT = Path(__file__).parent.parent
HEAD = "ray.head.default"
_NOTHING = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
_OBJECT_STORE_BYTES = 100 << 20


class RecordingProvider(FakeMultiNodeProvider):
    """Starts a raylet for each machine that is ordered, and writes down which and when."""

    def create_node_with_resources_and_labels(self, *args: Any) -> None:
        time.sleep(self.provider_config["boot_s"])  # in a thread of its own
        super().create_node_with_resources_and_labels(*args)

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        super()._create_node_with_resources_and_labels(*args)
        self._note("started", f"{self._next_node_id:05}")

    def terminate_node(self, node_id: str) -> None:
        self._note("taken away", node_id[-5:])
        super().terminate_node(node_id)

    def _note(self, what: str, machine: str) -> None:
        line = json.dumps({"time": time.time(), "what": what, "machine": machine})
        with open(self.provider_config["orders"], "a") as orders:
            orders.write(line + "\n")


@dataclass(frozen=True)
class Order:
    """What the autoscaler did with one machine.

    Attributes:
        time: when, in seconds since the epoch.
        what: "started" or "taken away".
        machine: its number, from 00001 on.
    """

    time: float
    what: str
    machine: str


class AutoscaledCluster:
    """A head without CPUs, and an autoscaler (Ray's second version) of machines with one CPU each.

    Args:
        folder: for its files; Ray's own are elsewhere, at a short path.
        most: how many machines there may be.
        idle_s: how long a machine may be idle before it is taken away.
        boot_s: how long machines take to start.
    """

    def __init__(self, folder: Path, most: int, idle_s: float, boot_s: float = 0.0) -> None:
        from ray._private.services import get_node_ip_address

        self.address = f"{get_node_ip_address()}:{_free_port()}"
        self._orders = folder / "orders.jsonl"
        self._ray_folder = tempfile.mkdtemp(prefix="ray-")
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(self._config(most, idle_s, boot_s)))
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0"),
            *(f"--autoscaling-config={config}", "--include-dashboard=false"),
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
        ]
        self._log = (folder / "head.log").open("w")
        self._head = subprocess.Popen(
            command,
            env=os.environ | self._head_environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(self._answers, "the head answers")
        except BaseException:
            self.shutdown()
            raise

    def __enter__(self) -> AutoscaledCluster:
        return self

    def __exit__(self, *details: object) -> None:
        self.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """What a driver's process needs in its environment to join this cluster."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def orders(self) -> list[Order]:
        """What the autoscaler did so far, in order."""
        if not self._orders.exists():
            return []
        return [Order(**json.loads(line)) for line in self._orders.read_text().splitlines()]

    def machines(self) -> set[str]:
        """The machines that were ordered and not taken away."""
        orders = self.orders()
        gone = {order.machine for order in orders if order.what == "taken away"}
        return {order.machine for order in orders} - gone

    def wait_until_empty(self) -> None:
        """Wait until all machines are taken away: nobody asks for any."""
        wait_until(lambda: not self.machines(), "the machines are taken away")

    def shutdown(self) -> None:
        """End every process of the cluster and remove Ray's files."""
        ended = end_tree(self._head.pid)
        self._head.wait()
        wait_until(lambda: not any(map(is_running, ended)), "the cluster's processes end")
        self._log.close()
        rmtree(self._ray_folder, ignore_errors=True)

    def _answers(self) -> bool:
        """Whether the head's raylet has joined; the client would wait long for a port not open."""
        assert self._head.poll() is None, self.said()
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError:
            return False
        status = get_cluster_status(self.address)
        return bool(status.active_nodes or status.idle_nodes)

    def said(self) -> str:
        """What the head printed."""
        return Path(self._log.name).read_text()

    def _head_environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),  # the provider is one of the tests' modules
            "RAY_TMPDIR": self._ray_folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }

    def _config(self, most: int, idle_s: float, boot_s: float) -> dict[str, Any]:
        resources = {"CPU": 1, "object_store_memory": _OBJECT_STORE_BYTES}
        return {
            "cluster_name": "fake",
            "max_workers": most,
            "idle_timeout_minutes": idle_s / 60,
            "provider": {
                "type": "external",
                "module": f"{__name__}.{RecordingProvider.__name__}",
                "orders": str(self._orders),
                "boot_s": boot_s,
                "gcs_address": self.address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,  # else it tries ssh
                "disable_launch_config_check": True,
            },
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in _NOTHING},
            "file_mounts_sync_continuously": False,
            "upscaling_speed": 1.0,
            "head_node_type": HEAD,
            "available_node_types": {
                HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "machine": {
                    "resources": resources,
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": most,
                },
            },
        }
