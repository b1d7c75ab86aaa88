"""A name for a model's weights, by which a saved context is known to be of this model and no other."""

from __future__ import annotations

import hashlib
import math
import weakref
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from modeling.layers import Decoder
from modeling.quant import Quantised, quantised, weights_of

PIECE = 1 << 22  # bytes that one thread hashes at a time
MOST_THREADS = 8
SAMPLE = 1024  # numbers of a tensor

# By model: what its weights looked like, and their fingerprint.
_known: weakref.WeakKeyDictionary[Decoder, tuple[object, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: Decoder) -> str:
    """A name for exactly these weights: family, shape, dtype, how the matrices are held where they are quantised, and a SHA-256
    over config and every bit of every tensor.

    It is the same on every device. All weights are read once per model object, which takes 0.5 s for 500 MB on one thread of a
    shared CPU; torch's threads share it. They are read again when a tensor is another or has been written to, or when a sample
    of it differs; what is written into `tensor.data` beside the sample is not seen after that.
    """
    weights = dict(sorted(model.state_dict().items()))
    looks = sampled(model), [(name, _place(weight), _version(weight)) for name, weight in weights.items()]
    before = _known.get(model)
    if before is not None and before[0] == looks:
        return before[1]
    digest, done = hashlib.sha256(repr(model.config).encode()), dict[object, bytes]()
    packed = {f"{name}.codes": matrix for name, matrix in quantised(model).items()}
    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        for name, weight in weights.items():
            place = _place(weight)
            if place not in done:  # tied weights are read once
                done[place] = _codes_digest(packed[name], threads) if name in packed else _digest(weight, threads)
            digest.update(repr((name, str(weight.dtype), tuple(weight.shape))).encode() + done[place])
    named = _named(model, digest.hexdigest())
    _known[model] = looks, named
    return named


def sampled(model: Decoder) -> str:
    """The fingerprint of versions before: of every tensor it has read some 1,024 numbers, and may not tell two models apart."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = (
            flat[:: max(1, len(flat) // SAMPLE)].float().cpu()
        )  # sync: once per tensor, when a file is saved or loaded
        digest.update(name.encode() + sample.numpy().tobytes())
    return _named(model, digest.hexdigest())


def _named(model: Decoder, digest: str) -> str:
    config, dtype, held = model.config, str(model.dtype).removeprefix("torch."), weights_of(model)
    kind = dtype if held is None else f"{dtype}-{held}"
    return f"{config.family}-{config.num_layers}x{config.hidden_size}-{kind}-{digest[:16]}"


def _place(weight: Tensor) -> tuple[object, ...]:
    """What it is of which memory."""
    return weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()


def _version(weight: Tensor) -> int | None:
    """How often it has been written to; of a tensor made in inference mode nobody counts."""
    return None if weight.is_inference() else weight._version


def _digest(weight: Tensor, threads: Executor) -> bytes:
    """SHA-256 over those of its pieces."""
    pieces = weight.detach().reshape(-1).split(math.ceil(PIECE / weight.element_size()))
    return hashlib.sha256(b"".join(threads.map(_piece, pieces))).digest()


def _codes_digest(matrix: Quantised, threads: Executor) -> bytes:
    """The same of a matrix's codes as a file holds them: how they lie in memory differs from machine to machine."""

    def digest(rows: tuple[int, int]) -> bytes:
        return _piece(matrix.stored(*rows)[0].reshape(-1))

    return hashlib.sha256(b"".join(threads.map(digest, matrix.pieces(PIECE)))).digest()


def _piece(piece: Tensor) -> bytes:
    bits: Any = piece.cpu().view(torch.uint8).numpy()  # sync: once per piece and model
    return hashlib.sha256(bits).digest()
