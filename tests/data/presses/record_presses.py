"""Record what the Compactor and CUR presses of NVIDIA kvpress score and keep on small random models.

    bench/speed/peers/.venv/bin/python tests/data/presses/record_presses.py tests/data/presses/presses.safetensors

Tensors of a case, by its number: q_HLD (after RoPE), k_KLD and v_KLD of one layer before compression, and for every
press NAME.score_KL and NAME.kept_KC (ascending). Compactor draws Gaussian numbers: NAME.sketch_KDS are those, divided
by the root of S. Its chunks divide what is between its protected entries: kvpress lets the padding of a last chunk
attend and be attended to, which the authors' own engine does not.

Shapes: H query heads, K KV heads, L prompt length, D head dim, S numbers of a sketched key, C kept entries of one head.
"""

import dataclasses
import json
import sys
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from kvpress import CompactorPress, CURPress, ScorerPress
from kvpress.utils import get_prerope_query_states
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HIDDEN, VOCAB, LAYER, THETA = 64, 256, 1, 1e4
MIN_GAP = 1e-5  # between the worst kept and the best dropped score, relative; below it rounding would decide


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a prompt, and the presses that see it."""

    seed: int
    kv_heads: int
    group: int
    head_dim: int
    length: int
    presses: dict[str, ScorerPress]


CASES = [
    Case(0, 2, 2, 16, 60, {"compactor": CompactorPress(0.5, chunk_size=24), "cur": CURPress(0.5)}),
    Case(1, 1, 4, 64, 60, {"compactor": CompactorPress(0.25, chunk_size=48), "cur": CURPress(0.75, num_sinks=1)}),
    Case(
        2,
        4,
        1,
        16,
        77,
        {
            "compactor": CompactorPress(0.7, chunk_size=13, sketch_dimension=8),
            "cur": CURPress(0.3, leverage_type="key", local_window_size=8),
        },
    ),
    Case(
        3,
        2,
        2,
        32,
        92,
        {
            "compactor": CompactorPress(0.6, chunk_size=10, blending=1.5),
            "cur": CURPress(0.5, leverage_type="value"),
        },
    ),
    Case(
        4,
        2,
        1,
        32,
        70,
        {
            "compactor": CompactorPress(0.4, chunk_size=29, blending=0.0),
            "cur": CURPress(0.5, leverage_type="kv_avg", num_sinks=0),
        },
    ),
    Case(
        5,
        1,
        2,
        64,
        66,
        {
            "compactor": CompactorPress(0.5, chunk_size=20, sink_size_start=4, sink_size_end=2),
            "cur": CURPress(0.6, use_local_approximation=False),
        },
    ),
]


def model_of(case: Case) -> LlamaForCausalLM:
    """A float32 Llama whose attention is neither flat nor one-hot."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYER + 1,
        num_attention_heads=case.kv_heads * case.group,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=(1 / HIDDEN) ** 0.5,
    )
    torch.manual_seed(case.seed)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def record(case: Case, name: str) -> dict[str, torch.Tensor]:
    press, seen, drawn = case.presses[name], {}, []
    compress, score, randn = press.compress, press.score, torch.randn

    def draw(*shape: int, **options: Any) -> torch.Tensor:
        drawn.append(randn(*shape, **options))
        return drawn[-1]

    def spy_score(module: Any, *args: Any, **named: Any) -> torch.Tensor:
        with patch.object(torch, "randn", draw):
            result = score(module, *args, **named)
        if module.layer_idx == LAYER:
            seen[f"{name}.score_KL"] = result[0].float()
            if drawn:
                seen[f"{name}.sketch_KDS"] = drawn[-1][0] / drawn[-1].shape[-1] ** 0.5
        return result

    def spy_compress(module, hidden_states, keys, values, attentions, kwargs):
        result = compress(module, hidden_states, keys, values, attentions, kwargs)
        if module.layer_idx == LAYER:
            q, _ = apply_rotary_pos_emb(
                get_prerope_query_states(module, hidden_states), keys, *kwargs["position_embeddings"]
            )
            same_KCL = (result[0][0, :, :, None] == keys[0, :, None]).all(-1)
            assert (same_KCL.sum(-1) == 1).all(), "a kept row must equal exactly one original row"
            kept_KC = same_KCL.int().argmax(-1).sort(-1).values.int()
            seen.update(q_HLD=q[0], k_KLD=keys[0], v_KLD=values[0], **{f"{name}.kept_KC": kept_KC})
        return result

    press.score, press.compress = spy_score, spy_compress
    model = model_of(case)
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(case.seed))[None, : case.length]
    torch.manual_seed(100 + case.seed)
    with press(model):
        model(ids, past_key_values=DynamicCache())
    best_KL = seen[f"{name}.score_KL"].sort(-1, descending=True).values
    n_kept = seen[f"{name}.kept_KC"].shape[1]
    gap_K = (best_KL[:, n_kept - 1] - best_KL[:, n_kept]) / best_KL[:, n_kept].abs().clamp(min=1e-3)
    assert gap_K.min() > MIN_GAP, f"case {case.seed} {name}: the cut is decided by {gap_K.min():.1e}"
    return seen


def main() -> None:
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    for case in CASES:
        for name in case.presses:
            for part, tensor in record(case, name).items():
                known = tensors.setdefault(f"{case.seed}.{part}", tensor.contiguous())
                assert torch.equal(known, tensor)
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    options = [
        {
            name: {k: v for k, v in vars(press).items() if isinstance(v, int | float | str | None)}
            for name, press in case.presses.items()
        }
        for case in CASES
    ]
    about = {"theta": THETA, "presses": options, "versions": versions}
    save_file(tensors, sys.argv[1], {"about": json.dumps(about)})


if __name__ == "__main__":
    main()
