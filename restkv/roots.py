"""Square roots of a model's output projections, made once.

Letters: H query heads, K KV heads, G = H / K, D head dim, F coordinates (restkv.observe.root_of).
"""

from __future__ import annotations

from torch import Tensor

from modeling.layers import Decoder
from restkv.observe import group_root_of, root_of


class Roots:
    """Square roots of every layer's W_O^h^T W_O^h, computed on first use and kept (float32; D*D numbers per query head)."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._made: dict[tuple[int, str], Tensor] = {}

    def get(self, layer: int, needs: frozenset[str]) -> Tensor | None:
        """[H, D, F] for policies that need "root", [K, G, D, F] for "group_root", else None."""
        kind = next((name for name in ("group_root", "root") if name in needs), None)
        if kind is None:
            return None
        if (layer, kind) not in self._made:
            w_o_EHD = self._model.blocks[layer].output_weight()
            root = root_of(w_o_EHD) if kind == "root" else group_root_of(w_o_EHD, self._model.config.num_kv_heads)
            self._made[layer, kind] = root
        return self._made[layer, kind]
