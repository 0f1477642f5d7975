"""How many tokens a merging policy leaves: ToMe's layers, SparseVLM's recycling."""

from __future__ import annotations

from itertools import pairwise

from graphs.errors import UsageError


def merge_schedule(tokens: int, keep: int, layers: int) -> list[int]:
    """Tokens of an image left behind each tower layer, as evenly as whole numbers go; ends at ``keep`` (ToMe).

    Rounded up, and no number below zero is divided, on which torch and ONNX disagree.
    """
    return [(tokens * (layers - i - 1) + keep * (i + 1) + layers - 1) // layers for i in range(layers)]


def checked_merging(tokens: int, keep: int, layers: int) -> None:
    """UsageError where a layer would have to merge more than half of its tokens."""
    if not _can_merge(tokens, keep, layers):
        fewest = next(k for k in range(keep, tokens + 1) if _can_merge(tokens, k, layers))
        raise UsageError(
            f"merging {tokens} tokens down to {keep} in {layers} layers would take more than half of a layer's tokens; "
            f"keep at least {fewest}"
        )


def recycling(before: int, kept: int, merge: float, recycle: float) -> tuple[int, int]:
    """How many of ``kept`` tokens are clusters, and how many dropped ones they are made of (SparseVLM).

    before: visual tokens that reach the point. merge: clusters as a share of the kept. recycle: share of the dropped,
    and one more, as the authors' code has it. Without any visual token both are 1, which is the identity.
    """
    if not before:
        return 1, 1
    merged = min(max(1, round(kept * merge)), kept)
    dropped = before - (kept - merged)
    return merged, min(max(merged, int(dropped * recycle + 1e-9) + 1), dropped)


def _can_merge(tokens: int, keep: int, layers: int) -> bool:
    lefts = [tokens, *merge_schedule(tokens, keep, layers)]
    return all(a - b <= a // 2 for a, b in pairwise(lefts))
