"""What a person sees on a real terminal: our lines and bars, and nothing of what Ray prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.terminals import CTRL_C, on_a_terminal
from tests.test_runs import command, events, last_step, write_text

NOISY = """
import logging, os, subprocess, sys, threading
from tests.tiny import make_config, make_corpus
from pathlib import Path
from tst_ray import display
from tst_ray.display import Terminal, watch
from tst_ray.plan import build_plan
from tst_ray.storage import Storage

folder = Path(sys.argv[1])
plan = build_plan(make_config(folder, make_corpus(folder / "corpus")))
run = Storage(str(folder / "run"))
run.write("metrics.jsonl", '{"step": 3, "phase": 0, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1e4, '
          '"world_size": 2, "step_time_s": 0.1}\\n')
terminal = Terminal()
logging.basicConfig(level="INFO")  # takes the standard error of now


def print_all():
    print("noise by print", flush=True)
    print("noise on standard error", file=sys.stderr, flush=True)
    logging.info("noise of a logger")
    os.write(1, b"noise on descriptor 1\\n")
    os.write(2, b"noise on descriptor 2\\n")
    subprocess.run(["echo", "noise of a child"])


def read_and_tell(run):
    shows.set()
    return read(run)


read, shows = display.last_records, threading.Event()
display.last_records = read_and_tell  # which the bars do once they are there


def show():
    with watch(run, plan, terminal):
        assert shows.wait(60.0)
        print_all()
        terminal.say("a line of ours")


if sys.argv[2] == "quiet":
    with terminal.quiet(str(folder / "ray.log")):
        show()
else:
    show()
print("the end")
"""


@pytest.mark.parametrize("how", ["quiet", "plain"])
def test_what_others_print_goes_to_the_log_and_not_between_the_bars(
    tmp_path: Path, how: str
) -> None:
    """Only where there is a log; without Ray there is none, and what is printed is shown."""
    status, shown = on_a_terminal([sys.executable, "-c", NOISY, str(tmp_path), how])
    assert status == 0, shown
    assert "a line of ours" in shown and "the end" in shown
    assert "phase 1/2 · bags of 4" in shown and "loss 2.500" in shown
    if how == "plain":
        assert shown.count("noise") == 6
        return
    assert "noise" not in shown
    assert (tmp_path / "ray.log").read_text().count("noise") == 6


def test_on_a_narrow_terminal_numbers_come_before_bars(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", NOISY, str(tmp_path), "quiet"]
    _, wide = on_a_terminal(arguments)
    _, narrow = on_a_terminal(arguments, columns=80)
    assert "━" in wide and "lr 1.0e-03  10k tok/s  2 workers" in wide
    assert re.search(r"phase 1/2 · bags of 4 +3/4 loss 2.500  val –  10k tok/s +-:--:--", narrow)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", NOISY, str(tmp_path), "quiet"]
    status, shown = on_a_terminal(arguments, TERM="dumb")
    assert status == 0, shown
    assert "phase 1/2 · bags of 4  step 3/8  loss 2.500" in shown


RAYS = re.compile(r"\(\w+ pid=\d+|\b(INFO|WARNING|ERROR)\b|UserWarning|/ray/session_")
"""What lines of Ray, Ray Train and Ray Data have in them."""


@pytest.mark.slow
def test_a_run_on_a_terminal_shows_our_lines_alone(tmp_path: Path) -> None:
    """And Ctrl-C, which the terminal sends to Ray's processes too, stops it with a checkpoint."""
    text = write_text(tmp_path / "text")
    arguments = command(tmp_path, text, "seen", train__steps=400, tst__ratio=0.5)
    status, shown = on_a_terminal(arguments, keys={"training phase 2": CTRL_C}, RAY_ADDRESS="")
    run = tmp_path / "seen"
    assert status == 130, shown
    assert "the same command resumes" in shown and events(run, "stopped")
    assert last_step(run) >= 200
    assert not RAYS.search(shown), shown
    assert len(RAYS.findall((run / "ray.log").read_text())) > 10
    status, shown = on_a_terminal(arguments, RAY_ADDRESS="")
    assert status == 0, shown
    assert not RAYS.search(shown), shown
