"""A context that is compressed once, before any question is known, asked often, and kept on disk."""

import tempfile
from pathlib import Path

import restkv

THINGS = ("iron latch", "black belt", "noisy pipe", "light box")


def main() -> None:
    lm = restkv.load("restkv/assets/recall-mini")
    story = Path("restkv/assets/recall-mini/story.txt").read_text(encoding="utf-8")
    text = story[: story.index(" Which code")]  # what is told, without the question
    # Nobody has asked yet, so that attention says little about what will be: KeyDiff looks at the keys alone.
    context = lm.compress(text, restkv.KeyDiff(budget=64))
    print(
        f"{context.tokens} tokens, {context.kept[0]:.0f} entries per head in the first layer, {context.nbytes:,} bytes"
    )
    for thing in THINGS:  # asking works on a copy: no question sees another
        answer = context.ask(f" Which code does the {thing} have? The code of the {thing} is", max_new_tokens=3)
        print(f"{thing}: {answer.text.strip()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "story.safetensors"
        context.save(path)
        again = restkv.CompressedContext.load(path, lm)
        print(
            f"from disk, {path.stat().st_size:,} bytes:",
            again.ask(" The code of the light box is", max_new_tokens=3).text.strip(),
        )


if __name__ == "__main__":
    main()
