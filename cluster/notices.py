"""Tells Ray of a cloud's notice that this machine will be taken away; runs beside `ray start`.

    python -m cluster.notices --address HEAD:6379 &

Ray hears of a reclaim by itself on Kubernetes alone (SIGTERM to `ray start --block`). On a virtual
machine the notice is at the cloud's metadata service, for whoever asks: two minutes before a spot
instance of AWS ends, half a minute on Google Cloud and Azure. This asks every five seconds and
drains the Ray nodes of this machine; a run then saves a checkpoint and moves off them.

Sources: the clouds' own pages: AWS "Spot Instance interruption notices", Google Cloud "Create and
use preemptible VMs", Azure "Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime

from cluster.local import give_notice
from cluster.targets import Gcs
from pipelines.errors import one_line
from tst_ray.errors import RunError, UserError
from tst_ray.session import show_token

METADATA = "http://169.254.169.254"  # of all three; no name to resolve, and no proxy
_ANSWER_S = 10.0
_BOOT_S = 120.0  # a machine that starts may be sooner than its metadata service
_SHORT_NOTICE_S = 30.0  # what Google Cloud and Azure give at the least

_TROUBLE = (OSError, ValueError, KeyError, http.client.HTTPException)  # no answer, or no sense

Ask = Callable[[str], float | None]
"""Asks a metadata service for the Unix time at which this machine ends; None: no notice.

Raises OSError where the service does not answer, or is another cloud's.
"""


def ask_aws(metadata: str) -> float | None:
    """A spot instance's `instance-action`, which is not there until there is a notice."""
    token = _fetch(
        f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT"
    )
    try:
        answer = _fetch(
            f"{metadata}/latest/meta-data/spot/instance-action",
            {"X-aws-ec2-metadata-token": token},
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(json.loads(answer)["time"]).timestamp()


def ask_gcp(metadata: str) -> float | None:
    """Whether a spot machine is `preempted` already; it ends half a minute after that."""
    answer = _fetch(
        f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
    )
    return time.time() + _SHORT_NOTICE_S if answer.strip() == "TRUE" else None


def ask_azure(metadata: str) -> float | None:
    """The scheduled event `Preempt` of this machine; other machines of its set are listed too."""
    header = {"Metadata": "true"}
    listed = json.loads(
        _fetch(f"{metadata}/metadata/scheduledevents?api-version=2020-07-01", header)
    )
    preempted = [event for event in listed["Events"] if event["EventType"] == "Preempt"]
    if not preempted:
        return None
    name = _azure_name(metadata)
    ends = [event["NotBefore"] for event in preempted if name in event["Resources"]]
    if not ends:
        return None
    if "" in ends:  # it has begun
        return time.time()
    return min(parsedate_to_datetime(end).timestamp() for end in ends)


def _azure_name(metadata: str) -> str:
    url = f"{metadata}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    return _fetch(url, {"Metadata": "true"}).strip()


CLOUDS: dict[str, Ask] = {"aws": ask_aws, "gcp": ask_gcp, "azure": ask_azure}


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """What a metadata service answers. Raises OSError, such as HTTPError."""
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_ANSWER_S) as answer:
        return str(answer.read().decode())


def which_cloud(metadata: str, wait_s: float = _BOOT_S) -> str:
    """The cloud that this machine is of, by who answers.

    Azure's list of events takes minutes to answer for the first time; its name does not.

    Raises:
        RunError: none does, for so long.
    """
    probes: dict[str, Callable[[str], object]] = CLOUDS | {"azure": _azure_name}
    deadline = time.monotonic() + wait_s
    while True:
        for name, probe in probes.items():
            with contextlib.suppress(*_TROUBLE):
                probe(metadata)
                return name
        if time.monotonic() >= deadline:
            raise RunError(f"{metadata}: no cloud's metadata service answers there; give --cloud")
        time.sleep(1.0)


def nodes_here(address: str) -> list[str]:
    """The Ray nodes of this machine that can be drained: all but the head."""
    from ray.util import get_node_ip_address

    here, gcs = get_node_ip_address(address), Gcs(address)
    losable = set(gcs.losable_nodes())
    return [
        node["NodeID"]
        for node in gcs.nodes()
        if node["NodeManagerAddress"] == here and node["NodeID"] in losable
    ]


def watch(address: str, ask: Ask, metadata: str, every_s: float, say: Callable[[str], None]) -> int:
    """Wait for a notice and pass it on; how many nodes were drained.

    What does not answer is asked again: a head that is busy, a metadata service that has no time.
    The head is asked before there is a notice: a wrong address, or a token that is not here, would
    show too late.
    """
    from ray.exceptions import RayError

    told, heard = "", False
    while True:
        try:
            if not heard:
                nodes_here(address)
                heard = True
            end = ask(metadata)
            if end is not None and (nodes := nodes_here(address)):
                for node in nodes:
                    give_notice(address, node, max(end - time.time(), 0.0))
                    say(f"node {node}: its machine is taken in {end - time.time():.0f} s; drained")
                return len(nodes)
            trouble = "" if end is None else "this machine is taken, and has no Ray node to drain"
        except RayError as error:
            trouble = (
                f"{address}: the head does not answer ({one_line(error)}); if it asks for a token, "
                "put its own into ~/.ray/auth_token here"
            )
        except (*_TROUBLE, RuntimeError) as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble and trouble != told:
            told = trouble
            say(f"will ask again: {trouble}")
        time.sleep(every_s)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.notices",
        description="Tell Ray when the cloud says that this machine will be taken away.",
        allow_abbrev=False,
    )
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="the cluster's head")
    parser.add_argument("--cloud", choices=CLOUDS, help="(default: whichever answers)")
    parser.add_argument(
        "--metadata", default=METADATA, metavar="URL", help=f"(default: {METADATA})"
    )
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="(default: 5)")
    args = parser.parse_args(argv)

    def say(line: str) -> None:
        print(f"notices: {line}", file=sys.stderr, flush=True)

    show_token()
    try:
        cloud = args.cloud or which_cloud(args.metadata)
        say(f"asking {cloud} every {args.every:g} s")
        watch(args.address, CLOUDS[cloud], args.metadata, args.every, say)
    except UserError as error:
        say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
