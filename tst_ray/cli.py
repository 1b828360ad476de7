"""The command line: `tst-ray run | prepare | plan | status | checkpoints | export | bench |
settings`.

Any field of the config is an option, `--section.field=value`, of run, prepare and plan. Exit
status: 0 done; 1 failed, with one line on standard error; 2 bad usage or config, before anything
starts; 130 and 143 stopped by Ctrl-C and SIGTERM. After 1, 130 and 143 the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from pipelines.errors import DataError
from tst_ray.bench import BENCHES
from tst_ray.errors import UserError

_OVERRIDES = "any config field can be set as --section.field=value, e.g. --train.steps=2000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, overrides = _parse(arguments)
    try:
        args.command(args, overrides)
    except (UserError, DataError) as error:
        _tell(f"tst-ray: {error}")
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        _tell("tst-ray: interrupted; the same command resumes the run")
        return 130
    except SystemExit as error:  # how Ray takes SIGTERM while no stage trains
        if error.code != signal.SIGTERM:
            raise
        _tell("tst-ray: terminated; the same command resumes the run")
        return 143
    except BrokenPipeError:
        return 1
    except OSError as error:  # storage's
        _tell(f"tst-ray: {error}")
        return 1
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its options, and the overrides, which argparse does not know."""
    parser = argparse.ArgumentParser(
        prog="tst-ray",
        description="Pre-train language models with Token Superposition on Ray.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, help_text in (
        ("run", _run, "train, from text to a model folder; resumes what was stopped"),
        ("prepare", _prepare, "tokenize only: text to shards"),
        ("plan", _plan, "show what a run would do, without Ray or weights"),
    ):
        command = commands.add_parser(name, help=help_text, epilog=_OVERRIDES, allow_abbrev=False)
        command.add_argument("--config", metavar="FILE", help="a YAML file, or a shipped config")
        if name != "run":
            command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(command=function, takes_overrides=True)

    status = commands.add_parser("status", help="where a run stands", allow_abbrev=False)
    status.add_argument("run", metavar="RUN", help="the run directory")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status, takes_overrides=False)

    checkpoints = commands.add_parser(
        "checkpoints", help="list a run's checkpoints, and verify them", allow_abbrev=False
    )
    checkpoints.add_argument("run", metavar="RUN", help="the run directory")
    checkpoints.add_argument("--verify", action="store_true", help="read every file of each")
    checkpoints.add_argument("--json", action="store_true", help="print JSON")
    checkpoints.set_defaults(command=_checkpoints, takes_overrides=False)

    export = commands.add_parser("export", help="write a run's model folder", allow_abbrev=False)
    export.add_argument("run", metavar="RUN", help="the run directory")
    export.add_argument("--to", metavar="FOLDER", help="where to (default: RUN/model)")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    export.set_defaults(command=_export, takes_overrides=False)

    bench = commands.add_parser(
        "bench", help="measure what a run costs on this machine", allow_abbrev=False
    )
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help=", ".join(BENCHES))
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(command=_bench, takes_overrides=False)

    settings = commands.add_parser("settings", help="list every config field", allow_abbrev=False)
    settings.set_defaults(command=_settings, takes_overrides=False)

    args, rest = parser.parse_known_args(arguments)
    wrong = [arg for arg in rest if not (args.takes_overrides and arg.startswith("--"))]
    if wrong:
        hint = "; write --section.field=value" if args.takes_overrides else ""
        parser.error(f"unrecognized arguments: {' '.join(wrong)}{hint}")
    return args, rest


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.config import load_config

    config = load_config(args.config, overrides)
    from tst_ray.coordinator import Coordinator
    from tst_ray.display import Terminal
    from tst_ray.report import print_summary

    terminal = Terminal()
    terminal.say(f"run {config.run.name}: {_what(config)}")
    outcome = Coordinator(config, terminal).run()
    print_summary(outcome, terminal.console)


def _what(config: Any) -> str:
    phases = [
        f"{phase.steps:,} steps "
        + (f"in bags of {phase.bag_size}" if phase.bag_size > 1 else "plain")
        for phase in config.phase_settings()
    ]
    return ", then ".join(phases)


def _prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.config import load_config

    config = load_config(args.config, overrides)
    from tst_ray.coordinator import prepare_only

    manifest = prepare_only(config, _tell)
    facts = {
        "folder": manifest.folder,
        "fingerprint": manifest.fingerprint,
        "vocab_size": manifest.vocab_size,
        "sources": {
            source.name: {
                "documents": source.documents,
                "train_tokens": source.train.tokens,
                "validation_tokens": source.validation.tokens,
                "skipped": source.num_skipped,
                "skipped_files": source.num_cut,
            }
            for source in manifest.sources
        },
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for source in manifest.sources:
        print(
            f"{source.name}: {source.documents:,} documents, {source.train.tokens:,} training and "
            f"{source.validation.tokens:,} validation tokens, "
            f"{source.num_skipped:,} texts and {source.num_cut:,} files left out"
        )
    print(f"shards: {manifest.folder}")


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.config import load_config

    config = load_config(args.config, overrides)
    from tst_ray.preview import plan_facts, print_plan

    facts = plan_facts(config)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_plan(facts)


def _status(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.report import print_status, status_facts
    from tst_ray.storage import Storage

    facts = status_facts(Storage(args.run))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_status(facts)


def _checkpoints(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.errors import RunError
    from tst_ray.report import checkpoint_facts, print_checkpoints
    from tst_ray.storage import Storage

    run = Storage(args.run)
    if not run.exists("config.yaml"):
        raise RunError(f"{run.url}: not a run directory (no config.yaml in it)")
    facts = checkpoint_facts(run, verify_all=args.verify)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_checkpoints(facts)
    if facts and not any(entry["state"] == "committed" for entry in facts):
        raise RunError(f"{run.url}: none of its {len(facts)} checkpoints is good")


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.export import export_run
    from tst_ray.storage import Storage

    print(export_run(Storage(args.run), args.to, args.step)[1])


def _bench(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.bench import print_bench, run_bench

    facts = run_bench(args.name)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_bench(facts)


def _settings(args: argparse.Namespace, overrides: list[str]) -> None:
    from tst_ray.reference import settings_table

    print(settings_table())


def _tell(text: str) -> None:
    """Print a line on standard error; where that is gone, nobody is told, and the work goes on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
