"""Record what NVIDIA kvpress keeps on small random models, so that our policies are tested against it without it.

    bench/speed/peers/.venv/bin/python tests/data/kvpress/record.py --out tests/data/kvpress

bench/speed/peers/README.md makes that environment, lists the tensors of a case, and says what each press computes.

Shapes: H query heads, K KV heads, G = H/K, L prompt length, D head dim, C kept entries of one head.
"""

import argparse
import dataclasses
import json
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.utils import get_prerope_query_states
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HIDDEN, VOCAB, LAYERS = 64, 256, 2
MAX_FLOATS = 18_000  # of q, k, v and scores in one case: 20 cases stay below 1.5 MB in the repository
MIN_GAP = 1e-6  # relative gap between the worst kept and the best dropped score; below it rounding would decide
PRESSES: dict[str, type[ScorerPress]] = {
    "snapkv": SnapKVPress,
    "tova": TOVAPress,
    "streamingllm": StreamingLLMPress,
    "keynorm": KnormPress,
    "keydiff": KeyDiffPress,
    "observed_attention": ObservedAttentionPress,
    "expected_attention": ExpectedAttentionPress,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One random model and prompt; `layer` is the one recorded."""

    seed: int
    layer: int
    kv_heads: int
    group: int
    head_dim: int
    length: int
    rope_theta: float


def draw_shape(rng: random.Random, case: int) -> Shape:
    """A shape under MAX_FLOATS; groups, layers and RoPE bases take turns so that each is sure to occur."""
    group = (1, 2, 4)[case % 3]
    while True:
        kv_heads, head_dim = rng.choice((1, 2, 3)), rng.choice((16, 32, 64))
        longest = min(200, MAX_FLOATS // (kv_heads * (head_dim * (group + 2) + len(PRESSES))))
        if longest >= 40:
            length = rng.randint(max(40, longest * 2 // 3), longest)
            return Shape(case, case % 2, kv_heads, group, head_dim, length, (1e4, 5e5)[case // 2 % 2])


def draw_press(rng: random.Random, name: str, length: int) -> ScorerPress:
    """A press with random parameters; it protects less than it keeps, else kvpress's top-k would cut among equals."""
    ratio = round(rng.uniform(0.1, 0.8), 2)
    n_kept = int(length * (1 - ratio))
    window = rng.choice([w for w in (8, 16, 32, 64) if w < n_kept] or [1])
    sinks = rng.choice([n for n in (0, 1, 4, 8) if n < n_kept])
    if name == "snapkv":
        return SnapKVPress(ratio, window_size=window, kernel_size=rng.choice((3, 5, 7)))
    if name == "streamingllm":
        return StreamingLLMPress(ratio, n_sink=sinks)
    if name == "expected_attention":
        if rng.random() < 0.5:
            return ExpectedAttentionPress(ratio)  # kvpress's defaults
        return ExpectedAttentionPress(
            ratio,
            n_future_positions=rng.choice((1, 32, 512)),
            n_sink=sinks,
            use_covariance=rng.random() < 0.5,
            use_vnorm=rng.random() < 0.5,
            epsilon=rng.choice((0.0, 0.01)),
        )
    return PRESSES[name](ratio)


def build_model(shape: Shape) -> LlamaForCausalLM:
    """A float32 Llama whose attention logits spread by about 2; the usual init would leave all weights near 1/L."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.kv_heads * shape.group,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        initializer_range=(2 / HIDDEN) ** 0.5,
    )
    torch.manual_seed(shape.seed)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")  # ObservedAttentionPress reads the attention weights
    return model


def kept_indices(kept: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Where the rows [K, C, *] of a compressed cache stood in the full one [K, L, *]: [K, C] int32, ascending."""
    same_KCL = (kept[:, :, None] == full[:, None]).all(-1)
    assert (same_KCL.sum(-1) == 1).all(), "a kept row must equal exactly one original row"
    return same_KCL.int().argmax(-1).sort(-1).values.int()


@torch.no_grad()
def run_press(model: LlamaForCausalLM, ids: torch.Tensor, press: ScorerPress, layer: int) -> dict[str, torch.Tensor]:
    """One prefill under `press`: q_HLD, k_KLD and v_KLD of `layer` before compression, its score_KL and kept_KC."""
    seen: dict[str, torch.Tensor] = {}
    compress, score = press.compress, press.score

    def spy_score(module: Any, *args: Any) -> torch.Tensor:
        result = score(module, *args)
        if module.layer_idx == layer:
            seen["score_KL"] = result[0].float()
        return result

    def spy_compress(module, hidden_states, keys, values, attentions, kwargs):
        result = compress(module, hidden_states, keys, values, attentions, kwargs)
        if module.layer_idx == layer:
            q, _ = apply_rotary_pos_emb(
                get_prerope_query_states(module, hidden_states), keys, *kwargs["position_embeddings"]
            )
            logits = q @ keys.repeat_interleave(module.num_key_value_groups, 1).mT * module.scaling
            causal = torch.ones_like(logits[0, 0]).tril().bool()
            torch.testing.assert_close(logits.where(causal, -torch.inf).softmax(-1), attentions)
            seen.update(q_HLD=q[0], k_KLD=keys[0], v_KLD=values[0])
            # Rows are matched on key and value together: the choice is read from the cache, not from the score.
            seen["kept_KC"] = kept_indices(torch.cat(result, -1)[0], torch.cat((keys, values), -1)[0])
        return result

    press.score, press.compress = spy_score, spy_compress
    with press(model):
        model(ids, past_key_values=DynamicCache())
    return seen


def check_gap(where: str, score_KL: torch.Tensor, n_kept: int) -> None:
    """Refuse a case that floating-point rounding could decide either way."""
    best_KL = score_KL.sort(-1, descending=True).values
    gap = ((best_KL[:, n_kept - 1] - best_KL[:, n_kept]) / best_KL[:, n_kept].abs().clamp(min=1e-12)).min()
    assert gap > MIN_GAP, f"{where}: kept and dropped scores differ by {gap:.1e} only; draw another --seed"


def record(case: int, rng: random.Random, folder: Path) -> None:
    shape = draw_shape(rng, case)
    model = build_model(shape)
    ids = torch.randperm(VOCAB)[None, : shape.length]  # no token twice: repeats have equal key norms in layer 0
    tensors: dict[str, torch.Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for name in PRESSES:
        press = draw_press(rng, name, shape.length)
        seen = run_press(model, ids, press, shape.layer)
        n_kept = seen["kept_KC"].shape[1]
        check_gap(f"case {case} {name}", seen["score_KL"], n_kept)
        for part in ("q_HLD", "k_KLD", "v_KLD"):
            assert torch.equal(tensors.setdefault(part, seen[part].contiguous()), seen[part])
        tensors |= {f"{name}.{part}": seen[part].contiguous() for part in ("score_KL", "kept_KC")}
        parameters[name] = {"press": type(press).__name__, **dataclasses.asdict(press), "n_kept": n_kept}
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    about = {"case": dataclasses.asdict(shape), "presses": parameters, "versions": versions}
    # One metadata entry: safetensors does not fix the order of several, and the files should be reproducible bytes.
    save_file(tensors, folder / f"case{case:02d}.safetensors", {"about": json.dumps(about)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the case files; made if missing")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in one order: the files come out the same on every run
    rng = random.Random(args.seed)
    for case in range(args.cases):
        record(case, rng, args.out)
    print(f"{args.cases} cases in {args.out}")


if __name__ == "__main__":
    main()
