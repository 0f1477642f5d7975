"""A greedy loop over an export's three graphs, through the host halves of ``engines.families``; no torch.

Legend: S prompt rows, V visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.families import FAMILIES, Seen, expanded
from engines.sessions.session import Session, open_session
from graphs.spec import ExportSpec, past_names, present_names, visual_names


@dataclass
class Run:
    """What a prompt gave: tokens, the logits of each, and the prompt rows kept behind every prune point."""

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)


class OnnxModel:
    """An export folder."""

    def __init__(self, folder: Path, spec: ExportSpec) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.folder, self.spec, self.family = folder, spec, FAMILIES[spec.family]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
        self.image_processor = AutoImageProcessor.from_pretrained(folder / "processor", backend="pil")
        self._sessions: dict[str, Session] = {}

    def run(self, stage: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if stage not in self._sessions:
            self._sessions[stage] = open_session(self.folder / self.spec.stages[stage].file, threads=1)
        outputs = [t.name for t in self.spec.stages[stage].outputs]
        return self._sessions[stage].run(feeds, host=outputs)

    def seen(self, images: list[Image.Image]) -> Seen:
        processed = self.image_processor(images=[images], return_tensors="np", **self.family.options)
        return self.family.seen(processed, self.spec.grid)

    def prompt(self, messages: list[dict[str, Any]], seen: Seen | None) -> np.ndarray:
        """Token ids of a conversation, int64 [1,S]."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token = self.spec.tokens.image_text
        count = len(seen.tokens) if seen else 0
        texts = [self.family.text(seen, i, token, self.tokenizer) for i in range(count)]
        return np.array([self.tokenizer(expanded(text, token, texts))["input_ids"]])

    def embedded(self, ids: np.ndarray, seen: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        names = visual_names(self.spec.language)
        dtype = np.dtype(self.spec.dtype)
        visual = seen or {name: np.zeros((1, self.spec.language.width), dtype) for name in names}
        return self.run("embed", {"input_ids": ids, **visual})

    def generate(
        self,
        ids: np.ndarray,
        seen: Seen | None,
        new_tokens: int,
        keep: tuple[int, ...] | None = None,
        priority: np.ndarray | None = None,
        guide: int | None = None,
    ) -> Run:
        """Greedy tokens. keep: visual tokens behind each prune point, None for all."""
        spec, result = self.spec, Run()
        visual = self.run("vision", seen.feeds) if seen else None
        rows = self.embedded(ids, visual)
        is_visual = rows["is_visual"][0]
        text = int((~is_visual).sum())
        counts = keep or (int(is_visual.sum()),) * len(spec.plan.points)
        positions = self.family.positions(is_visual, seen, 0)
        past = {
            name: np.zeros((1, spec.language.kv_heads, 0, spec.language.head_dim), np.dtype(spec.dtype))
            for i in range(spec.language.layers)
            for name in past_names(i)
        }
        lengths = [text + n for n in counts]
        score = np.zeros((1, ids.shape[1]), np.float32) if priority is None else priority
        while True:
            feeds = {
                **rows,
                "position_ids": positions,
                "guide": np.zeros(guide or 1, np.int32),
                "tail": np.zeros(1, np.int32),
                "priority": score,
                **{f"keep_{i}": np.zeros(n, np.int32) for i, n in enumerate(lengths)},
                **past,
            }
            out = self.run("decoder", {t.name: feeds[t.name] for t in spec.stages["decoder"].inputs})
            if not result.tokens:
                result.kept = [out[f"kept_{i}"][0] for i in range(len(lengths))]
            result.logits.append(out["logits"][0, -1])
            result.tokens.append(int(out["logits"][0, -1].argmax()))
            if len(result.tokens) == new_tokens:
                return result
            past = {
                a: out[b]
                for i in range(spec.language.layers)
                for a, b in zip(past_names(i), present_names(i), strict=True)
            }
            rows = self.embedded(np.array([[result.tokens[-1]]]), None)
            positions = self.family.positions(np.zeros(1, bool), None, int(positions.max()) + 1)
            lengths, guide, score = [1] * len(lengths), 1, np.zeros((1, 1), np.float32)
