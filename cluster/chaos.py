"""Faults for a run while it trains: what tests use, and the command line.

    with Injector(run, Faults().fail_at(step=7, rank=1), LocalTarget(cluster)) as injector:
        injector.run(until=lambda: driver.poll() is not None, timeout_s=300)

By hand, against a run on any cluster; without `--really` it only says what it would do:

    python -m cluster.chaos RUN --seed 7 --faults 20 [--kinds kill_worker freeze …]
                            [--first-step N] [--last-step N] [--address HOST:PORT] [--really]

Exit status: 0 done; 1 failed, with one line on standard error; 2 bad usage, before anything is
done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.damage import Ballast, damage
from cluster.faults import CLUSTER_KINDS, DAMAGES, KINDS, OWN_KINDS, Fault, Faults, schedule
from cluster.injector import Injector, last_step, told
from cluster.targets import Impossible, LocalTarget, NotNow, RayTarget, Target
from tst_ray.errors import ConfigError, RunError, UserError
from tst_ray.journal import read_state
from tst_ray.runstore import CONFIG, PLAN
from tst_ray.storage import Storage

__all__ = [
    "DAMAGES",
    "KINDS",
    "Ballast",
    "Fault",
    "Faults",
    "Injector",
    "LocalTarget",
    "RayTarget",
    "damage",
    "main",
    "schedule",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a schedule for a run, or carry it out; the exit status."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        _chaos(args)
    except UserError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("chaos: interrupted; the faults that were not reached do not happen", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.chaos",
        description="Put faults into a run while it trains; without --really, say which.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default: 0)")
    parser.add_argument("--faults", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=OWN_KINDS, metavar="KIND",
        help=f"of {', '.join(KINDS)} (default: {', '.join(OWN_KINDS)})",
    )  # fmt: skip
    parser.add_argument("--first-step", type=int, metavar="N", help="(default: the run's next)")
    parser.add_argument("--last-step", type=int, metavar="N", help="(default: the run's last)")
    parser.add_argument(
        "--address", metavar="HOST:PORT", default=os.environ.get("RAY_ADDRESS"),
        help="of the cluster's head (default: RAY_ADDRESS, or that of the run)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each fault")
    parser.add_argument("--really", action="store_true", help="do it; otherwise only say")
    return parser.parse_args(arguments)


def _chaos(args: argparse.Namespace) -> None:
    run = Storage(args.run)
    if not run.exists(CONFIG):
        raise ConfigError(f"{run.url}: there is no run; give the run directory")
    first = last_step(run) + 1 if args.first_step is None else args.first_step
    last = _total_steps(run) if args.last_step is None else args.last_step
    faults = schedule(args.seed, args.faults, first, last, args.kinds)
    strikes_cluster = bool(set(args.kinds) & set(CLUSTER_KINDS))
    address = args.address or (_address_of(run) if strikes_cluster else None)
    if args.really and not address and strikes_cluster:
        raise ConfigError(
            f"{', '.join(args.kinds)}: need a cluster; give its --address, or set RAY_ADDRESS"
        )
    target: Target = RayTarget(address) if address else Target()

    out = sys.stdout

    def say(record: dict[str, Any]) -> None:
        print(json.dumps(record) if args.json else told(record), file=out, flush=True)

    # A joined Ray prints what it hears of a raylet's end, at any moment until the target is closed,
    # among the records.
    with (
        contextlib.redirect_stdout(sys.stderr),
        contextlib.closing(target),
        Injector(run, faults, target, say) as injector,
    ):
        if args.really:
            _really(run, injector)
        else:
            _dry_run(faults, injector, say)


def _dry_run(
    faults: Sequence[Fault], injector: Injector, say: Callable[[dict[str, Any]], None]
) -> None:
    note = "nothing is done without --really; this is what each fault would strike now:"
    print(note, file=sys.stderr)
    for fault in faults:
        record: dict[str, Any] = {"kind": fault.kind, "step": fault.at_step}
        record |= {"seconds": fault.seconds, "outcome": "not done", "victim": None}
        try:
            aim = injector.aim(fault)
            record |= {"victim": aim.victim, **aim.details}
        except NotNow as reason:
            record |= {"outcome": "waits", "reason": str(reason)}
        except Impossible as reason:
            record |= {"outcome": "skipped", "reason": str(reason)}
        say(record)


def _really(run: Storage, injector: Injector) -> None:
    """Carry the faults out until all are over, or the run is.

    Raises:
        RunError: some could not be carried out.
    """
    began = time.time()
    injector.run(
        until=lambda: not injector.ongoing and (not injector.pending or _ended(run, began))
    )
    if injector.pending:
        print(f"the run ended before {len(injector.pending)} of the faults", file=sys.stderr)
    failed = [record for record in injector.done if record["outcome"] == "failed"]
    if failed:
        raise RunError(f"{run.url}: {len(failed)} of the faults could not be carried out")


def _ended(run: Storage, since: float) -> bool:
    """Whether the run finished, or gave up, after a time (Unix seconds)."""
    state = read_state(run)
    return state.get("status") in ("finished", "failed") and state.get("updated", 0.0) > since


def _address_of(run: Storage) -> str | None:
    """The head of the cluster that a run trains on; None where it does not train."""
    state = read_state(run)
    return state.get("ray_address") if state.get("status") == "running" else None


def _total_steps(run: Storage) -> int:
    plan = run.read_json(PLAN)
    if plan is None:
        raise ConfigError(f"{run.url}: has no {PLAN} yet; give --last-step, or wait until it has")
    final = plan["phases"][-1]
    return int(final["first_step"] + final["steps"])


if __name__ == "__main__":
    sys.exit(main())
