"""Golden tensors: what eager PyTorch gives for small inputs of every stage, to be replayed without torch.

The chain is a real one: pixels → visual tokens → merged embeddings → prefill → a chunk of text on
its cache → one decode step. Legend: S rows of a chunk, V visual rows, P_j past rows of segment j.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import linear

from exporter.family import SEED, Tensors
from exporter.feeds import Lengths, decoder_feed, empty_past, positions_of
from exporter.program import DecoderProgram, EmbedProgram, VisionProgram
from graphs.errors import OperationFailed
from graphs.spec import LanguageModel, Tokens, past_names, present_names

TEXT_BEFORE, VISUAL, TEXT_AFTER, FOLLOW_UP = 4, 16, 4, 3
Cases = dict[str, tuple[Tensors, Tensors]]


def vision_cases(program: VisionProgram) -> Cases:
    """One image, and two of different shapes where the family knows any."""
    feeds = {name: program.example(images) for name, images in (("one", 1), ("two", 2))}
    return {name: (feed, program(feed)) for name, feed in feeds.items()}


def embed_cases(program: EmbedProgram, seen: Tensors, tokens: Tokens, vocab: int) -> Cases:
    """Text, visual placeholders, text."""
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocab - 1, (TEXT_BEFORE + VISUAL + TEXT_AFTER,), generator=draw)
    ids += ids >= tokens.image
    visual = min(VISUAL, seen["visual_embeds"].shape[0])
    row = torch.cat([ids[:TEXT_BEFORE], torch.full((visual,), tokens.image), ids[-TEXT_AFTER:]])
    feed = {"input_ids": row[None], **{name: value[:visual] for name, value in seen.items() if name != "kept_vision"}}
    return {"one": (feed, program(feed))}


MANY_ROWS = 64


@contextmanager
def wide_products(model: nn.Module) -> Iterator[None]:
    """Inside the block a float16 Linear of many rows multiplies in float32 and rounds its result once.

    As runtimes on a CPU do. PyTorch's own float16 product on a CPU without float16 arithmetic takes about five times
    as long (577 rows, 1024 → 4096, one thread: 223 ms against 48 ms), and a vision tower has many rows.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1].numel() < MANY_ROWS:
            return linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return linear(x.float(), self.weight.float(), bias).to(x.dtype)

    changed = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float16]
    for module in changed:
        module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def decoder_cases(program: DecoderProgram, embedded: Tensors, language: LanguageModel) -> Cases:
    """Prefill with an empty cache, a follow-up chunk of text, one decode step."""
    embeds, is_visual = embedded["inputs_embeds"], embedded["is_visual"]
    visual = int(is_visual.sum())
    text = embeds.shape[1] - visual
    points = program.plan.points
    keep = tuple(text + max(1, visual >> (i + 1)) for i in range(len(points)))
    guide = program.plan.guide_rows(TEXT_AFTER) if program.plan.uses_guide else 1
    past = empty_past(program, language, embeds.dtype, [0] * len(program.segments))
    positions = positions_of(language, 0, embeds.shape[1], is_visual)
    first = decoder_feed(program, embedded, past, positions, Lengths(guide, keep, tail=2))
    cases = {"prefill": (first, program(first))}
    before, start = "prefill", int(positions.max()) + 1
    for name, rows in (("chunk", FOLLOW_UP), ("decode", 1)):
        out = cases[before][1]
        past = {p: out[q] for i in range(language.layers) for p, q in zip(past_names(i), present_names(i), strict=True)}
        fed = {key: value[:, :rows] for key, value in embedded.items()}
        fed["is_visual"] = torch.zeros(1, rows, dtype=torch.bool)
        positions = positions_of(language, start, rows)
        feed = decoder_feed(program, fed, past, positions, Lengths(rows, (rows,) * len(points), tail=rows))
        cases[name] = (feed, program(feed))
        before, start = name, start + rows
    return cases


def save_golden(path: Path, stages: dict[str, Cases]) -> None:
    """Write ``{stage}/{case}/{in|out}/{tensor}``; OperationFailed where the checkpoint itself gives NaN."""
    tensors = {}
    for stage, cases in stages.items():
        for case, (feed, out) in cases.items():
            for side, named in (("in", feed), ("out", out)):
                for name, tensor in named.items():
                    if not bool(torch.isfinite(tensor).all()):
                        raise OperationFailed(
                            f"the checkpoint gives non-finite numbers ({stage}, {case}, {name}) in eager PyTorch; "
                            "repair it, or export with --dtype float32 if it overflows"
                        )
                    tensors[f"{stage}/{case}/{side}/{name}"] = tensor.contiguous().clone()
    save_file(tensors, path, metadata={"schema": "saccade.golden/1"})
    path.chmod(0o644)
