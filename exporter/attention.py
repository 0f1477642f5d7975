"""The decoder's attention: one canonical op with a past, and the function that transformers' layers call.

Legend: B batch, H query heads, V key-value heads, S rows, P past rows, T = P + S keys, D head width.

``torch.onnx.ops.attention`` is not used: its eager meaning aligns causality upper-left even with a
past (torch 2.13), where ONNX Attention-23 with ``past_key`` aligns it bottom-right.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from graphs.ops import OPS

NAME = "saccade"


@torch.library.custom_op("saccade::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention on top of a cache: q [B,H,S,D], k and v [B,V,S,D], past [B,V,P,D].

    Returns the output [B,H,S,D] and the grown cache [B,V,T,D] twice. Row s sees keys t ≤ P + s.
    Source: ONNX Attention-23, is_causal with past_key.
    """
    present_k, present_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    rows, keys = q.shape[2], present_k.shape[2]
    visible_ST = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, present_k, present_v, attn_mask=visible_ST, scale=scale, enable_gqa=grouped)
    return out, present_k, present_v


@attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, groups, p, d = past_k.shape
    present_shape = (b, groups, p + k.shape[2], d)
    return torch.empty_like(q), k.new_empty(present_shape), v.new_empty(present_shape)


@dataclass
class LayerRun:
    """What one decoder layer is given and gives back besides its hidden states.

    guide: the carrier [G] where this layer's received attention is wanted, or the guide rows' weights [1, G],
    else None. preview: only that is wanted, so the attention itself is left out.
    """

    past_k: torch.Tensor
    past_v: torch.Tensor
    guide: torch.Tensor | None = None
    preview: bool = False
    present_k: torch.Tensor | None = None
    present_v: torch.Tensor | None = None
    received: torch.Tensor | None = None


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    saccade_run: LayerRun,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention that transformers' layers call; what it learns goes into ``saccade_run``."""
    run = saccade_run
    if run.preview:
        out, run.present_k = query, torch.cat([run.past_k, key], 2)
    else:
        out, run.present_k, run.present_v = attention(query, key, value, run.past_k, run.past_v, scaling)
    if run.guide is not None:
        op = "AttentionReceived" if run.guide.dim() == 1 else "RatedAttentionReceived"
        run.received = OPS[op].torch_op(query, run.present_k, run.guide, scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the function known to transformers under ``NAME``, and return that name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_function)
    return NAME


BLOCKS = "saccade_flash_blocks"  # transformers hands packed rows to attentions whose name contains "flash"


@dataclass(frozen=True)
class Blocks:
    """Which packed rows attend to each other: ``graphs.layouts.patches``.

    rows: int64 [B,K], the row at each place of each block, −1 for none. place: int64 [P], where each row went.
    seen: takes q [1,H,P,d], k and the scale of each attention that uses these blocks, where a policy looks at them.
    """

    rows: torch.Tensor
    place: torch.Tensor
    seen: list[tuple[torch.Tensor, torch.Tensor, float]] | None = None


def block_attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    saccade_blocks: Blocks,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention inside each block of a packed vision tower: q, k, v [1,H,P,D] → [1,P,H,D]."""
    if saccade_blocks.seen is not None:
        saccade_blocks.seen.append((query, key, scaling))
    blocks, places = saccade_blocks.rows.shape
    row = saccade_blocks.rows.clamp(min=0).flatten()

    def spread(x_1HPD: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = x_1HPD.shape
        return x_1HPD[0].transpose(0, 1).index_select(0, row).view(blocks, places, heads, width).transpose(1, 2)

    is_real = saccade_blocks.rows >= 0
    out = OPS["BlockAttention"].torch_op(spread(query), spread(key), spread(value), is_real, scaling)
    gathered = out.transpose(1, 2).flatten(0, 1).index_select(0, saccade_blocks.place)
    return gathered[None], None


def register_blocks() -> str:
    """Make the packed vision attention known to transformers, and return its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(BLOCKS, block_attention_function)
    return BLOCKS
