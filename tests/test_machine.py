"""What a machine has, and whether a model fits into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_bad_input import arguments
from tests.test_plan import SHAPE, first_phase, plan_of
from tests.test_runs import write_text
from tst_ray import host_memory, nodes
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.elastic import Node
from tst_ray.errors import ConfigError
from tst_ray.estimates import Host, gpu_problem, memory_per_worker, memory_problem
from tst_ray.host_memory import check_memory
from tst_ray.machine import check_gpu, memory_limit
from tst_ray.plan import build_plan

GIB = 2**30
BILLION = replace(SHAPE, parameters=10**9, active_parameters=10**9, hidden_size=64)


# -- the limit ---------------------------------------------------------------------------------


def groups(folder: Path, line: str, limits: dict[str, str]) -> tuple[Path, Path]:
    own = folder / "own"
    own.write_text(f"5:devices:/\n{line}\n")
    for name, value in limits.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value)
    return folder, own


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "4096\n", "a/memory.max": "max\n"}, 4096),
        ("0::/a/b", {"a/b/memory.max": "8192\n", "a/memory.max": "4096\n"}, 4096),
        ("0::/", {"memory.max": "4096\n"}, 4096),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "4096\n"}, 4096),
        ("4:cpu,memory:/a", {"memory/memory.limit_in_bytes": "4096\n"}, 4096),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("0::/a", {}, None),
        ("4:cpu:/a", {"memory.max": "4096\n"}, None),
    ],
)
def test_the_least_of_all_groups_above_a_process_holds(
    tmp_path: Path, line: str, limits: dict[str, str], expected: int | None
) -> None:
    physical = memory_limit(tmp_path, tmp_path / "none")
    assert physical > GIB // 8
    assert memory_limit(*groups(tmp_path, line, limits)) == (expected or physical)


# -- hosts -------------------------------------------------------------------------------------


def problem(hosts: list[Host], workers: Any = 1, **options: Any) -> str | None:
    phase = first_phase(f"--cluster.workers={workers}")
    plan = plan_of(f"--cluster.workers={workers}", "--train.steps=100")
    train = load_config(None).train
    return memory_problem(BILLION, plan, phase, train, hosts, **options)


def test_one_machine_holds_all_workers() -> None:
    """16 bytes a parameter: 14.9 GiB, however many share them, and what each has gathered."""
    assert problem([Host(16 * GIB, 1)]) is None
    told = str(problem([Host(14 * GIB, 1)]))
    assert "phase 1 does not fit into memory: one worker needs about 14.9 GiB, and this" in told
    assert "machine has 14.0 GiB; give a smaller model" in told
    assert problem([Host(16 * GIB, 2)], workers=2) is None
    assert "2 workers need about 14.9 GiB" in str(problem([Host(14 * GIB, 2)], workers=2))


def test_nodes_hold_what_fits_into_each() -> None:
    assert problem([Host(8 * GIB, 1)] * 2, workers=2) is None
    assert "each, and the largest node has 7.0 GiB" in str(problem([Host(7 * GIB, 1)] * 2, 2))
    assert problem([Host(4 * GIB, 4), Host(20 * GIB, 4)], workers=2) is None
    assert problem([Host(7 * GIB, 1)] * 3, workers=[2, 3]) is None  # the more, the less each


def test_the_whole_model_is_made_on_one_machine() -> None:
    """4 bytes a parameter, and rank 0's own share of them."""
    told = str(problem([Host(4 * GIB, 1)] * 8, workers=8))
    assert "making the whole model takes 4.2 GiB on one machine, and the largest node" in told
    assert problem([Host(5 * GIB, 1)] * 8, workers=8) is None
    assert problem([Host(4 * GIB, 8)], workers=8, on_gpus=True) is None  # no more is there
    assert "making the whole model takes 3.7 GiB" in str(
        problem([Host(3 * GIB, 8)], workers=8, on_gpus=True)
    )


def test_a_driver_asks_its_machine_or_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["--cluster.workers=1"])
    plan = build_plan(config)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(host_memory, "memory_limit", lambda: 8 * GIB)
    with pytest.raises(ConfigError, match=r"phase 1 .* this machine has 8\.0 GiB"):
        check_memory(config, plan, BILLION, step=0)
    with pytest.raises(ConfigError, match="phase 2"):
        check_memory(config, plan, BILLION, step=plan.phases[0].last_step)
    check_memory(config, plan, BILLION, step=plan.total_steps)
    check_memory(config, plan, SHAPE, step=0)
    growing = load_config(None, ["--cluster.workers=1", "--cluster.wait_s=9"])
    check_memory(growing, plan, BILLION, step=0)

    resources = {"CPU": 4.0, "memory": 10.0 * GIB, "object_store_memory": 2.0 * GIB}
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(nodes, "nodes_for_workers", lambda config: [Node("a", resources)])
    with pytest.raises(ConfigError, match=r"this machine has 12\.0 GiB"):
        check_memory(config, plan, BILLION, step=0)
    monkeypatch.setattr(nodes, "nodes_for_workers", lambda config: [Node("a", {"CPU": 4.0})])
    check_memory(config, plan, BILLION, step=0)  # how much it has, it does not say


def test_a_run_is_refused_before_its_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_memory, "memory_limit", lambda: 1 << 16)
    assert main(["run", *arguments(tmp_path, write_text(tmp_path / "text"))]) == 2
    said = capfd.readouterr()
    assert "does not fit into memory" in said.err
    assert "tokeniz" not in said.out


# -- GPUs --------------------------------------------------------------------------------------


def test_a_gpu_holds_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, train = plan_of("--train.steps=100"), load_config(None).train
    phase = plan.phases[0]
    need = memory_per_worker(BILLION, plan, phase, 1, train)["total"]
    assert gpu_problem(BILLION, plan, phase, 1, train, need) is None
    told = str(gpu_problem(BILLION, plan, phase, 1, train, need - GIB))
    assert "each of 1 worker(s) needs about 14.9 GiB, and its GPU has 13.9 GiB" in told
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, need - GIB))
    with pytest.raises(ConfigError, match="its GPU has"):
        check_gpu("cuda", BILLION, plan, plan.phases, 1, train)
    check_gpu("cuda", BILLION, plan, [], 1, train)
    check_gpu("cuda", BILLION, plan, plan.phases, 2, train)  # no phase has two workers
