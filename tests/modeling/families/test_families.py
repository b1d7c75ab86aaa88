"""Every family against transformers, through the dense slow twin (tests/twins/dense.py) of the forward paths."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from make.families import CASES, POSITIONS, TRAINED, VOCAB, prompt_ids, reference_logits
from modeling.checkpoint.loading import load_model
from modeling.layers import Block, Decoder, RMSNorm, rounded
from modeling.rope import Rotary
from twins.dense import DenseCache, dense_logits


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_are_those_of_transformers(name, tiny):
    checkpoint = tiny(name)
    ids = prompt_ids()
    want = reference_logits(checkpoint.reference, ids)
    assert want.std() > 0.3, "logits this flat would prove nothing"
    assert largest_gap(dense_logits(load_model(checkpoint.folder), ids), want) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_decoding_token_by_token_is_that_of_transformers(name, tiny):
    checkpoint = tiny(name)
    # Start below the trained length, so that a dynamic rope stretches more with every token.
    prompt, total = TRAINED - 10, TRAINED + 20
    ids = prompt_ids(total)
    model, cache = load_model(checkpoint.folder), DenseCache()
    pieces = [dense_logits(model, piece, cache) for piece in [ids[:prompt], *ids[prompt:].split(1)]]
    assert largest_gap(torch.cat(pieces), reference_logits(checkpoint.reference, ids, prompt)) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_agrees_wherever_the_reference_is_sure(name, tiny):
    checkpoint = tiny(name)
    ids = prompt_ids()
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    want = reference_logits(reference, ids)
    top2 = want.topk(2).values
    sure = top2[:, 0] - top2[:, 1] > 0.1
    assert sure.sum() > POSITIONS / 3
    got = dense_logits(load_model(checkpoint.folder, dtype=torch.bfloat16), ids)
    assert got.dtype == torch.float32
    assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


@pytest.mark.parametrize("name", CASES)
def test_fused_and_split_projections_are_the_same_function(name, tiny):
    folder = tiny(name).folder
    ids = prompt_ids(100)
    fused, split = load_model(folder), load_model(folder, fused=False)
    assert "layers.0.qkv_proj.weight" in fused.state_dict()
    assert "layers.0.k_proj.weight" in split.state_dict()
    assert largest_gap(dense_logits(fused, ids), dense_logits(split, ids)) < 2e-5


# Each of these, changed alone, must move the logits by far more than the comparisons above allow.
MATTERS = [
    ("gemma2", {"attn_softcap": None}),
    ("gemma2", {"final_softcap": None}),
    ("gemma2", {"windows": (49, None, 48)}),
    ("gemma2", {"windows": (48, None, 49)}),
    ("gemma2", {"attn_scale": 64**-0.5}),
    ("gemma2", {"embed_scale": 1.0}),
    ("gemma2", {"activation": "silu"}),
    ("gemma3", {"layer_rope": (0, 0, 0)}),
    ("gemma3", {"layer_rope": (1, 1, 1)}),
    ("mistral_v01", {"windows": (41, 40)}),
    ("mistral_v01", {"windows": (40, 39)}),
    ("qwen2_window", {"windows": (None, None, 50)}),
    ("llama2", {"norm_eps": 1e-2}),
]


@pytest.mark.parametrize(("name", "change"), MATTERS, ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_every_feature_moves_the_logits(name, change, tiny):
    model = load_model(tiny(name).folder)
    ids = prompt_ids()
    other = Decoder(dataclasses.replace(model.config, **change))
    other.load_state_dict(model.state_dict())
    assert largest_gap(dense_logits(model, ids), dense_logits(other, ids)) > 1e-3


@pytest.mark.parametrize(
    "name", [n for n in CASES if CASES[n]().rope_parameters.get("rope_type", "default") != "default"]
)
def test_rope_follows_transformers_to_long_positions(name, tiny):
    """Frequencies agree to the last bits: an error of 1e-6 in one would be an angle of 0.1 at position 100,000."""
    config = CASES[name]()
    pos = torch.tensor([[0, 1, 63, 64, 65, 1000, 30_000, 99_999]])
    oracle = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(cast(transformers.LlamaConfig, config))
    cos, sin = oracle(torch.zeros(1), pos)
    rotary = Rotary(load_model(tiny(name).folder).config.ropes[0])
    got_cos, got_sin = rotary(pos, torch.tensor([100_000]), torch.float32)
    assert torch.allclose(got_cos, cos, atol=5e-3)
    assert torch.allclose(got_sin, sin, atol=5e-3)
    near = pos < 1001
    assert torch.allclose(got_cos[near], cos[near], atol=1e-4)


def test_dynamic_rope_stretches_each_row_by_its_own_length(tiny):
    rotary = Rotary(load_model(tiny("llama_dynamic").folder).config.ropes[0])
    pos = torch.tensor([[10, 50], [10, 50], [10, 50]])
    cos, _ = rotary(pos, torch.tensor([51, TRAINED, 400]), torch.float32)
    assert torch.equal(cos[0], cos[1])  # nothing stretches within the trained length
    alone, _ = rotary(pos[2:], torch.tensor([400]), torch.float32)
    assert torch.equal(cos[2:], alone)
    assert largest_gap(cos[1], cos[2]) > 0.1


def test_padding_positions_count_as_zero(tiny):
    rotary = Rotary(load_model(tiny("llama31").folder).config.ropes[0])
    cos, sin = rotary(torch.tensor([[-1, -7, 0]]), torch.tensor([1]), torch.float32)
    assert torch.equal(cos, torch.ones_like(cos))
    assert torch.equal(sin, torch.zeros_like(sin))


def test_casting_a_model_keeps_its_frequencies_exact(tiny):
    model = load_model(tiny("llama31").folder)
    rotary = cast(Rotary, model.rotaries[0])
    want = rotary.inv_F.clone()
    model.to(torch.bfloat16)
    assert model.blocks[0].o_proj.weight.dtype == torch.bfloat16
    assert rotary.inv_F.dtype == torch.float32
    assert torch.equal(rotary.inv_F, want)
    cos, _ = model.rotary(torch.tensor([[5]]), torch.tensor([6]))[0]
    assert cos.dtype == torch.bfloat16
    model.to_empty(device="cpu")
    assert torch.equal(rotary.inv_F, want)


@pytest.mark.parametrize(("name", "norm"), [("llama2", "LlamaRMSNorm"), ("gemma2", "Gemma2RMSNorm")])
def test_norms_round_where_the_family_rounds(name, norm, tiny):
    """In bfloat16 Llama rounds before the weight and Gemma after it: bit for bit."""
    model = load_model(tiny(name).folder, dtype=torch.bfloat16)
    family = name.removesuffix("2") if name == "llama2" else name
    oracle = getattr(getattr(transformers.models, family), f"modeling_{family}").__dict__[norm](64, 1e-6)
    weight = torch.randn(64).bfloat16()
    ours = RMSNorm(64, 1e-6, model.config.norm_offset)
    oracle.weight.data, ours.weight.data = weight, weight
    x = torch.randn(50, 64, dtype=torch.bfloat16) * 3
    assert torch.equal(ours(x), oracle(x))


@given(
    st.floats(min_value=1e-3, max_value=1e4),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_rounded_is_what_the_dtype_holds(value, dtype):
    assert rounded(value, dtype) == float(torch.tensor(value, dtype=torch.float64).to(dtype))


def test_gemma_embeddings_are_scaled_in_the_weights_dtype(tiny):
    folder = tiny("gemma2").folder
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.arange(VOCAB)[None]
    want = reference.model.embed_tokens(ids)
    assert torch.equal(load_model(folder, dtype=torch.bfloat16).embed(ids), want)


@pytest.mark.parametrize("fused", [True, False])
def test_output_weight_gives_each_heads_share_of_the_projection(fused, tiny):
    block = load_model(tiny("mistral_nemo").folder, fused=fused).blocks[1]
    o_HD = torch.randn(block.config.num_heads, block.config.head_dim)
    w_EHD = block.output_weight()
    assert w_EHD.data_ptr() == block.o_proj.weight.data_ptr()
    shares_EH = torch.einsum("ehd,hd->eh", w_EHD, o_HD)
    assert torch.allclose(shares_EH.sum(1), block.o_proj(o_HD.flatten()), atol=1e-5)


@pytest.mark.parametrize("name", ["llama_dynamic", "gemma3", "qwen2_window"])
def test_a_step_traces_as_one_graph_with_the_block_as_nested_region(name, tiny):
    """fullgraph forbids host syncs and branches on tensors; one graph must serve all positions and lengths."""
    model = load_model(tiny(name).folder)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    class Region(Block):
        @torch.compiler.nested_compile_region
        def region(self, x, cos, sin):
            q, k, v = self.project(x, cos, sin)
            mixed = q + (k + v).repeat_interleave(self.config.group, dim=2)  # stands for attention
            return self.finish(x, mixed)

    for layer in model.blocks:
        layer.__class__ = Region

    def step(ids, pos, length):
        x = model.embed(ids)
        ropes = model.rotary(pos, length)
        for block in model.blocks:
            assert isinstance(block, Region)
            x = block.region(x, *ropes[block.rope])
        return model.head(x)

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=count)
    with torch.no_grad():
        for at in (0, 5, 400):
            args = torch.tensor([[at % VOCAB]]), torch.tensor([[at]]), torch.tensor([at + 1])
            assert largest_gap(compiled(*args), step(*args)) < 1e-5
    assert graphs == 1


def test_the_real_checkpoint_tells_transformers_story(stories260k):
    reference = transformers.AutoModelForCausalLM.from_pretrained(stories260k, attn_implementation="eager")
    model = load_model(stories260k)
    ids = torch.randint(3, 512, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    assert largest_gap(dense_logits(model, ids), reference_logits(reference, ids)) < 1e-4
