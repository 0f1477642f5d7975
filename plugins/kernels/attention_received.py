"""AttentionReceived in two passes over the keys; no S×T map, no atomics, one order of summation.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, R = (H/V)·G the rows
that share a key-value head, in the order (head, guide row).

    x[r, t]     = scale · q_r · k_t                       for t ≤ T−G+g, else −∞
    peak[r]     = max_t x[r, t],  total[r] = Σ_t exp(x[r, t] − peak[r])          attention_row_sums
    received[t] = Σ_r weight_r · exp(x[r, t] − peak[r]) / total[r]               attention_shares

The same over the first F = length + S of T keys, those of a cache's buffer that are filled: F stands for T above, the
others receive nothing and are never read.                                       cached_row_sums, cached_shares

Source: graphs/ops/attention_received.py (SGL, arXiv 2412.03324 §3.2); the running maximum and sum of the first pass
are the online softmax (Milakov and Gimelshein, arXiv 1805.02867); that maps can be computed again from row statistics
is FlashAttention's backward (Dao et al., arXiv 2205.14135).

Numeric choices.
- Products are summed in fp32 whatever comes in, fp32 products without TF32: near ties decide which rows stay.
- The scale is applied to the fp32 product, not to q, which in fp16 would round once more.
- Powers are of two, with log2(e) in the scale: one multiplication less, and peaks are subtracted before, never after.
- Peak and sum are kept apart, not as one log-sum-exp: with logits in the tens of thousands that sum would carry an
  error of 1e-3, the difference carries none.
- The second pass gives every key to one program, which walks heads and rows in order: the same bits every time.
- NaN in a row's logits, an infinite one, or none but −∞: the row's shares are NaN for every key, hidden ones too, as
  a plain softmax has it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(r, first_head, S, F, G):
    """Where guide rows ``r`` of a key-value head are: offset of their q row, offset of their sums, last visible key."""
    head, guide = first_head + r // G, r % G
    return head.to(tl.int64) * S + (S - G + guide), head.to(tl.int64) * G + guide, F - G + guide


@triton.jit
def _row_sums(
    q, k, scale_bits, F, S, T, G, H, V, D, peak, total,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Peak and total, fp32 [B,H,G], of a block of rows, over the first F of T keys."""
    v, b = tl.program_id(1), tl.program_id(2)
    share = H // V
    r, d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    real_R, inside_D = r < share * G, d < D
    q_row, sum_row, last_R = _rows(r, b * H + v * share, S, F, G)
    q_RD = tl.load(q + q_row[:, None] * D + d[None, :], mask=real_R[:, None] & inside_D[None, :], other=0.0)
    scale = scale_bits.to(tl.float32, bitcast=True) * LOG2_E
    first_key = (b * V + v).to(tl.int64) * T
    peak_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    for t0 in range(0, F, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        k_DT = tl.load(
            k + (first_key + t)[None, :] * D + d[:, None], mask=(t < F)[None, :] & inside_D[:, None], other=0.0
        )
        x_RT = tl.dot(q_RD, k_DT, input_precision="ieee") * scale
        x_RT = tl.where(t[None, :] <= last_R[:, None], x_RT, float("-inf"))
        higher_R = tl.maximum(peak_R, tl.max(x_RT, 1))
        # A row of −∞ so far has no peak to subtract: −∞ − −∞ would be NaN before a finite logit is seen.
        base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        total_R = total_R * tl.exp2(peak_R - base_R) + tl.sum(tl.exp2(x_RT - base_R[:, None]), 1)
        peak_R = higher_R
    tl.store(peak + sum_row, peak_R, mask=real_R)
    tl.store(total + sum_row, total_R, mask=real_R)


@triton.jit
def _shares(
    q, k, weight, peak, total, scale_bits, F, S, T, G, H, V, D, received,
    WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """received, fp32 [B,T], of a block of keys, the first F of which are read; weight fp32 [B,G] where WEIGHTED."""
    b = tl.program_id(1)
    share = H // V
    t, d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    real_T, inside_D = t < F, d < D
    scale = scale_bits.to(tl.float32, bitcast=True) * LOG2_E
    received_T = tl.zeros((BLOCK_T,), tl.float32)
    for v in range(V):
        key = (b * V + v).to(tl.int64) * T + t
        k_DT = tl.load(k + key[None, :] * D + d[:, None], mask=real_T[None, :] & inside_D[:, None], other=0.0)
        for r0 in range(0, share * G, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            real_R = r < share * G
            q_row, sum_row, last_R = _rows(r, b * H + v * share, S, F, G)
            q_RD = tl.load(q + q_row[:, None] * D + d[None, :], mask=real_R[:, None] & inside_D[None, :], other=0.0)
            x_RT = tl.dot(q_RD, k_DT, input_precision="ieee") * scale
            x_RT = tl.where(t[None, :] <= last_R[:, None], x_RT, float("-inf"))
            peak_R = tl.load(peak + sum_row, mask=real_R, other=0.0)
            total_R = tl.load(total + sum_row, mask=real_R, other=1.0)
            share_RT = tl.exp2(x_RT - peak_R[:, None]) / total_R[:, None]
            if WEIGHTED:
                share_RT *= tl.load(weight + b * G + r % G, mask=real_R, other=0.0)[:, None]
            received_T += tl.sum(tl.where(real_R[:, None], share_RT, 0.0), 0)
    tl.store(received + b.to(tl.int64) * T + t, received_T, mask=t < T)


@triton.jit
def attention_row_sums(
    q, k, weight, scale_bits, S, T, G, H, V, D, peak, total,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (⌈R/BLOCK_R⌉, V, B): peak and total, fp32 [B,H,G], of a block of rows. ``weight`` is not read."""
    _row_sums(q, k, scale_bits, T, S, T, G, H, V, D, peak, total, BLOCK_R, BLOCK_T, BLOCK_D)


@triton.jit
def attention_shares(
    q, k, weight, peak, total, scale_bits, S, T, G, H, V, D, received,
    WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T/BLOCK_T⌉, B): received, fp32 [B,T], of a block of keys; weight fp32 [B,G] is read where WEIGHTED."""
    _shares(q, k, weight, peak, total, scale_bits, T, S, T, G, H, V, D, received, WEIGHTED, BLOCK_R, BLOCK_T, BLOCK_D)


@triton.jit
def _filled(length, S, T):
    """Keys that are there with this chunk's; no more than T, whatever a builder times the kernel with."""
    return tl.minimum(tl.maximum(tl.load(length), 0), T - S).to(tl.int32) + S


@triton.jit
def cached_row_sums(
    q, k, weight, length, scale_bits, S, T, G, H, V, D, peak, total,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``attention_row_sums`` over the filled keys; length int64 [1] on the device, so a captured launch follows it."""
    filled = _filled(length, S, T)
    _row_sums(q, k, scale_bits, filled, S, T, G, H, V, D, peak, total, BLOCK_R, BLOCK_T, BLOCK_D)


@triton.jit
def cached_shares(
    q, k, weight, length, peak, total, scale_bits, S, T, G, H, V, D, received,
    WEIGHTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``attention_shares`` over the filled keys; zero for the others."""
    filled = _filled(length, S, T)
    _shares(
        q, k, weight, peak, total, scale_bits, filled, S, T, G, H, V, D, received, WEIGHTED, BLOCK_R, BLOCK_T, BLOCK_D
    )
