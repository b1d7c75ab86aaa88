"""`python -m restkv.cli`: the `restkv` command of this interpreter."""

from __future__ import annotations

from restkv.cli import run

run()
