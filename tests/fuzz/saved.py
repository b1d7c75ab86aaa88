"""What is fuzzed of restkv's own files: saved chats and contexts, and folders of results."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from cases import Case, linked, make_checkpoint, read
from hypothesis import strategies as st
from mutations import HOSTILE, edited, torn, written
from safetensors.torch import load_file, safe_open

from make.hostile import fits

# -- saved chats and contexts


def saved_ones(ground: Path) -> dict[str, Any]:
    import restkv
    from restkv.chat import Chat

    checkpoint = make_checkpoint(ground / "checkpoints" / "llama31", "llama31")
    made: dict[str, Any] = {"checkpoint": checkpoint}
    for name, policy in {
        "restkv": restkv.ReSTKV(budget=24, window=4),
        "h2o": restkv.get_policy("h2o", budget=24),
        "streaming": restkv.get_policy("streamingllm", budget=24),
    }.items():
        place = ground / f"{name}.chat"
        if not place.exists():
            chat = Chat(restkv.load(checkpoint), policy, template=False)
            for _ in chat.send("Once upon a time", max_new_tokens=4):
                pass
            chat.save(place)
        made[name] = place
    return made


def _signed(remarks: str, tensors: Any) -> bytes:
    """A file as a hostile mind would write it, with digests that are right."""
    from restkv.saving.archive import write_archive

    with tempfile.TemporaryDirectory() as folder:
        write_archive(Path(folder) / "saved", remarks, tensors)
        return (Path(folder) / "saved").read_bytes()


def with_saved(valid: dict[str, Any]) -> st.SearchStrategy[Case]:
    import torch

    dtypes = [torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]
    names = [name for name in valid if name != "checkpoint"]

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        path = valid[draw(st.sampled_from(names))]
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        if draw(st.booleans()):
            about = draw(edited(about))
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from(sorted(tensors)))
            kind = draw(st.sampled_from(["drop", "double", "dtype", "shape", "fill", "rename", "cut"]))
            tensor = tensors[name]
            if kind == "drop":
                del tensors[name]
            elif kind == "double":
                tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor
            elif kind == "dtype":
                tensors[name] = tensor.to(draw(st.sampled_from(dtypes)))
            elif kind == "shape":
                tensors[name] = tensor.reshape(-1)
            elif kind == "cut":
                tensors[name] = tensor[:-1].clone() if tensor.ndim and len(tensor) else tensor
            elif kind == "rename":
                tensors[draw(st.sampled_from(["x", "k.9", "pos.0", "state.0.x"]))] = tensors.pop(name)
            else:
                value = draw(st.sampled_from([0, -1, -5, 1, 2**31 - 1, float("nan"), float("inf")]))
                if fits(value, tensor.dtype):
                    tensors[name] = torch.full_like(tensor, value)
        data = _signed(written(about), {name: tensor.contiguous() for name, tensor in tensors.items()})
        if draw(st.integers(0, 9)) == 0:
            at = draw(st.integers(0, len(data)))
            data = data[:at] + draw(st.sampled_from([b"", b"\x00", b"\xff" * 8])) + data[at + 1 :]
        command = ("chat", "m", "--load", "saved", "-n", "2")
        return Case(command, {"saved": data}, linked(valid["checkpoint"]), b"go on\n/stats\n")

    return cases()


def as_saved(valid: dict[str, Any]) -> list[Case]:
    command = ("chat", "m", "--load", "saved", "-n", "2")
    return [
        Case(command, {"saved": path.read_bytes()}, linked(valid["checkpoint"]), b"go on\n/stats\n")
        for name, path in valid.items()
        if name != "checkpoint"
    ]


# -- folders of results


def runs(ground: Path) -> dict[str, Any]:
    from restkv.cli import main

    checkpoint = make_checkpoint(ground / "checkpoints" / "llama31", "llama31")
    story = ground / "story.txt"
    story.write_text("Once upon a time there was a little girl who loved to play outside in the park. " * 20)
    commands = {
        "fidelity": ("--text", str(story), "--budgets", "12", "--context", "24", "--tail", "4", "--windows", "2", "--oracle", "0",
                     "--methods", "snapkv:window=4,random"),
        "perplexity": ("--data", str(story), "--budgets", "12", "--context", "24", "--tokens", "4", "--windows", "2",
                       "--methods", "snapkv:window=4,random"),
    }  # fmt: skip
    for name, words in commands.items():
        if not (ground / f"run-{name}").exists():
            assert main(["bench", name, str(checkpoint), *words, "--out", str(ground / f"run-{name}")]) == 0
    return {"checkpoint": checkpoint, **{name: (ground / f"run-{name}", words) for name, words in commands.items()}}


def with_run(valid: dict[str, Any]) -> st.SearchStrategy[Case]:
    names = [name for name in valid if name != "checkpoint"]

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        name = draw(st.sampled_from(names))
        folder, words = valid[name]
        manifest = read(folder / "manifest.json")
        whole = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        lines = list(whole)
        if draw(st.booleans()):
            manifest = draw(edited(manifest))
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(lines) - 1))
            kind = draw(st.sampled_from(["edit", "edit", "cut", "twice", "swap", "value"]))
            if kind == "edit" and lines[at] in whole:
                lines[at] = written(draw(edited(json.loads(lines[at]))))
            elif kind in ("edit", "cut"):
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
            elif kind == "twice":
                lines.append(lines[at])
            elif kind == "swap":
                lines[at], lines[0] = lines[0], lines[at]
            else:
                lines[at] = written(draw(st.sampled_from(HOSTILE)))
        files = {
            "run/manifest.json": draw(torn(written(manifest))),
            "run/samples.jsonl": draw(torn("\n".join(lines) + "\n")),
            "run/timings.jsonl": draw(
                st.sampled_from([b"", b"{", b'{"seconds": "x"}\n', b"[1]\n", b'{"seconds": 1e999}\n'])
            ),
        }
        command = draw(
            st.sampled_from(
                [
                    ("bench", "report", "run", "--markdown"),
                    ("bench", "report", "run", "--json"),
                    ("bench", name, "m", *words, "--out", "run"),
                ]
            )
        )
        return Case(command, files, linked(valid["checkpoint"]))

    return cases()


def as_run(valid: dict[str, Any]) -> list[Case]:
    made = []
    for name in [name for name in valid if name != "checkpoint"]:
        folder, words = valid[name]
        files = {f"run/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
        made.append(Case(("bench", "report", "run", "--markdown"), files, linked(valid["checkpoint"])))
        made.append(Case(("bench", name, "m", *words, "--out", "run"), files, linked(valid["checkpoint"])))
    return made
