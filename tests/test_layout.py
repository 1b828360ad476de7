"""The house: what may import what, and what every module says of itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIST = """
    errors derived_fields yaml_text signing settings checks environment config timeouts goodput
    plan estimates machine storage corpus chunked_loss bag_kernels superposition router
    model_config trial architecture pretrained model optim dcp_metadata checkpoint sharded
    checkpointer guard background curves metrics watchdog journal job batches speed saving
    worker elastic suspects network interrupts forkclient forkserver autoscaler nodes
    host_memory session hold liveness runstore sight memory reading group room growth stage
    display shape origins outlook preview reference exported export tasks coordinator report
    bench cli run
"""
ORDER = LIST.split()
MODULES = sorted(
    path
    for room in ("tst_ray", "tst_ray/bench", "pipelines", "cluster")
    for path in (ROOT / room).glob("*.py")
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_pipelines_import_nothing_of_tst_ray() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("tst_ray")], path.name


def test_what_trains_imports_nothing_that_breaks_clusters() -> None:
    for path in MODULES:
        if path.parent.name != "cluster":
            ours = [name for name in imports(path) if name.split(".")[0] == "cluster"]
            assert not ours, path.name


def test_a_module_imports_only_what_stands_above_it() -> None:
    for path in (ROOT / "tst_ray").glob("*.py"):
        if path.stem == "__init__":
            continue
        above = ORDER[: ORDER.index(path.stem)]
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("tst_ray.")}
        assert ours <= set(above), f"{path.name} imports {ours - set(above)}"


def test_a_bench_is_used_by_the_command_line_alone() -> None:
    for path in (ROOT / "tst_ray").glob("*.py"):
        if path.name != "cli.py":
            assert not [name for name in imports(path) if name.startswith("tst_ray.bench")]


def test_few_modules_import_ray_train() -> None:
    users = {path.name for path in MODULES if any(n.startswith("ray.train") for n in imports(path))}
    assert users == {"group.py", "reading.py", "autoscaler.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_module_is_one_documented_room(path: Path) -> None:
    source = path.read_text()
    assert source == "" or ast.get_docstring(ast.parse(source)), "has no docstring"
    assert source.count("\n") <= 500, "is longer than one room"
