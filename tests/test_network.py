"""Which network workers talk over, without workers."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tst_ray import network
from tst_ray.group import _torch_config
from tst_ray.network import GLOO_INTERFACE, interface_of, talk_where_ray_does


def test_the_interface_that_has_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("192.0.2.1") is None  # set aside for documents


def test_gloo_is_told_of_rays_interface_unless_the_user_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(network, "interface_of", {"10.0.0.7": "ens5"}.get)
    monkeypatch.setenv(GLOO_INTERFACE, "ib0")
    talk_where_ray_does()
    assert os.environ[GLOO_INTERFACE] == "ib0"
    monkeypatch.delenv(GLOO_INTERFACE)
    talk_where_ray_does()
    assert os.environ[GLOO_INTERFACE] == "ens5"
    monkeypatch.delenv(GLOO_INTERFACE)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.8")
    talk_where_ray_does()
    assert GLOO_INTERFACE not in os.environ


def test_it_is_told_before_the_workers_are_connected() -> None:
    class Connecting(Exception):
        pass

    class Workers:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def execute(self, function: Any, **options: Any) -> None:
            self.told.append(function)

        def execute_single(self, rank: int, function: Any) -> Any:
            raise Connecting

    config = _torch_config("gloo")
    assert config.to_dict()["backend"] == "gloo"
    workers = Workers()
    with pytest.raises(Connecting):
        config.backend_cls().on_start(workers, config)
    assert workers.told == [talk_where_ray_does]
