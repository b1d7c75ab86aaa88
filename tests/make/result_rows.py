"""Arguments and rows of benchmark runs that never ran, with scores that can be told apart."""

from __future__ import annotations

from collections.abc import Callable

METHODS = ["full", "restkv", "snapkv@official"]
RULER = {
    "tasks": ["niah_single", "vt"],
    "lengths": [256, 512],
    "methods": METHODS,
    "compression": [8.0, 16.0],
    "samples": 4,
    "question": "both",
    "seed": 0,
    "chat": False,
    "depths": [None],
}
FIDELITY = {
    "methods": [*METHODS, "streamingllm"],
    "budgets": [32, 0.25],
    "context": 256,
    "tail": 16,
    "windows": 3,
    "oracle": 1,
    "oracle_context": 64,
    "results": 3 * (1 + 3 * 2) + 3 * 2,
}
NEEDLE = {**RULER, "tasks": ["niah_single"], "depths": [0.0, 0.5, 1.0], "compression": [8.0], "question": "aware"}


def ruler_rows(arguments: dict) -> list[dict]:
    """Scores that can be told apart: full 1, restkv 1 / 0.5 by turns, snapkv 0."""
    rows = []
    modes = ["aware", "agnostic"] if arguments["question"] == "both" else [arguments["question"]]
    for index in range(arguments["samples"]):
        for length in arguments["lengths"]:
            for task in arguments["tasks"]:
                for depth in arguments["depths"]:
                    for mode in modes:
                        for method in arguments["methods"]:
                            for rate in [1.0] if method == "full" else arguments["compression"]:
                                score = {"full": 1.0, "restkv": 1.0 if index % 2 else 0.5}.get(method, 0.0)
                                rows.append(
                                    {
                                        "key": f"{mode}/{task}@{depth}/{length}/{index}/{method}/{rate}",
                                        "question": mode,
                                        "task": task,
                                        "length": length,
                                        "depth": depth,
                                        "index": index,
                                        "method": method,
                                        "asked": rate,
                                        "kept": length / rate,
                                        "score": score,
                                    }
                                )
    return rows


def fidelity_rows(arguments: dict) -> list[dict]:
    rows = []
    for window in range(3):
        for part, context in (("text", 256), ("oracle", 64)):
            for method in arguments["methods"]:
                for budget in [1.0] if method == "full" else arguments["budgets"]:
                    entries = round(budget * context) if isinstance(budget, float) else budget
                    if part == "oracle" and (window >= arguments["oracle"] or entries >= 64):
                        continue
                    error = None if method == "streamingllm" else [0.1 / entries, 0.2 / entries]
                    row = {
                        "key": f"{part}/{window}/{method}/{budget!r}",
                        "part": part,
                        "window": window,
                        "method": method,
                        "asked": budget,
                        "entries": entries,
                        "kept": entries,
                        "error": error,
                    }
                    if part == "text":
                        kl = 0.0 if method == "full" else 0.5 / entries
                        row |= {"kl": kl, "top1": 0.75, "nll": 1.0 + 2 * kl, "full_nll": 1.0}
                    else:
                        half = error and [value / 2 for value in error]
                        row |= {"window_error": half, "future_error": half, "overlap": error and [0.5, 0.75]}
                    rows.append(row)
    return rows


KINDS: dict[str, tuple[dict, Callable[[dict], list[dict]]]] = {
    "ruler": (RULER, ruler_rows),
    "needle": (NEEDLE, ruler_rows),
    "fidelity": (FIDELITY, fidelity_rows),
}
