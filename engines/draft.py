"""The small model's answer as a draft: the large one checks it inside its own prefill and goes on where it differs.

Source: the check of speculative decoding (Leviathan et al., arXiv 2211.17192) with the whole answer as one draft. Every
token is still chosen by the large model's own sampler from its own logits, in order, so the tokens are those of a run
without a draft: greedy, with a repetition penalty, and drawn from a seed alike. Draft rows are text, which no prune
point drops or counts, so the same visual tokens are kept. Where rows of the chunk guide, the draft's would too, so such
plans take none. A chunk of several rows is rounded otherwise than one row, so that a near-tie may fall otherwise; in
fp32 none did (``benchmarks/draft.py``).
Legend: S rows of the prompt's chunk, M tokens of the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from engines.decoder import Chunk, following
from graphs.files import sha256_of

if TYPE_CHECKING:
    from engines.model import Model


@dataclass(frozen=True)
class Drafted:
    """What a draft was good for. tokens: how many were proposed. accepted: how many of them the answer begins with.

    steps_saved: decode steps that a run without the draft takes beyond those that were made.
    """

    tokens: int
    accepted: int
    steps_saved: int


def drafted_by(draft: Sequence[int], answer: Sequence[int]) -> Drafted:
    """Say what a draft was good for; answer: the tokens that the prefill gave."""
    accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, answer, strict=False)))
    return Drafted(len(draft), accepted, len(answer) - 1)


def usable(model: Model, tokens: Sequence[int], rows: int, limit: int) -> tuple[int, ...]:
    """Return what of another model's answer can be a draft: up to its end token, and no more than can be used.

    rows: S. limit: the longest answer. An id that only the other model's padded vocabulary has ends it, and an engine
    takes no more rows, with logits or without, than it was built for.
    """
    spec, session = model.spec, model.session("decoder")
    most = limit - 1
    tail, embeds = session.largest("tail"), session.largest("inputs_embeds")
    if tail and embeds:
        most = min(most, tail[0] - 1, embeds[1] - rows)
    known = takewhile(lambda token: token not in spec.tokens.eos and token < spec.language.vocab, tokens)
    return tuple(known)[: max(0, most)]


def with_draft(model: Model, chunk: Chunk, draft: Sequence[int]) -> Chunk:
    """Return the chunk with the draft's rows [S + M] behind it, as text that follows."""
    if not draft:
        return chunk
    assert chunk.positions is not None
    behind = len(draft)
    embeds = [model.to_host(chunk.inputs_embeds), model.to_host(model.embed_text(draft))]
    return replace(
        chunk,
        inputs_embeds=np.concatenate(embeds, axis=1),
        is_visual=np.pad(chunk.is_visual, (0, behind)),
        positions=np.concatenate([chunk.positions, following(chunk.positions, behind)], axis=-1),
        deepstack={
            name: np.pad(model.to_host(value), ((0, 0), (0, behind), (0, 0))) for name, value in chunk.deepstack.items()
        },
    )


def padded(priority_S: np.ndarray | None, draft: Sequence[int]) -> np.ndarray | None:
    """Return the rows' priority with the draft's behind it; that of text is never read."""
    return None if priority_S is None else np.pad(priority_S, (0, len(draft)))


def takes_draft(large: Model) -> bool:
    """Whether a model's plan prunes by guidance from outside and by nothing that the draft's rows would change."""
    return large.spec.plan.needs_guidance and not large.spec.plan.uses_guide


def tokens_that_differ(small: Model, large: Model) -> str:
    """Return what gives two models' tokens unequal ids, a plural noun; nothing where an id means the same in both."""
    from engines.bundles.pair import Source, tokenizer_parts

    files = [model.processor.folder / "tokenizer.json" for model in (small, large)]
    readable = small.spec.tokens == large.spec.tokens and all(file.is_file() for file in files)
    if readable and len({sha256_of(file) for file in files}) == 1:
        return ""
    parts_small, parts_large = (tokenizer_parts(Source(model.folder, model.spec)) for model in (small, large))
    ids = {
        "the vocabulary": "vocabularies",
        "the added tokens": "added tokens",
        "the image token": "image tokens",
        "the end tokens": "end tokens",
    }
    return next((said for part, said in ids.items() if parts_small[part] != parts_large[part]), "")
