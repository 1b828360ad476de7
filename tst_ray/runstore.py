"""The run directory: opening it once, for one driver, and only for the run it belongs to.

    config.yaml  plan.json     written before the first step: the run's identity, with all fields
                               of its model
    manifest.json              the shards that it began with
    driver.lock                who drives it now (hold.py)

Settings are for this user and group alone: config.yaml, plan.json and the curves, which show the
config, too. The rest is as the umask says: others may read how a run does, and its model.

`open_run` checks all of that before anything starts. See "The run directory" in the README.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipelines.order import ORDER_VERSION
from tst_ray.checkpoint import newest_step
from tst_ray.config import diff
from tst_ray.errors import ConfigError, RunError
from tst_ray.hold import Hold, hold
from tst_ray.metrics import EVENTS
from tst_ray.plan import build_plan
from tst_ray.settings import Config
from tst_ray.storage import Storage, patiently
from tst_ray.yaml_text import read_yaml

CONFIG, PLAN, MANIFEST = "config.yaml", "plan.json", "manifest.json"


def run_storage(config: Config) -> Storage:
    """The run directory that a config names: <run.storage>/<run.name>."""
    return Storage(config.run.storage) / config.run.name


def check_same_run(run: Storage, config: Config) -> None:
    """Refuse a directory that holds a run with another config, or in another order of the data.

    Raises:
        ConfigError: one line a differing field that would change the run; or the orders' versions.
        RunError: the run's own config cannot be read.
    """
    if patiently(lambda: run.read_json(PLAN)) is None:
        return  # nothing was trained under another config yet
    if (problem := order_problem(run)) and newest_step(run) < build_plan(config).total_steps:
        raise ConfigError(f"run.name = {config.run.name}: {run.url} {problem}")
    lines = diff(config_of(run), config.dump())
    if lines:
        raise ConfigError(
            f"run.name = {config.run.name}: {run.url} holds a run with another config; use another "
            "run.name, or the run's own settings:\n" + "\n".join(f"  {line}" for line in lines)
        )


def order_problem(run: Storage) -> str | None:
    """Why a run cannot train on in this version's order of the data; None if it can."""
    plan = patiently(lambda: run.read_json(PLAN)) or {}
    version = plan.get("order", 1)  # the first one was not noted
    if version == ORDER_VERSION:
        return None
    return (
        f"was begun with version {version} of the data's order, and this tst_ray has version "
        f"{ORDER_VERSION}, which reads other tokens; finish it with the tst_ray that began it, or "
        "use another run.name"
    )


def config_of(run: Storage) -> dict[str, Any]:
    """What a run's config.yaml says. Raises RunError where somebody damaged it."""
    where = run.location(CONFIG)
    try:
        read = read_yaml(run.read(CONFIG), where, as_people_mean_it=False)
    except FileNotFoundError:
        wrong = f"{where}: is gone"
    except ValueError as error:
        wrong = str(error)
    else:
        if isinstance(read, dict):
            return read
        wrong = f"{where}: has no settings"
    raise RunError(f"{wrong}; restore it from a copy, or mend it")


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[tuple[Storage, Hold]]:
    """The run directory, writable, of this config, and held by this driver alone.

    Raises:
        ConfigError: it belongs to another config (nothing is overwritten).
        RunError: it cannot be written, or another driver holds it.
    """
    run = run_storage(config)
    run.check_writable()
    with hold(run) as held:
        check_same_run(run, config)
        if not run.exists(PLAN):
            run.write(CONFIG, config.to_yaml(), private=True)
        yield run, held


def read_events(run: Storage) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return run.read_lines(EVENTS)


def run_key_file(run: Storage) -> str | None:
    """The `checkpoint.key_file` that a run began with; None where it has none, or is no run."""
    if not run.exists(CONFIG):
        return None
    checkpoint = config_of(run).get("checkpoint")
    path = checkpoint.get("key_file") if isinstance(checkpoint, dict) else None
    return path if isinstance(path, str) else None


def kept_model(run: Storage) -> dict[str, Any] | None:
    """The model's fields that the run began with; None before the first step, and in an older
    version's run."""
    fields: dict[str, Any] | None = (run.read_json(PLAN) or {}).get("model")
    return fields
