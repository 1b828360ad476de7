"""The command line: `tst-ray run | prepare | plan | status | checkpoints | export | bench |
settings`.

Any field of the config is an option, `--section.field=value`, of run, prepare and plan. Exit
status: 0 done; 1 failed, with one line on standard error; 2 bad usage or config, before anything
starts; 130 and 143 stopped by Ctrl-C and SIGTERM. After 1, 130 and 143 the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.addresses import masked
from pipelines.errors import DataError
from tst_ray.bench import BENCHES
from tst_ray.errors import ConfigError, UserError

if TYPE_CHECKING:
    from tst_ray.settings import Config
    from tst_ray.storage import Storage

_OVERRIDES = "any config field can be set as --section.field=value, e.g. --train.steps=2000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    _open_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    try:
        args.command(args)
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


def _open_standard_streams() -> None:
    """Have a descriptor stand for each standard stream that was closed (`>&-`).

    Else the next file that is opened would get its number, and what is printed.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            stream = os.fdopen(descriptor, "w" if descriptor else "r", closefd=False)
            setattr(sys, name, stream)


class _Version(argparse.Action):
    """Prints our version, and those of what decides how a run goes; imports none of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version
        from platform import python_version

        import tst_ray

        parts = [f"Python {python_version()}"]
        for package in ("torch", "ray", "transformers"):
            with contextlib.suppress(PackageNotFoundError):
                parts.append(f"{package} {version(package)}")
        print(f"tst-ray {tst_ray.__version__} ({', '.join(parts)})")
        parser.exit()


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The command, its options, and the overrides, which argparse does not know."""
    parser = argparse.ArgumentParser(
        prog="tst-ray",
        description="Pre-train language models with Token Superposition on Ray.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the versions, and exit")
    of_config, of_run, as_json, of_key = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    of_config.add_argument("--config", metavar="FILE", help="a YAML file, or a shipped config")
    of_run.add_argument("run", metavar="RUN", help="the run directory")
    as_json.add_argument("--json", action="store_true", help="print JSON")
    what = "the key that signed its checkpoints (default: the run's checkpoint.key_file)"
    of_key.add_argument("--key-file", metavar="FILE", help=what)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, does: Callable[[argparse.Namespace], None], what: str, *parents: Any
    ) -> argparse.ArgumentParser:
        takes_overrides = of_config in parents
        added = commands.add_parser(
            name,
            help=what,
            parents=parents,
            epilog=_OVERRIDES if takes_overrides else None,
            allow_abbrev=False,
        )
        added.set_defaults(command=does, takes_overrides=takes_overrides)
        return added

    command("run", _run, "train, from text to a model folder; resumes what was stopped", of_config)
    command("prepare", _prepare, "tokenize only: text to shards", of_config, as_json)
    what = "show what a run would do, without Ray or weights"
    command("plan", _plan, what, of_config, as_json)
    command("status", _status, "where a run stands", of_run, as_json)
    what = "list a run's checkpoints, and verify them"
    checkpoints = command("checkpoints", _checkpoints, what, of_run, as_json, of_key)
    checkpoints.add_argument("--verify", action="store_true", help="read every file of each")
    export = command("export", _export, "write a run's model folder", of_run, of_key)
    export.add_argument("--to", metavar="FOLDER", help="where to (default: RUN/model)")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    bench = command("bench", _bench, "measure what a run costs on this machine", as_json)
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help=", ".join(BENCHES))
    command("settings", _settings, "list every config field")

    args, rest = parser.parse_known_args(arguments)
    wrong = [arg for arg in rest if not (args.takes_overrides and arg.startswith("--"))]
    if wrong:
        hint = "; write --section.field=value" if args.takes_overrides else ""
        parser.error(f"unrecognized arguments: {masked(' '.join(wrong))}{hint}")
    args.overrides = rest
    return args


def _config(args: argparse.Namespace) -> Config:
    """The config that a command is about; refused before anything large is imported."""
    from tst_ray.config import load_config

    return load_config(args.config, args.overrides)


def _show(args: argparse.Namespace, facts: Any, as_text: Callable[[Any], None]) -> None:
    """Print facts for a program, or for a person."""
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        as_text(facts)


def _run(args: argparse.Namespace) -> None:
    config = _config(args)
    from tst_ray.coordinator import Coordinator
    from tst_ray.display import Terminal
    from tst_ray.report import print_summary

    terminal = Terminal()
    terminal.say(f"run {config.run.name}: {_what(config)}")
    outcome = Coordinator(config, terminal).run()
    print_summary(outcome, terminal.console)


def _what(config: Config) -> str:
    phases = [
        f"{phase.steps:,} steps "
        + (f"in bags of {phase.bag_size}" if phase.bag_size > 1 else "plain")
        for phase in config.phase_settings()
    ]
    return ", then ".join(phases)


def _prepare(args: argparse.Namespace) -> None:
    config = _config(args)
    from tst_ray.coordinator import prepare_only
    from tst_ray.display import Terminal

    # A copy: the other goes to a file while Ray is there.
    with os.fdopen(os.dup(2), "w", errors="replace") as stderr:
        tell = functools.partial(_tell, file=stderr)
        manifest = prepare_only(config, tell, Terminal().quiet)
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
    _show(args, facts, _print_prepared)


def _print_prepared(facts: dict[str, Any]) -> None:
    for name, of in facts["sources"].items():
        print(
            f"{name}: {of['documents']:,} documents, {of['train_tokens']:,} training and "
            f"{of['validation_tokens']:,} validation tokens, "
            f"{of['skipped']:,} texts and {of['skipped_files']:,} files left out"
        )
    print(f"shards: {facts['folder']}")


def _plan(args: argparse.Namespace) -> None:
    config = _config(args)
    from tst_ray.origins import find_origins
    from tst_ray.preview import plan_facts, print_plan

    facts = plan_facts(config, find_origins(args.config, args.overrides))
    _show(args, facts, print_plan)
    if facts["problems"]:
        raise ConfigError("\n".join(facts["problems"]))


def _status(args: argparse.Namespace) -> None:
    from tst_ray.report import print_status, status_facts
    from tst_ray.storage import Storage

    _show(args, status_facts(Storage(args.run)), print_status)


def _checkpoints(args: argparse.Namespace) -> None:
    from tst_ray.errors import RunError
    from tst_ray.report import checkpoint_facts, print_checkpoints
    from tst_ray.storage import Storage

    run = Storage(args.run)
    if not run.exists("config.yaml"):
        raise RunError(f"{run.url}: not a run directory (no config.yaml in it)")
    facts = checkpoint_facts(run, verify_all=args.verify, key=_key(args, run))
    _show(args, facts, print_checkpoints)
    if facts and not any(entry["state"] == "committed" for entry in facts):
        raise RunError(f"{run.url}: none of its {len(facts)} checkpoints is good")


def _export(args: argparse.Namespace) -> None:
    from tst_ray.export import export_run
    from tst_ray.storage import Storage

    run = Storage(args.run)
    print(export_run(run, args.to, args.step, _key(args, run))[1])


def _key(args: argparse.Namespace, run: Storage) -> bytes | None:
    """The key that must have signed a run's checkpoints; None asks for no signature."""
    from tst_ray.runstore import run_key_file
    from tst_ray.signing import read_key

    return read_key(args.key_file or run_key_file(run))


def _bench(args: argparse.Namespace) -> None:
    from tst_ray.bench import print_bench, run_bench

    _show(args, run_bench(args.name), print_bench)


def _settings(args: argparse.Namespace) -> None:
    from tst_ray.reference import settings_table

    print(settings_table())


def _tell(text: str, file: TextIO | None = None) -> None:
    """Print a line on standard error; where that is gone, nobody is told, and the work goes on."""
    with contextlib.suppress(OSError):
        print(masked(text), file=file or sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
