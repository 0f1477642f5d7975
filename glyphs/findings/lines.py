"""Questions as token lines: one prefix with the image in it, then each question's own tail.

Legend: N questions, P prefix rows (system words and the V visual tokens), T tail rows (padded), V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glyphs.checkpoint import PREFIX, SUFFIX, VISUAL_TOKENS, new_tokenizer
from glyphs.data import Question

PAD = 0


@dataclass(frozen=True)
class Lines:
    """N questions, each with an answer behind it.

    prefix: int64 [P]; first: the row of the first visual token; tails: question, cue and answer without its end
    token; said: the answer with its end token.
    """

    prefix: torch.Tensor
    first: int
    tails: list[list[int]]
    said: list[list[int]]

    def __len__(self) -> int:
        return len(self.tails)

    def prompt_rows(self, i: int) -> int:
        """Rows of tail i in front of the answer."""
        return len(self.tails[i]) - len(self.said[i]) + 1

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Indices of at most ``size`` questions at a time, those of like length together."""
        order = np.argsort([len(tail) for tail in self.tails], kind="stable")
        for at in range(0, len(order), size):
            yield order[at : at + size]

    def tail_ids(self, part: np.ndarray) -> torch.Tensor:
        """int64 [B,T], padded on the right, where no row that counts can see it."""
        width = max(len(self.tails[i]) for i in part)
        return torch.tensor([self.tails[i] + [PAD] * (width - len(self.tails[i])) for i in part])

    def groups(self, part: np.ndarray) -> torch.Tensor:
        """float32 [B,3,T]: which tail rows are the last of the prompt, the prompt's, generated ones fed back."""
        width = max(len(self.tails[i]) for i in part)
        rows_BGT = torch.zeros(len(part), 3, width)
        for b, i in enumerate(part):
            end = self.prompt_rows(i)
            rows_BGT[b, 0, end - 1] = 1
            rows_BGT[b, 1, :end] = 1
            rows_BGT[b, 2, end : len(self.tails[i])] = 1
        return rows_BGT


def lines_of(questions: Sequence[Question], said: Sequence[Sequence[int]] | None = None) -> Lines:
    """The questions with their right answers behind them, or with what was ``said``, end tokens included."""
    tokenizer = new_tokenizer()
    ids = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    prefix = tokenizer(PREFIX.replace("<image>", "<image>" * VISUAL_TOKENS)).input_ids
    if said is None:
        said = [[*ids(q.answer), tokenizer.eos_token_id] for q in questions]
    answers = [list(answer) for answer in said]
    tails = [ids(q.question + SUFFIX) + answer[:-1] for q, answer in zip(questions, answers, strict=True)]
    first = prefix.index(tokenizer.convert_tokens_to_ids("<image>"))
    return Lines(torch.tensor(prefix), first, tails, answers)
