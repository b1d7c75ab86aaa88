"""Models of int8 and int4 weights, end to end: they answer as the dense model of the same numbers, evictions included, load from
folders of both kinds, and are taken for no other model."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling.checkpoint.loading
import restkv
from laws.kept import engine_kept
from make.small import small_ids, small_model
from modeling.checkpoint.expected import expected_tensors
from modeling.checkpoint.loading import SINGLE, load_model, load_outline
from modeling.families.registry import read_config
from modeling.layers import Decoder
from modeling.quant import quantise, quantised, weights_of
from restkv.context import CompressedContext
from restkv.errors import CheckpointError, ConfigError, OutputError, PromptError, TooLargeError
from restkv.lm import LM
from restkv.policies import H2O, ReSTKV, SnapKV
from restkv.saving.checkpoint import quantize
from restkv.saving.fingerprint import fingerprint
from restkv.session import Session
from twins.dense import dense_logits
from twins.quantised import dense_twin

both = pytest.mark.parametrize("weights", ["int8", "int4"])
IDS = small_ids(70, 1)
POLICIES = [
    ReSTKV(20, window=4, interval=8, budget_by="global"),
    ReSTKV(24, window=4, interval=8, gqa="joint"),
    SnapKV(24, window=4, interval=8),
    H2O(20, recent=4),
]


def model_of(weights: str | None, dtype: torch.dtype = torch.float32) -> Decoder:
    model = small_model(4, hidden=64, head_dim=16, windows=(None, 9)).to(dtype)
    if weights is not None:
        quantise(model, weights)
    return model


def same_tensors(one: Decoder, other: Decoder) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of a checkpoint with biases, of 64 inputs, that a test may break."""
    return Path(shutil.copytree(tiny("llama_biases").folder, tmp_path / "dense"))


# -- as the dense model of the same numbers


@both
def test_answers_and_kept_sets_are_those_of_the_dense_model(weights):
    lm = LM(model_of(weights), None)
    twin = LM(dense_twin(lm.model), None)
    torch.testing.assert_close(lm.logits(IDS), twin.logits(IDS), rtol=1e-3, atol=1e-3)
    for policy in POLICIES:
        mine, theirs = (one.generate(IDS, policy, max_new_tokens=24) for one in (lm, twin))
        assert mine.tokens == theirs.tokens and mine.stats.kept == theirs.stats.kept and mine.stats.evictions > 0
        kept = [engine_kept(one.compress(IDS, policy)._session, 0) for one in (lm, twin)]
        assert kept[0] == kept[1]
    chunked = [
        one.generate(IDS, POLICIES[2], prefill="chunked", chunk=6, max_new_tokens=8).tokens for one in (lm, twin)
    ]
    assert chunked[0] == chunked[1]


@both
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_step_answers_the_same_and_is_compiled_once(weights, dtype):
    """In bfloat16, where rounding may tip a choice of tokens, the first steps are compared in logits."""
    torch._dynamo.reset()
    lms = [LM(model_of(weights, dtype), None, backend) for backend in ("sdpa", "flex")]
    policy = ReSTKV(20, window=4, interval=8)
    sessions = [Session(lm.engine, policy, [len(IDS)], 24) for lm in lms]
    for session in sessions:
        session.prefill([IDS])
    for token in small_ids(7, 9):
        for session in sessions:
            session.feed(torch.tensor([token]))
        logits = [session.logits_BV for session in sessions]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(logits[0], logits[1], rtol=10 * eps, atol=max(20 * eps, 1e-4))
    said = [lm.generate(IDS, policy, max_new_tokens=24) for lm in lms]
    again = [lm.generate(small_ids(90), policy, max_new_tokens=40) for lm in lms]
    assert again[1].stats.graphs == 0
    if dtype == torch.float32:
        assert said[0].tokens == said[1].tokens and again[0].tokens == again[1].tokens
    torch._dynamo.reset()


# -- loading


@both
@pytest.mark.parametrize("fused", [True, False])
def test_loading_quantises_what_it_reads_piece_by_piece(weights, fused, folder, monkeypatch):
    want = load_model(folder, fused=fused)
    quantise(want, weights)
    monkeypatch.setattr(modeling.checkpoint.loading, "CHUNK_BYTES", 1000)  # three rows at a time
    seen: list[tuple[int, int]] = []
    got = load_model(folder, fused=fused, weights=weights, progress=lambda done, total: seen.append((done, total)))
    assert same_tensors(got, want) and weights_of(got) == weights
    assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in got.parameters())
    outline = load_outline(folder, fused=fused, weights=weights)
    assert [(n, p.shape, p.dtype) for n, p in outline.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in got.named_parameters()
    ]
    assert all(p.is_meta for p in outline.parameters())


def test_loading_never_holds_more_than_the_model_and_a_piece(folder, monkeypatch):
    """No matrix is made whole on the way: what is quantised at a time is what has just been read."""
    monkeypatch.setattr(modeling.checkpoint.loading, "CHUNK_BYTES", 1000)
    rows, fill = [], modeling.quant.Int8.fill

    def counted(matrix, first, w_nE):
        rows.append(w_nE.numel())
        fill(matrix, first, w_nE)

    monkeypatch.setattr(modeling.quant.Int8, "fill", counted)
    load_model(folder, weights="int8")
    assert max(rows) <= 250


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_quantised_checkpoint_are_near(weights, dtype, tiny):
    plain, coded = (load_model(tiny("qwen3_window").folder, dtype=dtype, weights=kind) for kind in ("auto", weights))
    want, got = (dense_logits(model, torch.tensor(small_ids(20))) for model in (plain, coded))
    assert coded.dtype == dtype
    gap = float((got - want).norm() / want.norm())
    assert 0 < gap < {"int8": 0.03, "int4": 0.4}[weights]


def test_check_weights_and_tied_heads_work_on_what_is_stored(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("qwen2_window").folder, tmp_path / "tied"))
    tensors = load_file(folder / SINGLE)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE)
    assert load_model(folder, weights="int4").lm_head is None
    head[3] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load_model(folder, weights="int8")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=re.escape(f"NaN or Inf as float32 in 1 ({name})")):
        load_model(folder, weights="int8", check_weights=True)


def test_what_cannot_be_is_refused_in_one_line(folder, monkeypatch):
    with pytest.raises(PromptError, match="weights 'int5' are not known; give auto, int8, int4"):
        restkv.load(folder, weights="int5")
    monkeypatch.setattr(modeling.checkpoint.loading, "free_bytes", lambda: 1000)
    for weights, mend in (("int8", "ask for int4 weights, or free memory"), ("int4", "; free memory")):
        with pytest.raises(TooLargeError, match=f"the weights take .* as {weights}, .*{mend}"):
            load_model(folder, weights=weights)


# -- which model it is


def test_fingerprints_tell_the_kinds_apart_and_do_not_follow_the_packing(monkeypatch):
    models = {weights: model_of(weights, dtype=torch.bfloat16) for weights in (None, "int8", "int4")}
    prints = {weights: fingerprint(model) for weights, model in models.items()}
    assert len(set(prints.values())) == 3
    assert [bool(re.search(rf"-bfloat16-{w}-", prints[w])) for w in ("int8", "int4")] == [True, True]
    monkeypatch.setattr(modeling.quant, "packed_rows", lambda: 0)  # as on a GPU, or on another CPU
    other = model_of("int4", dtype=torch.bfloat16)
    assert (
        {m.packed for m in quantised(other).values()} == {0} != {m.packed for m in quantised(models["int4"]).values()}
    )
    assert fingerprint(other) == prints["int4"]
    moved = copy.deepcopy(models["int4"])
    next(iter(quantised(moved).values())).codes[3, 5] ^= 1
    assert fingerprint(moved) != prints["int4"]


def test_a_context_of_quantised_weights_is_not_taken_by_another_model(tmp_path):
    lm = LM(model_of("int8"), None)
    place = tmp_path / "context"
    context = lm.compress(IDS, POLICIES[0])
    context.save(place)
    again = CompressedContext.load(place, LM(model_of("int8"), None))
    assert again.ask(small_ids(5), max_new_tokens=8).tokens == context.ask(small_ids(5), max_new_tokens=8).tokens
    for other in (model_of(None), model_of("int4")):
        with pytest.raises(PromptError, match=f"made with the model {fingerprint(lm.model)}, this one is "):
            CompressedContext.load(place, LM(other, None))


# -- quantised checkpoints


@both
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_quantised_folder_is_the_model_that_was_quantised_while_loading(weights, dtype, folder, tmp_path):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    size = quantize(folder, tmp_path / "made", weights, dtype)
    want, got = load_model(folder, dtype=dtype, weights=weights), load_model(tmp_path / "made")
    assert same_tensors(got, want) and got.config.weights == weights
    assert dtype != "auto" or fingerprint(got) == fingerprint(want)  # of another dtype config.json says another
    assert same_tensors(
        load_model(tmp_path / "made", weights=weights, fused=False),
        load_model(folder, dtype=dtype, weights=weights, fused=False),
    )
    file = tmp_path / "made" / SINGLE
    assert file.stat().st_size == size < 1.1 * sum(p.nbytes for p in got.parameters()) + 10_000
    tensors = load_file(file)  # by the library that everybody reads such files with
    expected = expected_tensors(read_config(tmp_path / "made"))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: one.shape for name, one in expected.items()}
    kept = {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {p.name for p in (tmp_path / "made").iterdir()} == kept
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "made"))
    assert {k: v for k, v in after.items() if before.get(k) != v}.keys() <= {"quantization_config", "dtype"}


def test_a_quantised_folder_has_no_other_weights_and_is_read_strictly(folder, tmp_path):
    made = tmp_path / "made"
    quantize(folder, made, "int8")
    with pytest.raises(ConfigError, match="its weights are int8, and cannot be made int4; leave weights at auto"):
        load_model(made, weights="int4")
    with pytest.raises(ConfigError, match="its weights are int8"):
        quantize(made, tmp_path / "again", "int4")
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = load_file(made / SINGLE)
    for change, text in (
        ({f"{name}_scale": None}, rf"missing: 1 \({name}_scale\)"),
        ({name: whole[name].float()}, rf"other codes: 1 \({name} F32 for I8\)"),
        ({name: whole[name][:, :-1].contiguous()}, r"wrong shape: 1"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, r"not floating point: 1 \(model.norm.weight I8\)"),
        ({f"{name}_scale": whole[f"{name}_scale"] / 0}, None),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, made / SINGLE)
        with pytest.raises(CheckpointError, match=text or rf"NaN or Inf as float32 in 1 \({name}\)"):
            load_model(made, check_weights=True)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            {"quant_method": "gptq", "weights": "int8", "version": 1},
            r"the weights are quantised \('gptq'\); use the float16",
        ),
        (
            {"quant_method": "restkv", "weights": "int3", "version": 1},
            "quantised 'weights' are 'int3'; known are int8, int4",
        ),
        ({"quant_method": "restkv", "weights": ["int8"], "version": 1}, r"quantised 'weights' are \['int8'\]"),
        (
            {"quant_method": "restkv", "weights": "int8", "version": 2},
            "quantised by version 2 of our own format, 1 is known",
        ),
        ({"quant_method": "restkv", "weights": "int8", "version": 1, "more": 1}, "make the folder anew"),
        ({"quant_method": "restkv", "weights": "int8"}, "quantised by version None"),
    ],
)
def test_what_others_have_quantised_is_refused(said, text, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(ConfigError, match=text):
        load_model(folder)


def test_quantize_writes_to_new_folders_only(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    quantize(folder, tmp_path / "empty", "int4")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "empty", tmp_path / "file", folder):
        with pytest.raises(OutputError, match="is there already; give a folder that is not"):
            quantize(folder, place, "int4")
    with pytest.raises(OutputError, match="cannot be written"):
        quantize(folder, tmp_path / "file" / "under", "int4")
    with pytest.raises(ConfigError, match="weights 'auto' are not known"):
        quantize(folder, tmp_path / "more", "auto")
    assert not (tmp_path / "more").exists()
