"""The work folder: what each model saw and said, and which questions a setting answers right, each computed once.

Killing a run costs the setting under way: the journal is a line per setting, the maps a file per model, both named
by the digests of the weights that they are of.
Legend: N questions, L layers, G groups of guide rows (see `lines`), V visual tokens, n tokens of an answer, W words.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from glyphs.data import Question, held_out_questions
from glyphs.findings.lines import Lines, lines_of
from glyphs.findings.models import BATCH, WATCH, Seer, best_visual, gathered, kept_rows
from graphs.console import say, track
from graphs.plan import kept_count

SEED = 0  # of the questions: those of the pair's card; no model stopped by them and no threshold was chosen on them
NEW_TOKENS = 9
CONSISTENCY_KEEPS = (0.05, 0.2, 0.35)  # the first is SGL's


@dataclass(frozen=True)
class Heard:
    """A model's own answers and what it looked at.

    right: bool [N]; length: tokens of each answer, its end included; received: fp32 [N,L,G,V], summed over heads
    and rows; log_prob, entropy: [N,9], NaN behind an answer's end, of each token and of its distribution in nats;
    consistency: [N,3], log p of the answer with 5, 20 and 35 % of the visual tokens.
    """

    right: np.ndarray
    length: np.ndarray
    received: np.ndarray
    log_prob: np.ndarray
    entropy: np.ndarray
    consistency: np.ndarray
    tokens: np.ndarray

    def scores(self, layers: tuple[int, ...], rows: str) -> np.ndarray:
        """Guidance [N,V]: the sum over these layers of the rows "last", "prompt", "generated" or "both"."""
        groups = {"last": [0], "prompt": [1], "generated": [2], "both": [1, 2]}[rows]
        return self.received[:, list(layers)][:, :, groups].sum((1, 2))


class Work:
    """Questions, models by name (`large`, `small`, other small ones) and everything computed so far."""

    def __init__(self, folder: Path, checkpoints: dict[str, Path], n: int) -> None:
        self.folder, self.checkpoints, self.n = folder, checkpoints, n
        folder.mkdir(parents=True, exist_ok=True)
        self.digests = {name: digest_of(path / "model.safetensors") for name, path in checkpoints.items()}
        self.journal = folder / "journal.jsonl"
        lines = self.journal.read_text("utf-8").splitlines() if self.journal.exists() else []
        self.known = {entry["key"]: entry["right"] for entry in map(read_line, lines) if entry}
        if lines and not read_line(lines[-1]):
            with self.journal.open("a", encoding="utf-8") as journal:
                journal.write("\n")
        self._seers: dict[str, Seer] = {}
        self._heard: dict[str, Heard] = {}
        self._before: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @cached_property
    def questions(self) -> list[Question]:
        """The held-out questions."""
        return held_out_questions(self.n, SEED)

    @cached_property
    def gold(self) -> Lines:
        """The questions with their right answers."""
        return lines_of(self.questions)

    def seer(self, name: str) -> Seer:
        """A model, loaded once."""
        if name not in self._seers:
            self._seers[name] = Seer(self.checkpoints[name], self.questions)
        return self._seers[name]

    def heard(self, name: str) -> Heard:
        """What a model says and looks at when nothing is pruned, from file where it is known."""
        if name not in self._heard:
            file = self.folder / f"heard-{self.n}-{self.digests[name]}.npz"
            if not file.exists():
                say(f"{name}: answers and maps of {self.n} questions")
                with file.with_suffix(".partial").open("wb") as partial:
                    np.savez(partial, **vars(listen(self.seer(name), self.questions, self.gold)))
                file.with_suffix(".partial").replace(file)
            with np.load(file) as stored:
                self._heard[name] = Heard(**{field.name: stored[field.name] for field in fields(Heard)})
        return self._heard[name]

    def rights(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Which questions a setting of the large model answers right, bool [N]; journalled by its key."""
        key = f"{self.n} {self.digests['large']} {key}"
        if key not in self.known:
            right_N = compute()
            self.known[key] = np.packbits(right_N).tobytes().hex()
            with self.journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps({"key": key, "right": self.known[key]}) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.known[key]), np.uint8))
        return bits[: self.n].astype(bool)

    def before(self, name: str, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The gold lines' rows before a layer and their positions, batch by batch, nothing pruned; kept for reuse."""
        if (name, layer) not in self._before:
            seer = self.seer(name)
            made = []
            for part in self.gold.batches(BATCH):
                rows, positions = seer.start(self.gold, part)
                made.append((seer.run(rows, positions, range(layer)), positions))
            self._before[name, layer] = made
        return self._before[name, layer]

    def pruned(self, kept_NK: np.ndarray, layer: int, name: str = "large") -> np.ndarray:
        """Which questions a model answers right when only ``kept_NK`` go on before ``layer``, bool [N]."""
        seer, right = self.seer(name), np.zeros(self.n, bool)
        for part, (rows, positions) in zip(self.gold.batches(BATCH), self.before(name, layer), strict=True):
            kept_BK = torch.as_tensor(kept_NK[part])
            index = kept_rows(self.gold, kept_BK, rows.shape[1], seer.visual_NVD.shape[1])
            ends = seer.run(gathered(rows, index), positions.gather(1, index), range(layer, seer.layers))
            right[part] = exact(seer, ends, self.gold, part)
        return right


def exact(seer: Seer, ends_BRD: torch.Tensor, lines: Lines, part: np.ndarray) -> list[bool]:
    """Whether each answer is what greedy decoding would give."""
    found = seer.log_probs(ends_BRD, lines, part)
    return [p.argmax(-1).tolist() == lines.said[i] for p, i in zip(found, part, strict=True)]


def listen(seer: Seer, questions: list[Question], gold: Lines) -> Heard:
    """Answer greedily, then look at one pass over prompt and answer, and at those with few visual tokens."""
    said = greedy(seer, questions, gold.said[0][-1])
    lines = lines_of(questions, said)
    n, visual = len(lines), seer.visual_NVD.shape[1]
    received = np.zeros((n, seer.layers, 3, visual), np.float32)
    log_prob, entropy = (np.full((n, NEW_TOKENS), np.nan) for _ in range(2))
    consistency, tokens = np.zeros((n, len(CONSISTENCY_KEEPS))), np.full((n, NEW_TOKENS), -1)
    for part in lines.batches(BATCH):
        rows, positions = seer.start(lines, part)
        with WATCH.on(lines.groups(part)) as maps:
            ends = seer.run(rows, positions, range(seer.layers))
        received[part] = torch.stack(maps, 1)[..., lines.first : lines.first + visual].numpy()
        for i, p_nW in zip(part, seer.log_probs(ends, lines, part), strict=True):
            n_i = len(p_nW)
            tokens[i, :n_i] = lines.said[i]
            log_prob[i, :n_i] = p_nW[range(n_i), lines.said[i]]
            entropy[i, :n_i] = -(p_nW.exp() * p_nW).sum(-1)
    for k, keep in enumerate(CONSISTENCY_KEEPS):
        kept_NK = best_visual(received[:, :, 1:].sum((1, 2)), kept_count(visual, keep))
        for part in lines.batches(BATCH):
            rows, positions = seer.start(lines, part)
            index = kept_rows(lines, torch.as_tensor(kept_NK[part]), rows.shape[1], visual)
            ends = seer.run(gathered(rows, index), positions.gather(1, index), range(seer.layers))
            for i, p_nW in zip(part, seer.log_probs(ends, lines, part), strict=True):
                consistency[i, k] = float(p_nW[range(len(p_nW)), lines.said[i]].sum())
    right = np.array([a == b for a, b in zip(said, gold.said, strict=True)])
    return Heard(right, np.array(list(map(len, said))), received, log_prob, entropy, consistency, tokens)


def greedy(seer: Seer, questions: list[Question], end: int) -> list[list[int]]:
    """The model's answers, end tokens included: the whole line again for every token."""
    said: list[list[int]] = [[] for _ in questions]
    going = list(range(len(questions)))
    for _ in track(range(NEW_TOKENS), "answering, token by token"):
        # The last token of an answer is never fed, so a placeholder asks for the next one.
        lines = lines_of(questions, [[*answer, end] for answer in said])
        for every in lines.batches(BATCH):
            if len(part := every[np.isin(every, going)]):
                rows, positions = seer.start(lines, part)
                ends = seer.run(rows, positions, range(seer.layers))
                for i, p_nW in zip(part, seer.log_probs(ends, lines, part), strict=True):
                    said[i].append(int(p_nW[-1].argmax()))
        going = [i for i in going if said[i][-1] != end]
        if not going:
            break
    return said


def digest_of(file: Path) -> str:
    """The first twelve digits of a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def read_line(line: str) -> dict[str, str] | None:
    """A line of the journal, None for one that was cut off."""
    try:
        entry: dict[str, str] = json.loads(line)
    except ValueError:
        return None
    return entry
