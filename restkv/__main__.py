"""`python -m restkv`."""

from restkv.cli import run

if __name__ == "__main__":
    run()
