"""`python -m tst_ray.run`: the same as `tst-ray run`; with no arguments, the demo."""

from __future__ import annotations

import sys

from tst_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
