"""A conversation in one cache: every turn is appended, and what does not fit the budget is evicted."""

import restkv

TURNS = (
    "The code of the red hat is 48213.",
    "The code of the old kettle is 90752.",
    "Which code does the red hat have?",
    "Which code does the old kettle have?",
)


def main() -> None:
    lm = restkv.load("restkv/assets/recall-mini")
    chat = restkv.Chat(
        lm, restkv.ReSTKV(budget=48, window=16, interval=16), template=False
    )  # no template: turns are lines
    for turn in TURNS:
        print(">", turn)
        stream = chat.send(turn, max_new_tokens=12, stop=["\n"])
        for piece in stream:  # as it is made
            print(piece, end="", flush=True)
        kept = sum(row[0] for row in stream.generation.stats.kept) / lm.config.num_layers
        print(f"   [{len(chat.tokens)} tokens said, {kept:.0f} entries per head]")


if __name__ == "__main__":
    main()
