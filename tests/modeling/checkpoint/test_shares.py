"""Ranks that share a model read each its own cuts of the files, and nothing else; together they have everything once."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import modeling.checkpoint.loading
import modeling.checkpoint.tensor_file
from modeling.checkpoint.loading import SINGLE, load_model, load_outline, tensor_slots
from modeling.checkpoint.shares import COLUMNS, ROWS
from modeling.checkpoint.tensor_file import Cut, read_header, read_pieces
from modeling.errors import CheckpointError, ParallelError
from modeling.ranks import Ranks

NAMES = ("llama_biases", "llama31", "gemma2", "qwen3_window")


def ranks_of(size: int) -> list[Ranks]:
    return [Ranks(rank, size) for rank in range(size)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_cuts_of_all_ranks_are_the_checkpoint(tiny, name, fused):
    folder = tiny(name).folder
    stored = load_file(folder / SINGLE)
    parts = [tensor_slots(load_model(folder, fused=fused, ranks=ranks)) for ranks in ranks_of(2)]
    for tensor, whole in stored.items():
        module, leaf = tensor.split(".")[-2:]
        ours = [part[tensor] for part in parts]
        if module in ROWS:
            assert torch.equal(torch.cat(ours), whole), tensor
        elif module in COLUMNS and leaf == "weight":
            assert torch.equal(torch.cat(ours, 1), whole), tensor
        elif module in COLUMNS:  # a bias, which is to be added once
            assert torch.equal(ours[0], whole) and not ours[1].any(), tensor
        else:
            assert all(torch.equal(one, whole) for one in ours), tensor


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_a_rank_reads_the_bytes_of_its_share(tiny, monkeypatch, chunk):
    folder, read = tiny("qwen3_window").folder, []
    read_into = modeling.checkpoint.tensor_file._read_into

    def counted(stream, view):
        read.append(len(view))
        read_into(stream, view)

    monkeypatch.setattr(modeling.checkpoint.tensor_file, "_read_into", counted)
    monkeypatch.setattr(modeling.checkpoint.loading, "CHUNK_BYTES", chunk)
    for ranks in ranks_of(4):
        load_outline(folder, ranks=ranks)
        headers = sum(read)
        read.clear()
        model = load_model(folder, ranks=ranks)
        unread = sum(p.nbytes for name, p in model.named_parameters() if ranks.rank and name.endswith("o_proj.bias"))
        assert sum(read) - headers == sum(p.nbytes for p in model.parameters()) - unread
        read.clear()


@given(st.data())
def test_any_cut_is_read_in_pieces_of_any_size(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    x = torch.randn(shape)
    dim = data.draw(st.integers(0, 1 if len(shape) == 2 else 0))
    start = data.draw(st.integers(0, shape[dim]))
    cut = Cut(dim, slice(start, data.draw(st.integers(start, shape[dim]))))
    file = tmp_path_factory.mktemp("cut") / "model.safetensors"
    save_file({"before": torch.ones(3), "x": x}, file)
    (tensor,) = (one for one in read_header(file) if one.name == "x")
    want = x.narrow(dim, start, cut.part.stop - start)
    flat = torch.full((want.numel(),), torch.nan)
    chunk = data.draw(st.integers(1, 60))
    for place, piece in read_pieces(tensor, chunk, cut):
        assert 0 < piece.nbytes <= max(chunk, piece.itemsize)
        flat[place] = piece
    assert torch.equal(flat.view(want.shape), want)


def test_nan_is_named_by_the_rank_that_reads_it(tiny, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny("llama2").folder, folder)
    stored = load_file(folder / SINGLE)
    stored["model.layers.1.mlp.down_proj.weight"][0, -1] = torch.nan
    save_file(stored, folder / SINGLE)
    load_model(folder, check_weights=True, ranks=Ranks(0, 2))
    with pytest.raises(CheckpointError, match=r"NaN or Inf as float32 in 1 \(model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(folder, check_weights=True, ranks=Ranks(1, 2))


def test_a_tied_head_is_compared_with_the_ranks_own_rows(tiny, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(tiny("llama31").folder, folder)
    stored = load_file(folder / SINGLE)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["lm_head.weight"][-1] += 1
    save_file(stored, folder / SINGLE)
    load_model(folder, ranks=Ranks(0, 2))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_model(folder, ranks=Ranks(1, 2))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (3, "4 KV heads do not divide among 3 ranks; start 1 or 2 or 4 of them"),
        (8, "4 KV heads do not divide among 8 ranks; start 1 or 2 or 4 of them"),
    ],
)
def test_heads_that_do_not_divide_are_refused(tiny, size, said):
    with pytest.raises(ParallelError) as caught:
        load_outline(tiny("llama2").folder, ranks=Ranks(0, size))
    assert said in str(caught.value)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_are_not_divided(tiny, weights):
    with pytest.raises(
        ParallelError, match=rf"^parallel 'tensor': {weights} weights cannot be divided among ranks; load plain"
    ):
        load_outline(tiny("llama2").folder, weights=weights, ranks=Ranks(0, 2))
