"""A batch of prompts of unequal length, with a budget for every layer: the first layers keep more than the last."""

from pathlib import Path

import restkv


def ask(text: str, thing: str) -> str:
    return f"{text} Which code does the {thing} have? The code of the {thing} is"


def main() -> None:
    lm = restkv.load("restkv/assets/recall-mini")
    story = Path("restkv/assets/recall-mini/story.txt").read_text(encoding="utf-8").strip()
    told = story[: story.index(" Which code")]
    prompts = ask(told, "black belt"), ask(told, "light box"), ask("The code of the red hat is 48213.", "red hat")
    policy = restkv.SnapKV(budget=(128, 128, 64, 32), window=16)  # one number per layer
    for answer in lm.generate(prompts, policy, max_new_tokens=3):  # rows are computed as each would be alone
        print(answer.text.strip())
    for layer, rows in enumerate(answer.stats.kept):  # stats are of the whole batch
        print(
            f"layer {layer}:",
            ", ".join(f"{kept:.0f} of {seen}" for kept, seen in zip(rows, answer.stats.seen, strict=True)),
        )


if __name__ == "__main__":
    main()
