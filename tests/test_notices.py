"""A cloud's notice of reclaim reaches Ray: against metadata services that answer as theirs do."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from ray.exceptions import RpcError

from cluster import notices
from cluster.local import LocalCluster
from cluster.notices import ask_aws, ask_azure, ask_gcp, main, which_cloud
from cluster.targets import Gcs
from tests.chaos import PATIENCE_S, ROOT, wait_until
from tst_ray.errors import RunError


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers with `answers[path]`, to whom sends the header that the cloud insists on."""

    answers: dict[str, str]
    insists: tuple[str, str]

    def do_GET(self) -> None:
        name, value = self.insists
        if self.headers.get(name) != value:
            self.send_error(401)
        elif self.path not in self.answers:
            self.send_error(404)
        else:
            self._answer(self.answers[self.path])

    def do_PUT(self) -> None:
        if self.path == "/latest/api/token" and "X-aws-ec2-metadata-token" in self.insists:
            self._answer(self.insists[1])
        else:
            self.send_error(405)

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


class Service:
    """A metadata service of one cloud; `answers` may be changed while it serves."""

    def __init__(self, insists: tuple[str, str], answers: dict[str, str]) -> None:
        self.answers = answers
        handler = type("Handler", (Metadata,), {"insists": insists, "answers": answers})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
NO_NOTICE = {
    "aws": (("X-aws-ec2-metadata-token", "secret"), {}),
    "gcp": (("Metadata-Flavor", "Google"), {PREEMPTED: "FALSE"}),
    "azure": (("Metadata", "true"), {EVENTS: '{"Events": []}', NAME: "vm_1"}),
}


@pytest.fixture
def services() -> Iterator[dict[str, Service]]:
    """One of each cloud, without a notice."""
    found = {name: Service(header, dict(answers)) for name, (header, answers) in NO_NOTICE.items()}
    yield found
    for service in found.values():
        service.close()


def action_at(when: float) -> str:
    return json.dumps(
        {"action": "terminate", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))}
    )


def test_each_cloud_is_known_by_who_answers(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert which_cloud(service.url) == name
    with pytest.raises(RunError, match="no cloud's metadata service answers there"):
        which_cloud("http://127.0.0.1:9", wait_s=0)


def test_aws_tells_when_it_ends(services: dict[str, Service]) -> None:
    aws = services["aws"]
    assert ask_aws(aws.url) is None
    aws.answers[ACTION] = action_at(1_800_000_000)
    assert ask_aws(aws.url) == 1_800_000_000


def test_google_cloud_tells_that_it_has_begun(services: dict[str, Service]) -> None:
    gcp = services["gcp"]
    assert ask_gcp(gcp.url) is None
    gcp.answers[PREEMPTED] = "TRUE"
    assert ask_gcp(gcp.url) == pytest.approx(time.time() + 30, abs=5)


def azure_events(*events: dict[str, Any]) -> str:
    return json.dumps({"DocumentIncarnation": 2, "Events": list(events)})


def test_azure_tells_of_this_machine_and_of_others(services: dict[str, Service]) -> None:
    azure = services["azure"]
    reclaim = {"EventType": "Preempt", "Resources": ["vm_2"], "NotBefore": formatdate(2e9)}
    reboot = {"EventType": "Reboot", "Resources": ["vm_1"], "NotBefore": formatdate(2e9)}
    azure.answers[EVENTS] = azure_events(reclaim, reboot)
    assert ask_azure(azure.url) is None
    azure.answers[EVENTS] = azure_events(reboot, reclaim | {"Resources": ["vm_1", "vm_2"]})
    assert ask_azure(azure.url) == 2e9
    azure.answers[EVENTS] = azure_events(reclaim | {"Resources": ["vm_1"], "NotBefore": ""})
    assert ask_azure(azure.url) == pytest.approx(time.time(), abs=5)


def test_a_service_that_fails_is_no_notice(services: dict[str, Service]) -> None:
    for ask, cloud in ((ask_aws, "gcp"), (ask_gcp, "azure"), (ask_azure, "aws")):
        with pytest.raises(urllib.error.HTTPError):
            ask(services[cloud].url)


def test_a_service_that_is_not_there_yet_is_waited_for(
    services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    gcp = services["gcp"]
    late = gcp.answers.pop(PREEMPTED)
    monkeypatch.setattr(notices.time, "sleep", lambda _: gcp.answers.update({PREEMPTED: late}))
    assert which_cloud(gcp.url) == "gcp"


def test_azures_events_need_not_answer_for_azure_to_be_known(services: dict[str, Service]) -> None:
    azure = services["azure"]
    del azure.answers[EVENTS]
    assert which_cloud(azure.url, wait_s=0) == "azure"


def test_a_notice_is_kept_until_it_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head does not answer, then knows no node of this machine, then rejects, then drains."""
    answers = iter([RpcError("unavailable"), [], [], ["n1"], ["n1"]])
    passed: list[str] = []
    said: list[str] = []

    def nodes(address: str) -> list[str]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def give(address: str, node: str, deadline_s: float) -> None:
        passed.append(node)
        if len(passed) == 1:
            raise RuntimeError("the notice is not accepted")

    monkeypatch.setattr(notices, "nodes_here", nodes)
    monkeypatch.setattr(notices, "give_notice", give)
    assert notices.watch("head:6379", lambda _: time.time() + 100, "", 0.0, said.append) == 1
    assert passed == ["n1", "n1"]
    assert [line.split(":")[0] for line in said] == ["will ask again"] * 3 + ["node n1"]
    assert "head:6379: the head does not answer (unavailable)" in said[0]
    assert "~/.ray/auth_token" in said[0]
    assert "has no Ray node to drain" in said[1]


def test_the_head_is_asked_before_there_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address or token would show too late; once it has answered, it is left alone."""
    asked: list[str] = []
    notices_to_come = iter([None, None, time.time() + 100])

    def nodes(address: str) -> list[str]:
        asked.append(address)
        return ["n1"]

    def ask(metadata: str) -> float | None:
        seen.append(len(asked))
        return next(notices_to_come)

    seen: list[int] = []
    monkeypatch.setattr(notices, "nodes_here", nodes)
    monkeypatch.setattr(notices, "give_notice", lambda *args: None)
    assert notices.watch("head:6379", ask, "", 0.0, lambda line: None) == 1
    assert seen == [1, 1, 1] and len(asked) == 2


def test_the_head_is_shown_the_users_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[bool] = []
    monkeypatch.setattr(notices, "show_token", lambda: shown.append(True))
    monkeypatch.setattr(notices, "watch", lambda *args: len(shown))
    assert main(["--address=head:6379", "--cloud=aws"]) == 0
    assert shown == [True]
    assert capsys.readouterr().err == "notices: asking aws every 5 s\n"


def test_nobody_to_ask_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which_cloud, "__defaults__", (0.0,))
    assert main(["--address=127.0.0.1:6379", "--metadata=http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("notices: http://127.0.0.1:9: no cloud's")


@pytest.mark.slow
def test_the_nodes_of_the_machine_are_drained(services: dict[str, Service]) -> None:
    """The command as it stands beside `ray start`: it waits, sees the notice, drains, and ends."""
    aws = services["aws"]
    with LocalCluster(head_cpus=1) as cluster:
        node, gcs = cluster.add_node(1), Gcs(cluster.address)
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.notices", f"--address={cluster.address}",
             f"--metadata={aws.url}", "--every=0.1"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "notices: asking aws every 0.1 s\n"
            assert gcs.losable_nodes() == [node]
            aws.answers[ACTION] = action_at(time.time() + 120)
            wait_until(lambda: gcs.losable_nodes() == [], "the drain of the node")
            assert process.wait(timeout=PATIENCE_S) == 0
            assert process.stderr.read().startswith(f"notices: node {node}: its machine is taken")
        finally:
            process.kill()
            process.communicate()
