"""Options of the suite, and how its own process speaks to Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Ray decides once a process whether it shows a token, and clusters of several nodes on one machine
# want none. Runs that tests start as people do (test_runs.py) keep Ray's default.
os.environ["RAY_AUTH_MODE"] = "disabled"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, default=0, help="one long soak of so many faults")


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left_connected() -> Iterator[None]:
    """Disconnect from a Ray that a module's tests left behind: the next module starts its own."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
