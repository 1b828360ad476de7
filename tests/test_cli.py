"""The command line where nothing trains: versions, and streams that are closed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tst_ray import __version__
from tst_ray.cli import main


def test_the_versions_are_printed_without_importing_what_they_are_of() -> None:
    code = (
        "import sys\nfrom tst_ray.cli import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"tst-ray {__version__} (Python 3.")
    assert ", torch 2." in done.stdout and ", ray 2." in done.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "status, arguments",
    [
        (0, "settings"),
        (1, "status /nowhere"),
        (1, "run --cluster.backend=inline --run.storage=/proc/nowhere"),
        (2, "x"),
    ],
)
def test_standard_streams_may_be_closed(closed: str, status: int, arguments: str) -> None:
    line = f'"{sys.executable}" -m tst_ray.cli {arguments} {closed}'
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
