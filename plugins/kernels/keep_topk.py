"""KeepTopK exactly: the K-th highest rank bit by bit, then the rows above it and the first of those that equal it.

Legend: B batch, S rows, K kept rows.

    rank[s] = +∞ for text; for visual rows the score, NaN as −∞, +∞ as the largest finite number
    kept    = the K rows of highest rank, ties to the lower index, ascending

Source: graphs/ops/keep_topk.py, bit for bit the same rows. A radix select over the 32 bits of the rank (Alabi et al.,
Fast k-selection algorithms for graphics processing units, ACM JEA 17, 2012) instead of a sort: 32 counts over
registers, and no limit of 3,840 as TensorRT's own TopK has.

Numeric choices.
- Ranks are compared as integers: a float's bits, those of negative numbers flipped, order as the floats do, and no
  comparison can flush a subnormal to zero. −0 becomes +0 first, for the two are one score.
- NaN ties with −∞, +∞ with the largest finite number, as the op has it; text takes the highest integer, which is the
  bits of a NaN and so no score's.
- Counts are integers, so no order of summation shows: the same rows every time.
- K = S keeps all rows, K text rows or fewer keep the first text rows. 1 ≤ K ≤ S ≤ BLOCK_S is the caller's to hold.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(0x7F7FFFFF)  # bits of the largest finite fp32
TEXT = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-0x7F800001)  # rank of −∞
NOTHING = tl.constexpr(-0x80000000)  # below every rank


@triton.jit
def keep_topk(score, is_visual, keep, S, K, kept, BLOCK_S: tl.constexpr):
    """Grid (B): kept, int64 [B,K]. score fp32 [B,S], is_visual one byte [B,S]; ``keep`` is not read."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    real = s < S
    bits = tl.load(score + b * S + s, mask=real, other=0.0).to(tl.int32, bitcast=True)
    visual = tl.load(is_visual + b * S + s, mask=real, other=0).to(tl.int32) != 0
    size = bits & 0x7FFFFFFF
    rank = tl.where(bits < 0, -size - 1, size)
    rank = tl.where(size == 0, 0, rank)
    rank = tl.where(size > 0x7F800000, LOWEST, tl.minimum(rank, LARGEST))
    rank = tl.where(visual, rank, TEXT)
    rank = tl.where(real, rank, NOTHING)
    # The K-th highest rank, built from its sign downwards: a bit is set where K rows still reach so high.
    reaching = tl.sum((rank >= 0).to(tl.int32), 0)
    limit = tl.where(reaching >= K, 0, NOTHING)
    for i in range(31):
        higher = limit | (1 << (30 - i))
        reaching = tl.sum((rank >= higher).to(tl.int32), 0)
        limit = tl.where(reaching >= K, higher, limit)
    above, equal = rank > limit, rank == limit
    wanted = K - tl.sum(above.to(tl.int32), 0)
    first_equal = equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted)
    stays = (above | first_equal) & real
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(kept + b * K + place, s.to(tl.int64), mask=stays)
