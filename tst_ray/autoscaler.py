"""A run's request to its cluster's autoscaler, beside those of others.

    ask, let_go ──> Ray's coordinator: an actor that merges all requests, each with its expiry
               └──> ray.autoscaler.sdk, if this Ray has no such coordinator (`is_coordinated`)

An autoscaler knows one request only, the last one. Ray Train and Ray Data ask through the
coordinator, which sends the merged requests every 20 s and whenever one changes. A request that is
sent past it is therefore lost after seconds, and nodes that are idle by then are taken away and
ordered anew. Through the coordinator, two runs on one cluster add up, and the request of a killed
driver expires.

All of this is Ray's own business (2.60), and only here is it known:

- `get_or_create_autoscaling_coordinator`, and the actor's `request_resources` and `cancel_request`;
- a scaling policy's `_send_resource_request` and `_maybe_send_resource_request`, by which Ray Train
  asks for each group's workers, and a trainer's `_initialize_and_run_controller`, which is given
  that policy: requests add up, and the run has asked for these workers already.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from tst_ray.settings import Config

EXPIRES_S = 60.0
"""How long a request is kept that is not repeated; a driver repeats it every 10 s at the latest."""

_ANSWER_S = 5.0
_SENT = {"requester_id", "resources", "expire_after_s", "label_selectors", "priority"}


def requester(config: Config) -> str:
    """The name of a run's request: its next driver, on another machine too, takes it over."""
    where = hashlib.sha256(str(config.run.storage).encode()).hexdigest()[:12]
    return f"tst_ray-{config.run.name}-{where}"


def ask(
    name: str, bundles: Sequence[Mapping[str, float]], selectors: Sequence[Mapping[str, str]]
) -> None:
    """Ask for room for these bundles, in place of what was asked under this name before.

    Args:
        name: of the request; see `requester`.
        bundles: resources that one node must have together.
        selectors: each bundle's label selector.

    Raises:
        ray.exceptions.RayError: the cluster does not answer.
    """
    if not is_coordinated():
        _ask_alone(bundles, selectors)
        return
    module = _coordinator_module()
    _call(
        "request_resources",
        requester_id=name,
        resources=[dict(bundle) for bundle in bundles],
        expire_after_s=EXPIRES_S,
        label_selectors=[dict(selector) for selector in selectors],
        # As Ray Train's own: Ray Data takes for its own what is left.
        priority=module.ResourceRequestPriority.HIGH,
    )


def let_go(name: str) -> None:
    """Take back what was asked under a name; nothing, if that has expired or never was.

    Raises:
        ray.exceptions.RayError: the cluster does not answer.
    """
    if is_coordinated():
        _call("cancel_request", requester_id=name)
    else:
        _ask_alone([], [])


def leave_to_the_run(options: dict[str, Any]) -> None:
    """Have a group of Ray Train ask for no nodes: the run does.

    Args:
        options: what Ray Train's trainer makes its controller of; its scaling policy is changed.
    """
    policy = options.get("scaling_policy")
    if policy is not None and is_coordinated():
        policy._send_resource_request = policy._maybe_send_resource_request = _nothing


def _nothing() -> None:
    """Stands in for a request; a function of a module, since it travels to the controller."""


@functools.cache
def is_coordinated() -> bool:
    """Whether this Ray has all that is needed to ask through its coordinator."""
    try:
        from ray.train.torch import TorchTrainer
        from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

        actor = _coordinator_module()._AutoscalingCoordinatorActor
        asks, cancels = (
            inspect.signature(method).parameters
            for method in (actor.request_resources, actor.cancel_request)
        )
        _ = _coordinator_module().ResourceRequestPriority.HIGH
        _ = _coordinator_module().get_or_create_autoscaling_coordinator
        _ = (
            FixedScalingPolicy._send_resource_request,
            FixedScalingPolicy._maybe_send_resource_request,
        )
        _ = TorchTrainer._initialize_and_run_controller
    except (ImportError, AttributeError):
        return False
    return asks.keys() >= _SENT and "requester_id" in cancels


def _coordinator_module() -> Any:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

    return default_autoscaling_coordinator


def _call(method: str, **arguments: Any) -> None:
    """Have the coordinator do something, and hear whether it could.

    One that starts on a busy node may take longer; it does it all the same.
    """
    import ray

    actor = _coordinator_module().get_or_create_autoscaling_coordinator()
    answers, _ = ray.wait([getattr(actor, method).remote(**arguments)], timeout=_ANSWER_S)
    ray.get(answers)


def _ask_alone(
    bundles: Sequence[Mapping[str, float]], selectors: Sequence[Mapping[str, str]]
) -> None:
    """Ask past the coordinator: for good, and in place of everybody else's request.

    See https://docs.ray.io/en/latest/cluster/running-applications/autoscaling/reference.html.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=list(bundles), bundle_label_selectors=list(selectors))
