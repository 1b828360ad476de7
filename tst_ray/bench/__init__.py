"""Measurements of what a run costs on this machine: `tst-ray bench NAME [--json]`.

measure.py   figures, fair timing, bytes alive
kernels.py   loss, embed           superposition's own arithmetic
data.py      tokenize, ingest, scale
saving.py    checkpoint
runs.py      startup, step, switch, recovery: whole runs
model.py     mfu                   whole steps of the shipped models
"""

from __future__ import annotations

import importlib
from typing import Any

BENCHES = {
    "loss": "kernels",
    "embed": "kernels",
    "step": "runs",
    "ingest": "data",
    "checkpoint": "saving",
    "switch": "runs",
    "startup": "runs",
    "scale": "data",
    "tokenize": "data",
    "recovery": "runs",
    "mfu": "model",
}
"""Every bench, and the module that it is in."""


def run_bench(name: str) -> dict[str, Any]:
    """Measure; plain values: `bench`, `figures` and what they were measured on."""
    from tst_ray.bench.measure import machine

    measure = getattr(importlib.import_module(f"tst_ray.bench.{BENCHES[name]}"), name)
    return {"bench": name, "figures": [f.to_dict() for f in measure()], **machine()}


def print_bench(facts: dict[str, Any]) -> None:
    """The figures as a table, and what they were measured on."""
    from rich.table import Table

    from tst_ray.display import plain_console

    console = plain_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(facts["bench"])
    table.add_column("measured", justify="right")
    table.add_column("to reach", justify="right")
    for figure in facts["figures"]:
        table.add_row(
            figure["what"], f"{_number(figure['value'])} {figure['unit']}".strip(), _goal(figure)
        )
    console.print(table)
    on = {key: value for key, value in facts.items() if key not in ("bench", "figures") and value}
    console.print(", ".join(f"{key} {value}" for key, value in on.items()))


def _goal(figure: dict[str, Any]) -> str:
    if figure["reached"] is None:
        return ""
    goal = (
        f"≤ {figure['at_most']:g}" if figure["at_most"] is not None else f"≥ {figure['at_least']:g}"
    )
    return goal if figure["reached"] else f"{goal}  missed"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
