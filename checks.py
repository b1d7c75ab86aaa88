"""Every check of a working copy in one command: `python checks.py`, or some of them: `python checks.py lint types`.

It takes what is installed beside the Python that runs it (the extra `test`), and stops at the first check that fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
CHECKS = {
    "lint": ["ruff check ."],
    "format": ["ruff format --check ."],
    "types": ["mypy", "mypy checks.py examples"],
    "tests": ["pytest -q -n 2"],  # the references of code and documents are among them
    "slow": ["pytest -q -n 2 -m slow -k not(many_cases)"],  # 300 cases of the fuzzer are among them
}
# No check: writes the API reference, a page for each module that users import from.
API = "lm chat context results policies policies.base observe budgets patterns errors testing"
OTHERS = {
    "fuzz": ["pytest -q -n 2 -m slow tests/fuzz"],  # 20,000 new cases, which take half an hour
    "api": [f"pdoc -o build/api {' '.join(f'restkv.{name}' for name in API.split())}"],
}


def main(names: list[str]) -> int:
    known = CHECKS | OTHERS
    if unknown := [name for name in names if name not in known]:
        print(f"checks.py: no check {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names or CHECKS:
        for command in known[name]:
            print(f"\n== {name}: {command}", flush=True)
            done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, env=environment(), check=False)
            if done.returncode:
                print(f"\nchecks.py: FAILED: {name}", file=sys.stderr)
                return 1
    return 0


def environment() -> dict[str, str]:
    """One thread per worker of pytest, and threads that wait asleep: on two cores spinning costs a factor of ten."""
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
