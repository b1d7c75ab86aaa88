"""What a folder holds: the files of its weights, or else which other kind of folder it is, and what then helps."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from modeling.config import read_json
from modeling.errors import CheckpointError, ConfigError, RestKVWarning
from modeling.files import shortened

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
ADAPTER_FILES = (ADAPTER, "adapter_model.safetensors", "adapter_model.bin")
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z", ".rar")
OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx", ".npz")
CONVERT = "transformers.AutoModelForCausalLM.from_pretrained({source}).save_pretrained(NEW_FOLDER)"
MERGE = (
    "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER), "
    "and copy the tokenizer files there"
)


def checkpoint_folder(folder: Path) -> Path:
    """The folder itself, or the only snapshot of a folder of huggingface_hub's cache (`models--org--name`).

    Raises CheckpointError for a cache folder with no snapshot or with several, and for the whole cache.
    """
    if (folder / CONFIG).exists():
        return folder
    place = Path(os.path.abspath(folder))
    if place.name in ("snapshots", "blobs", "refs") and place.parent.name.startswith("models--"):
        place = place.parent
    if place.name.startswith("models--") or (place / "snapshots").is_dir():
        return _only_snapshot(folder, place)
    models = [name for name in _names(folder) if name.startswith("models--")]
    if models:
        raise CheckpointError(
            f"{folder}: the cache of huggingface_hub, not a checkpoint; give a name such as {_hub_name(models[0])}, "
            f"or one of its folders: {_some(models)}"
        )
    return folder


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights.

    Raises CheckpointError when there are none (it says what there is instead), when it is not clear which belong
    together, or when one is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: {_why_no_weights(folder)}")
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' of tensor names to files; download the file again")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise _no_shard(index, name)
    names = list(dict.fromkeys(weight_map.values()))  # every file is looked at once, however many tensors it has
    for name in names:
        # The files of a snapshot in huggingface_hub's cache are links out of the folder, so only names are judged.
        if not SHARD.fullmatch(name):
            raise _no_shard(index, name)
    for name in names:
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"{folder}: {shortened(name)} is missing, though {INDEX} names it; download it")
    return [folder / name for name in sorted(names)]


def _no_shard(index: Path, name: object) -> CheckpointError:
    return CheckpointError(
        f"{index}: names {shortened(repr(name))}; shards must be .safetensors files of the same folder"
    )


def check_layout(folder: Path) -> None:
    """Refuse a folder of another kind (GGUF, an adapter, diffusers, Meta's layout), and remark on an unused adapter."""
    if not (folder / CONFIG).is_file():
        if what := _why_no_config(folder):
            raise ConfigError(f"{folder}: no {CONFIG}: {what}")
        return
    there = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if there and ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        warnings.warn(
            f"{folder}: the adapter ({there[0]}) beside the weights is not applied; to use it: {MERGE}",
            RestKVWarning,
            stacklevel=4,
        )


def why_a_file(path: Path) -> str:
    """What to do with a file that was given in the place of a folder."""
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return f"is a GGUF file; {_gguf(path.name)}"
    if suffix in ARCHIVES:
        return "is an archive; unpack it and give the folder that holds config.json"
    if suffix in PICKLES:
        return f"is a pickle, which can run code when read; {_pickle()}"
    return f"is a file; give the folder that holds it, {path.parent}"


def _why_no_weights(folder: Path) -> str:
    names = _names(folder)
    adapters = [name for name in names if name in ADAPTER_FILES]
    pickles = _ending(names, PICKLES)
    if adapters:
        return f"only an adapter ({adapters[0]}), no full weights; merge it: {MERGE}"
    if consolidated := [name for name in names if name.startswith("consolidated") and name.endswith(".safetensors")]:
        return (
            f"{consolidated[0]} has the weights in the layout of its maker's own program; there is no {SINGLE} "
            f"and no {INDEX}, download those of the same repository"
        )
    if shards := _ending(names, (".safetensors",)):
        return (
            f"has neither {SINGLE} nor {INDEX} to say which .safetensors files belong together (there is "
            f"{shortened(shards[0])}); download the index"
        )
    if pickles:
        return f"{shortened(pickles[0])} is a pickle, which can run code when read; {_pickle()}"
    return _other_weights(names) or f"no {SINGLE} and no {INDEX}; download the weights"


def _why_no_config(folder: Path) -> str | None:
    """What a folder without config.json may be; None where nothing tells."""
    names = _names(folder)
    if any(name in ADAPTER_FILES for name in names):
        return f"the folder holds only an adapter{_base_of(folder)}; merge it: {MERGE}"
    if "model_index.json" in names:
        return "the folder is a diffusers pipeline; restkv runs causal language models only"
    if "params.json" in names or any(name.startswith("consolidated") for name in names):
        return (
            "the folder has the layout of its maker's own program (params.json, consolidated files); "
            "download the model in Hugging Face's layout, which has config.json and model.safetensors"
        )
    if what := _other_weights(names):
        return what
    if inner := [name for name in names if (folder / name / CONFIG).is_file()]:
        return f"but {_some(inner)} inside has one; give {folder / inner[0]}"
    return None


def _other_weights(names: list[str]) -> str | None:
    """What there is in place of weights that can be read."""
    if files := _ending(names, (".gguf",)):
        return f"{shortened(files[0])} is a GGUF file; {_gguf(files[0])}"
    if files := _ending(names, OTHER_FRAMEWORKS):
        return f"{shortened(files[0])} holds weights for another framework; download the model in safetensors format"
    if files := _ending(names, ARCHIVES):
        return f"{shortened(files[0])} is an archive; unpack it first"
    return None


def _gguf(name: str) -> str:
    source = f'FOLDER, gguf_file="{shortened(name)}"'
    return f"convert it: {CONVERT.format(source=source)}, and AutoTokenizer likewise"


def _pickle() -> str:
    return f"convert it where you trust it: {CONVERT.format(source='FOLDER')}"


def _base_of(folder: Path) -> str:
    """ " for BASE" where adapter_config.json names its base model."""
    try:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    except ConfigError:
        return ""
    return f" for {shortened(base)}" if isinstance(base, str) and base else ""


def _only_snapshot(given: Path, place: Path) -> Path:
    snapshots = [place / "snapshots" / name for name in _names(place / "snapshots")]
    whole = [snapshot for snapshot in snapshots if (snapshot / CONFIG).exists()]
    if len(whole) == 1:
        return whole[0]
    hub_name = f" {_hub_name(place.name)}" if place.name.startswith("models--") else ""
    if not whole:
        raise CheckpointError(
            f"{given}: a folder of huggingface_hub's cache without a complete snapshot; "
            f"give the hub name{hub_name} to download it"
        )
    raise CheckpointError(
        f"{given}: a folder of huggingface_hub's cache with {len(whole)} snapshots; "
        f"give one, such as {whole[0]}, or the hub name{hub_name}"
    )


def _hub_name(cache_name: str) -> str:
    return cache_name.removeprefix("models--").replace("--", "/")


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _ending(names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def _some(names: list[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(map(shortened, names[:limit])) + (f" and {more} more" if more > 0 else "")
