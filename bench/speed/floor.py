"""What the machine can do, and what that makes of a model's bytes and operations: the floor every timing is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.compiled import compiled, only_compiled
from modeling.config import ModelConfig
from modeling.layers import Decoder, linear
from modeling.quant import quantise, quantised
from restkv.kernels import check_compiler

TRIES = 11  # the first one compiles


@dataclass(frozen=True)
class Machine:
    """Rates measured in this run.

    Attributes:
        read_bytes_per_s: of a compiled matrix-vector product that reads weights, the best of all tries and dtypes.
        operations_per_s: in floating point, of a large matrix product, the best of the dtype and float32 (a CPU may have no
            instructions for the dtype, and widen it).
    """

    read_bytes_per_s: float
    operations_per_s: float


def measure_machine(device: str, threads: int, dtype: str, megabytes: int = 256) -> Machine:
    """Rates of this machine now. The matrix is larger than any cache."""
    check_compiler(torch.device(device))
    if device == "cpu":
        torch.set_num_threads(threads)
    product = compiled(_product)
    rows, size = (512, 2048) if device == "cpu" else (8192, 8192)
    reads, multiplies = [], []
    for kind in {getattr(torch, dtype), torch.float32}:
        entries = megabytes * (1 << 20) // kind.itemsize
        vector, matrix = _random(device, kind, 1024), _random(device, kind, entries // 1024, 1024)
        reads.append(matrix.nbytes / _least(partial(product, vector, matrix), device))
        x, weight = _random(device, kind, rows, size), _random(device, kind, size, size)
        multiplies.append(2 * rows * size**2 / _least(partial(F.linear, x, weight), device, tries=4))
    return Machine(max(reads), max(multiplies))


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return linear(only_compiled(x), weight)


def _least(work: Callable[[], Tensor], device: str, tries: int = TRIES) -> float:
    laps = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        laps.append(time.perf_counter() - start)
    return min(laps[1:])


def matrix_parameters(config: ModelConfig) -> tuple[int, int]:
    """Weights of all layers' matrices, and of the output matrix. The embedding is not read, but for one row."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer, config.vocab_size * config.hidden_size


@cache
def matrix_bytes(config: ModelConfig, dtype: str, weights: str | None) -> int:
    """What those weights take: in `dtype`, or as codes and scales (modeling/quant.py)."""
    kind: torch.dtype = getattr(torch, dtype)
    if weights is None:
        return sum(matrix_parameters(config)) * kind.itemsize
    with torch.device("meta"):
        model = Decoder(config).to(kind)
    quantise(model, weights)
    unread = "" if config.tie_embeddings else "embed_tokens.weight"
    return sum(matrix.nbytes for name, matrix in quantised(model).items() if name != unread)


def decode_floor(
    config: ModelConfig,
    dtype: str,
    machine: Machine,
    cache_bytes: int,
    kept: float,
    batch: int,
    weights: str | None = None,
) -> float:
    """Seconds one decode step takes at least: all weights and the live cache are read, every row multiplied with them."""
    layers, head = matrix_parameters(config)
    reading = (matrix_bytes(config, dtype, weights) + cache_bytes) / machine.read_bytes_per_s
    attended = 4 * kept * config.num_heads * config.head_dim * config.num_layers
    return max(reading, batch * (2 * (layers + head) + attended) / machine.operations_per_s)


def prefill_floor(config: ModelConfig, machine: Machine, context: int, batch: int) -> float:
    """Seconds a dense prefill takes at least: its matrix products, and half a square of attention per head and layer."""
    layers, head = matrix_parameters(config)
    attended = 2 * context**2 * config.num_heads * config.head_dim * config.num_layers
    return batch * (2 * (layers * context + head) + attended) / machine.operations_per_s
