"""SGL written from its formulas (arXiv 2412.03324), in float64 torch, with plain attention maps and masks.

It shares nothing with the tool: no cache, no gather, no graph. Every sequence is one full forward pass
over prompt and answer; a pruned token is one whose column is masked from layer K on, which is what
dropping its row means for everybody else. Greedy decoding is checked by teacher forcing: if the most
likely token at every position is the answer's own, greedy decoding gives that answer.

Legend: B sequences, T rows (right-padded), S prompt rows, V visual tokens, H heads, D width, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Case = tuple[Image.Image, str]


@dataclass(frozen=True)
class Batch:
    """Prompts of one image and one question each."""

    embeds: list[torch.Tensor]  # each [S, D], the visual ones merged in
    visual: list[torch.Tensor]  # each bool [S]


@dataclass(frozen=True)
class Scored:
    """Of each sequence: the most likely token and log p of the answer's own, per position; guidance [V]."""

    best: list[list[int]]
    log_prob: list[np.ndarray]
    guidance: list[np.ndarray]
    logits: list[np.ndarray]  # each [N, vocabulary]

    def confidence(self) -> list[float]:
        """exp(1/N Σ log p)."""
        return [float(np.exp(p.sum() / len(p))) for p in self.log_prob]

    def product(self) -> list[float]:
        """Π p."""
        return [float(np.exp(p.sum())) for p in self.log_prob]


class Reference:
    """A LLaVA checkpoint: vision tower and processor by transformers, the language model by hand."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

        self.hf = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.wide = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
        self.images = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        self.text = self.wide.config.text_config
        self.template = (Path(checkpoint) / "chat_template.jinja").read_text("utf-8")

    def inputs(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Left-padded ids, mask and pixels, made with transformers' own placeholder rule."""
        from transformers.models.llava.processing_llava import LlavaProcessor

        processor = LlavaProcessor(
            self.images,
            self.tokenizer,
            patch_size=self.hf.config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            chat_template=self.template,
            num_additional_image_tokens=1,
        )
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": q}]}]
            for i, q in cases
        ]
        return dict(
            processor.apply_chat_template(
                talks,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        )

    @torch.no_grad()
    def generate(self, cases: Sequence[Case], max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens of transformers' generate, the end token included."""
        feed = self.inputs(cases)
        eos = self.eos
        out = self.hf.generate(
            **feed, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id or 0
        )
        answers = []
        for row in out[:, feed["input_ids"].shape[1] :].tolist():
            end = next((i for i, t in enumerate(row) if t in eos), len(row) - 1)
            answers.append(row[: end + 1])
        return answers

    @property
    def eos(self) -> set[int]:
        """Ids that end an answer."""
        ids = self.hf.generation_config.eos_token_id
        return {ids} if isinstance(ids, int) else set(ids or ())

    @torch.no_grad()
    def batch(self, cases: Sequence[Case]) -> Batch:
        """Merge image and text embeddings of each case."""
        feed = self.inputs(cases)
        seen = self.wide.model.get_image_features(pixel_values=feed["pixel_values"].double())
        seen = seen.pooler_output if hasattr(seen, "pooler_output") else seen
        embeds, visual = [], []
        for padded, mask, image in zip(feed["input_ids"], feed["attention_mask"], seen, strict=True):
            ids = padded[mask.bool()]
            row = self.wide.get_input_embeddings()(ids).clone()
            is_visual = ids == self.wide.config.image_token_id
            row[is_visual] = image.reshape(-1, row.shape[1])
            embeds.append(row)
            visual.append(is_visual)
        return Batch(embeds, visual)

    @torch.no_grad()
    def scored(
        self,
        batch: Batch,
        answers: Sequence[Sequence[int]],
        kept: Sequence[np.ndarray] | None = None,
        before_layer: int = 0,
        rows: str = "text",
    ) -> Scored:
        """One pass over prompt and answer; ``kept`` visual tokens of each are seen from ``before_layer`` on.

        rows: "text" counts the prompt's text rows behind the image and every fed-back token as guides.
        """
        look = self.wide.get_input_embeddings()
        sequences = [
            torch.cat([e, look(torch.tensor(a[:-1]).long())]) for e, a in zip(batch.embeds, answers, strict=True)
        ]
        b, t = len(sequences), max(map(len, sequences))
        x_BTD = torch.zeros(b, t, sequences[0].shape[1], dtype=torch.float64)
        guides_BT, dropped_BT = torch.zeros(b, t, dtype=torch.float64), torch.zeros(b, t, dtype=torch.bool)
        for i, (sequence, visual) in enumerate(zip(sequences, batch.visual, strict=True)):
            x_BTD[i, : len(sequence)] = sequence
            at = visual.nonzero()[:, 0]
            guides_BT[i, int(at[-1]) + (rows == "text") : len(sequence)] = 1
            if kept is not None:
                stays = torch.zeros(len(at), dtype=torch.bool)
                stays[torch.as_tensor(np.asarray(kept[i]))] = True
                dropped_BT[i, at[~stays]] = True
        logits_BTV, received_BT = self._forward(x_BTD, guides_BT, dropped_BT, before_layer)
        best, log_prob, guidance, logits = [], [], [], []
        for i, answer in enumerate(answers):
            s = len(batch.embeds[i])
            mine = logits_BTV[i, s - 1 : s - 1 + len(answer)]
            best.append(mine.argmax(-1).tolist())
            log_prob.append(mine.log_softmax(-1)[range(len(answer)), list(answer)].numpy())
            guidance.append(received_BT[i, :s][batch.visual[i]].numpy())
            logits.append(mine.numpy())
        return Scored(best, log_prob, guidance, logits)

    def greedy(
        self, case: Case, max_new_tokens: int, kept: np.ndarray | None = None, before_layer: int = 0
    ) -> list[int]:
        """Greedy decoding the slow way: the whole sequence again for every token."""
        batch = self.batch([case])
        answer: list[int] = []
        while len(answer) < max_new_tokens and not (answer and answer[-1] in self.eos):
            # The last token of an answer is never fed, so a placeholder asks for the next one.
            scored = self.scored(batch, [[*answer, 0]], None if kept is None else [kept], before_layer)
            answer.append(scored.best[0][-1])
        return answer

    def _forward(
        self, x_BTD: torch.Tensor, guides_BT: torch.Tensor, dropped_BT: torch.Tensor, before_layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        llama, c = self.wide.model.language_model, self.text
        b, t, _ = x_BTD.shape
        d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        h, v = c.num_attention_heads, c.num_key_value_heads
        angle = torch.arange(t).double()[:, None] * c.rope_parameters["rope_theta"] ** (
            -torch.arange(0, d, 2).double() / d
        )
        cos, sin = angle.cos(), angle.sin()
        causal_TT = torch.ones(t, t, dtype=torch.bool).tril()
        received_BT = torch.zeros(b, t, dtype=torch.float64)
        for i, layer in enumerate(llama.layers):
            a = layer.self_attn
            y = _normed(x_BTD, layer.input_layernorm.weight, c.rms_norm_eps)
            q, k, u = (p(y).view(b, t, -1, d).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
            k, u = k.repeat_interleave(h // v, 1), u.repeat_interleave(h // v, 1)
            seen_B1TT = (causal_TT & ~(dropped_BT[:, None] & (i >= before_layer)) | torch.eye(t, dtype=torch.bool))[
                :, None
            ]
            map_BHTT = (q @ k.transpose(2, 3) / d**0.5).masked_fill(~seen_B1TT, -torch.inf).softmax(-1)
            received_BT += torch.einsum("bhst,bs->bt", map_BHTT, guides_BT)
            x_BTD = x_BTD + a.o_proj((map_BHTT @ u).transpose(1, 2).reshape(b, t, -1))
            y, m = _normed(x_BTD, layer.post_attention_layernorm.weight, c.rms_norm_eps), layer.mlp
            x_BTD = x_BTD + m.down_proj(torch.nn.functional.silu(m.gate_proj(y)) * m.up_proj(y))
        return self.wide.lm_head(_normed(x_BTD, llama.norm.weight, c.rms_norm_eps)), received_BT


def best_visual(guidance: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` tokens of highest guidance, ascending, by plain sorting; of equals the first."""
    ranked = sorted(range(len(guidance)), key=lambda v: (-guidance[v], v))
    return np.array(sorted(ranked[:count]))


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
