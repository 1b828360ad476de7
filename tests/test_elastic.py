"""How many workers, and when more of them pay: tables of numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tst_ray.elastic import Growth, Node, growth_pays, workers_that_fit

CPU = {"CPU": 1.0}


def nodes(*cpus: float, gpus: float = 0.0) -> list[Node]:
    return [Node(f"n{i}", {"CPU": c, "GPU": gpus}) for i, c in enumerate(cpus)]


@pytest.mark.parametrize(
    ("cpus", "per_worker", "data_cpus", "most", "fit"),
    [
        ([4], 1.0, 1, 8, 3),  # Ray Data keeps its CPU
        ([4, 4], 1.0, 1, 8, 7),
        ([4, 4], 1.0, 1, 3, 3),
        ([4, 4], 3.0, 1, 8, 2),  # one a node, and what is left serves Ray Data
        ([2, 2], 2.0, 1, 8, 1),  # both would fit, but Ray Data would starve
        ([1], 1.0, 1, 8, 0),
        ([], 1.0, 1, 8, 0),
        ([0.5, 0.5], 0.25, 0.25, 8, 3),
    ],
)
def test_workers_fit_beside_ray_data(
    cpus: list[float], per_worker: float, data_cpus: float, most: int, fit: int
) -> None:
    assert workers_that_fit(nodes(*cpus), {"CPU": per_worker}, data_cpus, most) == fit


def test_a_worker_lies_on_one_node() -> None:
    wanted = {"CPU": 2.0, "GPU": 1.0}
    assert workers_that_fit(nodes(8, 8, gpus=1), wanted, 1, 8) == 2
    assert workers_that_fit(nodes(1, 1, 1, 1, gpus=1), wanted, 1, 8) == 0


GROWTH = Growth(
    world_size=2, possible=4, num_sequences=16, step_s=1.0, measured={}, steps_left=1000,
    restart_s=20.0, since_resize_s=600.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "pays"),
    [
        ({}, True),  # half of 1,000 s saved, against 20
        ({"steps_left": 70}, False),  # 35 s saved are no two times 20
        ({"steps_left": 90}, True),
        ({"restart_s": 300.0}, False),
        ({"possible": 2}, False),
        ({"possible": 1}, False),
        ({"since_resize_s": 30.0}, False),  # hysteresis
        ({"measured": {4: 0.99}}, False),  # it was tried, and is hardly faster
        ({"measured": {4: 0.1}, "steps_left": 50}, True),
        ({"num_sequences": 2}, False),  # no rank would have less to do
        ({"world_size": 3, "num_sequences": 4}, True),  # the fullest rank: 2 sequences, then 1
        ({"world_size": 3, "num_sequences": 5}, False),  # 2 sequences, then 2
    ],
)
def test_growth_pays(change: dict[str, object], pays: bool) -> None:
    growth = replace(GROWTH, **change)  # type: ignore[arg-type]
    assert growth_pays(growth, gain=2.0, settle_s=60.0) == pays


def test_without_a_gain_to_reach_all_that_fits_is_taken_in() -> None:
    slower = replace(GROWTH, measured={4: 9.0})
    assert growth_pays(slower, gain=0.0, settle_s=60.0)
    assert not growth_pays(replace(slower, since_resize_s=1.0), gain=0.0, settle_s=60.0)
    assert not growth_pays(replace(slower, possible=2), gain=0.0, settle_s=60.0)


def test_what_is_expected_follows_the_fullest_rank() -> None:
    assert GROWTH.expected_step_s == 0.5
    assert replace(GROWTH, num_sequences=5).expected_step_s == pytest.approx(2 / 3)
    assert replace(GROWTH, measured={4: 0.7}).expected_step_s == 0.7
    assert GROWTH.saved_s == 500.0
