"""From a Hugging Face folder to a Decoder: strictly, one bounded piece of its safetensors files at a time.

The model is built on the meta device, given empty memory of the wanted dtype, and filled from the files. These are read
and never mapped, so loading needs the target's size plus CHUNK_BYTES of memory and of address space, whatever the size
of a shard. Matrices that are to be quantised are so by some rows at a time, as they are read. Of ranks that share a model each
reads its own cut of every tensor (shares.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint.expected import SCALES, Expected, expected_tensors
from modeling.checkpoint.folders import INDEX, SINGLE, check_layout, checkpoint_folder, find_shards, why_a_file
from modeling.checkpoint.hub import download, hub_name
from modeling.checkpoint.shares import cut_of, share_of
from modeling.checkpoint.tensor_file import CODES, STORED_DTYPES, StoredTensor, read_header, read_pieces
from modeling.config import DTYPES, ModelConfig
from modeling.errors import CheckpointError, ConfigError, ParallelError, TooLargeError
from modeling.families.registry import read_config
from modeling.files import reason, shortened
from modeling.free import free_bytes, free_text, size_text
from modeling.layers import Decoder
from modeling.quant import Quantised, quantise, quantised, require_operators, weights_of
from modeling.ranks import ALONE, Ranks
from modeling.room import lacking

__all__ = ["INDEX", "SINGLE", "Rows", "load_model", "load_outline", "resolve", "tensor_slots", "weight_slots"]

CHUNK_BYTES = 4 << 20  # bytes of a file read at once; they then lie in the processor's cache when they are copied


@dataclass(frozen=True)
class Rows:
    """Where a stored matrix goes that is quantised: some rows of a (fused) one."""

    matrix: Quantised
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes * self.count // self.matrix.shape[0]


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    fused: bool = True,
    check_weights: bool = False,
    progress: Callable[[int, int], None] | None = None,
    weights: str = "auto",
    ranks: Ranks = ALONE,
) -> Decoder:
    """The model of a checkpoint folder, in eval mode and without gradients.

    Args:
        folder: a local folder with config.json and model.safetensors or its shards (see resolve() for hub names).
        dtype: of the weights; "auto" takes config.json's, or the stored one where config.json names none.
        device: where the weights are to live; they are never all copied on the way.
        fused: join q/k/v and gate/up projections into one matrix each. The function is the same.
        check_weights: look for NaN and Inf in every tensor after its conversion (reads everything once more).
        progress: called with the bytes that are filled and those in all, tensor by tensor.
        weights: "int8" or "int4" quantises the matrices as they are read (modeling/quant.py); "auto" holds them as the checkpoint
            does, which may be quantised itself.
        ranks: that share the model; this one's part of it is returned.

    Raises ConfigError when config.json cannot be obeyed, CheckpointError when files are absent, broken, stored twice,
    or do not fit config.json: all missing, unexpected and misshapen tensors come in one message; TooLargeError when the
    weights do not fit into what memory is free; ParallelError when they cannot be divided among so many ranks.
    """
    folder = Path(folder)
    model, stored = _outline(folder, dtype, fused, weights, ranks)
    _allocate(folder, model, torch.device(device))
    slots = weight_slots(model)
    broken, done, total = [], 0, sum(slot.nbytes for slot in slots.values())
    for name, slot in slots.items():
        if isinstance(slot, Rows):
            sound = _fill_rows(slot, stored[name], stored.get(name + SCALES), check_weights)
        else:
            sound = _fill(slot, stored[name], check_weights, ranks)
        if not sound:
            broken.append(name)
        done += slot.nbytes
        if progress is not None:
            progress(done, total)
    if broken:
        as_dtype = f"as {str(model.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{folder}: NaN or Inf {as_dtype} in {_some(broken)}; damaged file or too narrow a dtype")
    _check_tied_head(model, stored.get("lm_head.weight"))
    for matrix in quantised(model).values():
        matrix.settle()
    return model


def load_outline(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    fused: bool = True,
    weights: str = "auto",
    ranks: Ranks = ALONE,
) -> Decoder:
    """The model that load_model would give, on the meta device: shapes and dtype without weights.

    Only config.json and the headers of the weights are read. Raises what load_model raises about them.
    """
    return _outline(Path(folder), dtype, fused, weights, ranks)[0]


def _outline(
    folder: Path, dtype: str | torch.dtype, fused: bool, weights: str, ranks: Ranks
) -> tuple[Decoder, dict[str, StoredTensor]]:
    if weights != "auto":
        require_operators(weights)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
    check_layout(folder)
    config = read_config(folder)
    stored = _stored_tensors(folder)
    if weights not in ("auto", config.weights) and config.weights is not None:
        raise ConfigError(
            f"{folder}: its weights are {config.weights}, and cannot be made {weights}; leave weights at auto, or load the "
            "checkpoint that it was made of"
        )
    _check_fit(folder, config, expected_tensors(config), stored)
    with torch.device("meta"):
        model = Decoder(share_of(config, ranks), fused, ranks)
    model.requires_grad_(False).eval()
    model.to(_wanted_dtype(dtype, config, stored))
    if (held := config.weights if weights == "auto" else weights) is not None:
        if ranks.size > 1:
            raise ParallelError(f"parallel 'tensor': {held} weights cannot be divided among ranks; load plain ones")
        quantise(model, held)
    return model, stored


def _allocate(folder: Path, model: Decoder, device: torch.device) -> None:
    """Give the model empty memory; TooLargeError where there is not enough, before the machine has to end someone."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    free = free_bytes() if device.type == "cpu" else None
    try:
        if free is not None and size > free:
            raise MemoryError
        model.to_empty(device=device)
    except (MemoryError, RuntimeError) as error:
        if (asked := lacking(error)) is None:
            raise
        held = weights_of(model)
        kind = held or str(model.dtype).removeprefix("torch.")
        narrower = {"int4": "", "int8": "ask for int4 weights, or "}
        mend = narrower.get(kind, "ask for a narrower dtype than that or for int8 or int4 weights, or ")
        there = "" if free is None else f", {free_text()}"
        raise TooLargeError(
            f"{folder}: not enough memory, the weights take {size_text(size)} as {kind}{there}{asked}; {mend}free memory"
        ) from None


def tensor_slots(model: Decoder) -> dict[str, Tensor]:
    """weight_slots of a model of plain numbers."""
    slots = weight_slots(model)
    dense = {name: slot for name, slot in slots.items() if isinstance(slot, Tensor)}
    assert len(dense) == len(slots), "the model is quantised"
    return dense


def weight_slots(model: Decoder) -> dict[str, Tensor | Rows]:
    """Hugging Face's name of every tensor -> its place in the model: a parameter, or its rows of a fused one."""
    c = model.config
    kv_out = c.num_kv_heads * c.head_dim
    parts = {
        "qkv_proj": (("q_proj", c.num_heads * c.head_dim), ("k_proj", kv_out), ("v_proj", kv_out)),
        "gate_up_proj": (("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)),
    }
    parents = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), "self_attn.")
    parents |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp.")
    slots: dict[str, Tensor | Rows] = {}
    for name, weight in _named_weights(model).items():
        if not name.startswith("layers."):
            slots[name if name == "lm_head.weight" else f"model.{name}"] = _part(weight, 0, weight.shape[0])
            continue
        _, index, module, leaf = name.split(".")
        start = 0
        for part, rows in parts.get(module, ((module, weight.shape[0]),)):
            slots[f"model.layers.{index}.{parents.get(part, '')}{part}.{leaf}"] = _part(weight, start, rows)
            start += rows
    return slots


def _named_weights(model: Decoder) -> dict[str, Tensor | Quantised]:
    """Parameters by their names, the two of a quantised matrix as one."""
    matrices = quantised(model)
    weights: dict[str, Tensor | Quantised] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in matrices:
            weights[owner] = matrices[owner]
        else:
            weights[name] = parameter.data
    return weights


def _part(weight: Tensor | Quantised, first: int, count: int) -> Tensor | Rows:
    return weight.narrow(0, first, count) if isinstance(weight, Tensor) else Rows(weight, first, count)


def resolve(path_or_name: str | Path) -> Path:
    """A checkpoint folder: the path itself when it is one, else the download of "org/name" or "org/name@revision".

    A folder of huggingface_hub's cache (`models--org--name`) stands for the only snapshot in it. Downloads go to that
    cache and are not repeated; a revision is a branch, a tag or a commit. What can only be a path, and what lies in a
    folder that is here, is never looked for on the hub.

    Raises CheckpointError when there is neither a folder nor a repository of that name, or when the download fails.
    """
    text = os.fspath(path_or_name)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return checkpoint_folder(path)
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | ValueError)
        if not missing:
            raise CheckpointError(f"{shortened(str(path))}: cannot be looked at ({reason(error)})") from None
    else:
        raise CheckpointError(f"{path}: {why_a_file(path) if path.exists() else 'is a link that leads nowhere'}")
    name = hub_name(text)
    if name is None:
        raise CheckpointError(
            f"{shortened(str(path))}: no such folder; give a checkpoint folder or a hub name such as org/name or "
            "org/name@revision"
        )
    first = path.parts[0]
    if os.path.isdir(first):
        raise CheckpointError(
            f"{path}: no such folder; {first} is a folder here, so this is not taken for the name of a download"
        )
    return download(name)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files of the folder, by name, headers only."""
    stored: dict[str, StoredTensor] = {}
    for file in find_shards(folder):
        for tensor in read_header(file):
            if tensor.name in stored:
                raise CheckpointError(
                    f"{folder}: {tensor.name} is both in {stored[tensor.name].file.name} and in {file.name}; "
                    "remove the file that does not belong to this checkpoint"
                )
            stored[tensor.name] = tensor
    return stored


def _check_fit(
    folder: Path, config: ModelConfig, expected: dict[str, Expected], stored: dict[str, StoredTensor]
) -> None:
    """Raise one CheckpointError that lists everything in which the files and config.json disagree."""
    missing = [name for name in expected if name not in stored]
    embedding_shape = (config.vocab_size, config.hidden_size)
    unexpected = [
        tensor.name
        for tensor in stored.values()
        if tensor.name not in expected
        and not tensor.name.endswith("rotary_emb.inv_freq")  # a buffer that old transformers saved
        and not (
            config.tie_embeddings
            and config.weights is None
            and tensor.name == "lm_head.weight"
            and tensor.shape == embedding_shape
        )
    ]
    both = [(stored[name], wanted) for name, wanted in expected.items() if name in stored]
    misshapen = [f"{t.name} {list(t.shape)} for {list(wanted.shape)}" for t, wanted in both if t.shape != wanted.shape]
    codes = {name: wanted.dtypes[0] for name, wanted in expected.items() if wanted.dtypes[0] not in STORED_DTYPES}
    alien = [f"{t.name} {t.dtype}" for t in stored.values() if t.name not in codes and t.dtype not in STORED_DTYPES]
    other = [
        f"{stored[n].name} {stored[n].dtype} for {d}" for n, d in codes.items() if n in stored and stored[n].dtype != d
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen, "not floating point": alien}
    kinds["other codes"] = other
    problems = "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds.items() if names)
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit config.json, {problems}")


def _wanted_dtype(dtype: str | torch.dtype, config: ModelConfig, stored: dict[str, StoredTensor]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not supported; known are auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if config.dtype is not None:
        return DTYPES[config.dtype]
    found = STORED_DTYPES[stored["model.norm.weight" if config.weights else "model.embed_tokens.weight"].dtype]
    return torch.float32 if found == torch.float64 else found


def _fill(slot: Tensor, tensor: StoredTensor, check: bool, ranks: Ranks) -> bool:
    """Copy this rank's cut of a stored tensor into its place, converting on the way. False if `check` finds NaN or Inf there."""
    finite = True
    flat = slot.view(-1)
    cut = cut_of(tensor.name, tensor.shape, ranks)
    if cut is None:
        flat.zero_()
        return finite
    for place, piece in read_pieces(tensor, CHUNK_BYTES, cut):
        flat[place].copy_(piece)
        if check:
            finite &= bool(flat[place].isfinite().all())  # host sync: once per piece, while loading
    return finite


def _fill_rows(slot: Rows, tensor: StoredTensor, scales: StoredTensor | None, check: bool) -> bool:
    """Quantise a stored matrix into its place, or copy its codes and scales. False if `check` finds NaN or Inf in numbers."""
    finite = True

    def sound(piece: Tensor) -> bool:
        return not check or bool(piece.isfinite().all())

    if scales is None:
        for first, piece in _row_pieces(tensor):
            finite &= sound(piece)
            slot.matrix.fill(slot.first + first, piece)
        return finite
    for first, piece in _row_pieces(tensor):
        slot.matrix.refill(slot.first + first, piece, None)
    for first, piece in _row_pieces(scales):
        finite &= sound(piece)
        slot.matrix.refill(slot.first + first, None, piece)
    return finite


def _row_pieces(tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
    """Whole rows of a stored tensor, some at a time, and the number of the first; the next ones overwrite their memory."""
    _, *rest = tensor.shape
    width = math.prod(rest)
    item = (STORED_DTYPES | CODES)[tensor.dtype].itemsize
    for place, piece in read_pieces(tensor, max(1, CHUNK_BYTES // (width * item)) * width * item):
        yield place.start // width, piece.view(-1, *rest)


def _check_tied_head(model: Decoder, head: StoredTensor | None) -> None:
    """A tied model's stored head is ignored because it repeats the embedding; refuse one that does not."""
    if model.lm_head is not None or head is None:
        return
    embedding: Tensor | Quantised = model.embed_tokens.weight
    if isinstance(embedding, Quantised):
        same = all(embedding.repeats(first, piece) for first, piece in _row_pieces(head))
    else:
        flat, pieces = embedding.view(-1), read_pieces(head, CHUNK_BYTES, cut_of(head.name, head.shape, model.ranks))
        same = all(
            torch.equal(piece.to(flat), flat[place]) for place, piece in pieces
        )  # sync: once per piece, while loading
    if not same:
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from the embedding though config.json ties them; "
            "set tie_word_embeddings to false there"
        )


def _some(names: list[str], limit: int = 8) -> str:
    more = len(names) - limit
    return f"{len(names)} ({', '.join(map(shortened, names[:limit]))}{f' and {more} more' if more > 0 else ''})"
