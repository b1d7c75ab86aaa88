"""From a Hugging Face folder to a Decoder: strictly, from memory-mapped safetensors, one bounded piece at a time.

The model is built on the meta device, given empty memory of the wanted dtype, and filled from the files. Each piece is
read through a mapping of its own, because mapped pages stay in the process's resident set until the mapping is closed:
so loading needs the target's size plus CHUNK_BYTES, whatever the size of a shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.config import DTYPES, ModelConfig, read_json
from modeling.errors import CheckpointError, ConfigError
from modeling.families import read_config
from modeling.layers import Decoder
from modeling.room import require

CHUNK_BYTES = 32 << 20  # bytes of a file mapped at once
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
HUB_IGNORED = ["*/*", "consolidated*"]  # Mistral's folders hold all weights a second time in their own layout


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint keeps one tensor: name, file, shape, dtype as the safetensors header spells it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    fused: bool = True,
    check_weights: bool = False,
) -> Decoder:
    """The model of a checkpoint folder, in eval mode and without gradients.

    Args:
        folder: a local folder with config.json and model.safetensors or its shards (see resolve() for hub names).
        dtype: of the weights; "auto" takes config.json's, or the stored one where config.json names none.
        device: where the weights are to live; they are never all copied on the way.
        fused: join q/k/v and gate/up projections into one matrix each. The function is the same.
        check_weights: look for NaN and Inf in every tensor after its conversion (reads everything once more).

    Raises ConfigError when config.json cannot be obeyed, CheckpointError when files are absent, broken, stored twice,
    or do not fit config.json: all missing, unexpected and misshapen tensors come in one message; MemoryError when the weights
    do not fit into what memory is free.
    """
    folder = Path(folder)
    model, stored = _outline(folder, dtype, fused)
    require(sum(parameter.nbytes for parameter in model.parameters()), torch.device(device))
    model.to_empty(device=device)
    slots = tensor_slots(model)
    broken = [name for name, slot in slots.items() if not _fill(slot, stored[name], check_weights)]
    if broken:
        as_dtype = f"as {str(model.embed_tokens.weight.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{folder}: NaN or Inf {as_dtype} in {_some(broken)}; damaged file or too narrow a dtype")
    _check_tied_head(model, stored.get("lm_head.weight"))
    return model


def load_outline(folder: str | Path, dtype: str | torch.dtype = "auto", fused: bool = True) -> Decoder:
    """The model that load_model would give, on the meta device: shapes and dtype without weights.

    Only config.json and the headers of the weights are read. Raises what load_model raises about them.
    """
    return _outline(Path(folder), dtype, fused)[0]


def _outline(folder: Path, dtype: str | torch.dtype, fused: bool) -> tuple[Decoder, dict[str, StoredTensor]]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
    config = read_config(folder)
    stored = _stored_tensors(folder)
    with torch.device("meta"):
        model = Decoder(config, fused)
    _check_fit(folder, config, {name: slot.shape for name, slot in tensor_slots(model).items()}, stored)
    model.requires_grad_(False).eval()
    return model.to(_wanted_dtype(dtype, config, stored)), stored


def tensor_slots(model: Decoder) -> dict[str, Tensor]:
    """Hugging Face's name of every tensor -> its place in the model: a parameter, or its rows of a fused one."""
    c = model.config
    kv_out = c.num_kv_heads * c.head_dim
    parts = {
        "qkv_proj": (("q_proj", c.num_heads * c.head_dim), ("k_proj", kv_out), ("v_proj", kv_out)),
        "gate_up_proj": (("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)),
    }
    parents = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), "self_attn.")
    parents |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp.")
    slots: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("layers."):
            slots[name if name == "lm_head.weight" else f"model.{name}"] = parameter.data
            continue
        _, index, module, leaf = name.split(".")
        start = 0
        for part, rows in parts.get(module, ((module, parameter.shape[0]),)):
            slots[f"model.layers.{index}.{parents.get(part, '')}{part}.{leaf}"] = parameter.data.narrow(0, start, rows)
            start += rows
    return slots


def resolve(path_or_name: str | Path) -> Path:
    """A checkpoint folder: the path itself when it is one, else the download of the hub name "org/name".

    Downloads go to huggingface_hub's cache and are not repeated. Raises CheckpointError when there is neither a folder
    nor a repository of that name, or when huggingface_hub is not installed.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds it")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_name)):
        raise CheckpointError(f"{path}: no such folder; give a checkpoint folder or a hub name such as org/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f'{path}: no such folder; to download it as a hub name, pip install "restkv[hub]" first'
        ) from None
    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no such folder, and not downloaded ({_one_line(error)}); check name, network and access"
        ) from None


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files of the folder, by name, headers only."""
    stored: dict[str, StoredTensor] = {}
    for file in _shards(folder):
        for tensor in _header(file):
            if tensor.name in stored:
                raise CheckpointError(
                    f"{folder}: {tensor.name} is both in {stored[tensor.name].file.name} and in {file.name}; "
                    "remove the file that does not belong to this checkpoint"
                )
            stored[tensor.name] = tensor
    return stored


def _shards(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: {_why_no_weights(folder)}")
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map'; download the file again")
    for name in weight_map.values():
        # The files of a snapshot in huggingface_hub's cache are links out of the folder, so only names are judged.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}; shards must be .safetensors files of the same folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing, though {INDEX} names it; download it")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _why_no_weights(folder: Path) -> str:
    if any(folder.glob("*.safetensors")):
        return f"has neither {SINGLE} nor {INDEX} to say which .safetensors files belong together; download the index"
    pickles = sorted(p.name for p in folder.iterdir() if p.name.endswith((".bin", ".pt", ".pth")))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when read; convert it where you trust it: "
            f"transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"no {SINGLE} and no {INDEX}; download the weights"


def _header(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, "pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 - no mapping, no iterator
            return [StoredTensor(n, file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no complete safetensors file ({_one_line(error)}); download it again") from None


def _check_fit(
    folder: Path, config: ModelConfig, expected: dict[str, torch.Size], stored: dict[str, StoredTensor]
) -> None:
    """Raise one CheckpointError that lists everything in which the files and config.json disagree."""
    missing = [name for name in expected if name not in stored]
    embedding_shape = (config.vocab_size, config.hidden_size)
    unexpected = [
        tensor.name
        for tensor in stored.values()
        if tensor.name not in expected
        and not tensor.name.endswith("rotary_emb.inv_freq")  # a buffer that old transformers saved
        and not (config.tie_embeddings and tensor.name == "lm_head.weight" and tensor.shape == embedding_shape)
    ]
    both = [(stored[name], tuple(shape)) for name, shape in expected.items() if name in stored]
    misshapen = [f"{t.name} {list(t.shape)} for {list(shape)}" for t, shape in both if t.shape != shape]
    alien = [f"{t.name} {t.dtype}" for t in stored.values() if t.dtype not in STORED_DTYPES]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen, "not floating point": alien}
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
    found = STORED_DTYPES[stored["model.embed_tokens.weight"].dtype]
    return torch.float32 if found == torch.float64 else found


def _pieces(tensor: StoredTensor) -> Iterable[tuple[slice, Tensor]]:
    """The rows of a stored tensor, at most CHUNK_BYTES at a time, each mapped only while it is looked at."""
    row_bytes = STORED_DTYPES[tensor.dtype].itemsize * torch.Size(tensor.shape[1:]).numel()
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, tensor.shape[0], step):
        rows = slice(start, min(start + step, tensor.shape[0]))
        with safe_open(tensor.file, "pt") as content:
            yield rows, content.get_slice(tensor.name)[rows]


def _fill(slot: Tensor, tensor: StoredTensor, check: bool) -> bool:
    """Copy a stored tensor into its place, converting on the way. False if `check` finds NaN or Inf there."""
    finite = True
    for rows, piece in _pieces(tensor):
        slot[rows].copy_(piece)
        if check:
            finite &= bool(slot[rows].isfinite().all())  # host sync: once per piece, while loading
    return finite


def _check_tied_head(model: Decoder, head: StoredTensor | None) -> None:
    """A tied model's stored head is ignored because it repeats the embedding; refuse one that does not."""
    if model.lm_head is not None or head is None:
        return
    for rows, piece in _pieces(head):
        embedding = model.embed_tokens.weight[rows]
        if not torch.equal(piece.to(embedding), embedding):  # host sync: once per piece, while loading
            raise CheckpointError(
                f"{head.file}: lm_head.weight differs from the embedding though config.json ties them; "
                "set tie_word_embeddings to false there"
            )


def _some(names: list[str], limit: int = 8) -> str:
    more = len(names) - limit
    return f"{len(names)} ({', '.join(names[:limit])}{f' and {more} more' if more > 0 else ''})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
