"""CompactRows: a gather of whole rows, as words.

Legend: B batch, S rows, K kept rows, C words of a row.

    compact[b, i, c] = x[b, kept[b, i], c]

Source: graphs/ops/compact_rows.py. It moves bits, so words are integers and every type comes out as it went in. A
program takes BLOCK words of the flat output: neighbours read neighbours, whether a row is one flag or 8,192 numbers.

It is not fused with KeepTopK: the selection is one program per sequence, the gather wants the whole device, and one
kernel of both would make every program select again or wait for one; each selection also serves several gathers.
0 ≤ kept < S is the caller's to hold, and KeepTopK does. Other rows are held to the nearest one, so that whatever a
builder times the kernel with, nothing beside ``x`` is read.
"""

import triton
import triton.language as tl


@triton.jit
def compact_rows(x, kept, S, K, C, compact, BLOCK: tl.constexpr):
    """Grid (⌈K·C/BLOCK⌉, B): compact [B,K,C] of x [B,S,C], kept int64 [B,K]."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < K * C
    row = tl.load(kept + b * K + at // C, mask=real, other=0)
    row = tl.minimum(tl.maximum(row, 0), S - 1)
    word = tl.load(x + (b * S + row) * C + at % C, mask=real)
    tl.store(compact + b * K * C + at, word, mask=real)
