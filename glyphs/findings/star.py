"""STAR's two stages against either alone at equal budget, random selection beside.

Source: STAR, arXiv 2505.12359: stage 1 keeps what is attended to in softmax(HHᵀ/√d) over the visual embeddings, stage 2
what the prompt's text attends to in the layer before the cut, of what is left. A budget is the average share of visual
tokens over the layers. N questions, B of them in a batch, V visual tokens, K kept ones, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glyphs.findings.lines import Lines
from glyphs.findings.models import BATCH, WATCH, best_visual, gathered, kept_rows
from glyphs.findings.statistics import holm, paired, share
from glyphs.findings.work import Work, exact
from graphs.console import track
from graphs.plan import kept_count


@dataclass(frozen=True)
class Shape:
    """keep ``first`` of the visual tokens before layer 0, and from ``layer`` on as many as the budget leaves."""

    budget: float
    first: float
    layer: int | None = None

    def counts(self, layers: int, visual: int) -> tuple[int, int]:
        """Visual tokens behind stage 1 and behind stage 2."""
        one = kept_count(visual, self.first)
        if self.layer is None:
            return one, one
        rest = (self.budget * layers - self.first * self.layer) / (layers - self.layer)
        return one, kept_count(visual, rest)

    def retention(self, layers: int, visual: int) -> float:
        """The budget in whole tokens."""
        one, two = self.counts(layers, visual)
        layer = layers if self.layer is None else self.layer
        return (layer * one + (layers - layer) * two) / (layers * visual)


# Budgets: SGL's three, and 23.75 %, which is that of the shipped policy `star` (0.5, then 0.05 before layer 10 of 24).
# Layers were to be int(budget · L / 2) for stage 2 alone and 10 for both. As the layer before the cut matters so much
# here (every second one joined late, see the card of the pair), each place is tried behind an early and behind a
# late one; the early one counts.
FIRST = {0.64: 0.9, 0.35: 0.6, 0.2375: 0.5, 0.09: 0.15}
STAGE_2 = {0.64: (7, 8), 0.35: (5, 4), 0.2375: (3, 2), 0.09: (1, 1)}
BOTH = (9, 10)
ONE_MORE = "stage 1 alone, a token more"
MORE = {0.09: 13 / 144}  # whole tokens: stage 1 alone gets 12, 8.3 %, and both stages 8.5 %; 13 are 9.03 %


def shapes(budget: float) -> dict[str, Shape]:
    """The ways to spend a budget."""
    good, other = STAGE_2[budget]
    more = {ONE_MORE: Shape(budget, MORE[budget])} if budget in MORE else {}
    return {
        "stage 1 alone": Shape(budget, budget),
        "stage 2 alone": Shape(budget, 1.0, good),
        "both stages": Shape(budget, FIRST[budget], BOTH[0]),
        "stage 2 alone, another layer": Shape(budget, 1.0, other),
        "both stages, another layer": Shape(budget, FIRST[budget], BOTH[1]),
    } | more


def received(visual_NVD: torch.Tensor) -> np.ndarray:
    """Stage 1's scores, [N,V]: the mean over rows of softmax(HHᵀ/√d)."""
    logits_NVV = visual_NVD @ visual_NVD.transpose(1, 2) / visual_NVD.shape[2] ** 0.5
    mean_NV: np.ndarray = logits_NVV.softmax(-1).mean(1).numpy()
    return mean_NV


def rights(work: Work, shape: Shape, scores_NV: np.ndarray, drawn: bool) -> np.ndarray:
    """Which questions the large model answers right, bool [N]. drawn: ``scores_NV`` are a draw, for both stages."""
    seer, gold = work.seer("large"), work.gold
    visual = scores_NV.shape[1]
    one, two = shape.counts(seer.layers, visual)
    if shape.layer is None:
        return work.pruned(best_visual(scores_NV, one), 0)
    if one == visual and drawn:
        return work.pruned(best_visual(scores_NV, two), shape.layer)
    right_N = np.zeros(work.n, bool)
    for part in gold.batches(BATCH):
        rows, positions = seer.start(gold, part)
        first_BK = torch.as_tensor(best_visual(scores_NV[part], one))
        index = kept_rows(gold, first_BK, rows.shape[1], visual)
        rows, positions = gathered(rows, index), positions.gather(1, index)
        rows = seer.run(rows, positions, range(shape.layer - 1))
        with WATCH.on(gold.groups(part)[:, 1:2]) as maps:
            rows = seer.run(rows, positions, range(shape.layer - 1, shape.layer))
        scores_BK = maps[0][:, 0, gold.first : gold.first + one].numpy()
        if drawn:
            scores_BK = np.take_along_axis(scores_NV[part], first_BK.numpy(), 1)
        ends = _behind(work, gold, rows, positions, best_visual(scores_BK, two), one, shape.layer)
        right_N[part] = exact(seer, ends, gold, part)
    return right_N


def _behind(
    work: Work, gold: Lines, rows: torch.Tensor, positions: torch.Tensor, kept_BK: np.ndarray, visual: int, layer: int
) -> torch.Tensor:
    """Drop the others of ``visual`` tokens, then run the rest of the layers."""
    seer = work.seer("large")
    index = kept_rows(gold, torch.as_tensor(kept_BK), rows.shape[1], visual)
    return seer.run(gathered(rows, index), positions.gather(1, index), range(layer, seer.layers))


def star(work: Work) -> dict[str, Any]:
    """Every way at every budget, and paired tests of the two stages against the others."""
    layers, visual = work.heard("large").received.shape[1::2]
    draw_NV = np.random.default_rng([0, 20261122]).random((work.n, visual))
    scores_NV: list[np.ndarray] = []
    found: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    asked = [(budget, name, shape) for budget in FIRST for name, shape in shapes(budget).items()]
    known: dict[tuple[float, str], np.ndarray] = {}
    for budget, name, shape in track(asked, "STAR's stages"):
        one, two = shape.counts(layers, visual)
        for drawn in (False, True):
            if drawn and name.endswith(("another layer", ONE_MORE)):
                continue
            label = f"{name}, random" if drawn else name

            def compute(shape: Shape = shape, drawn: bool = drawn) -> np.ndarray:
                if not scores_NV:
                    scores_NV.append(received(work.seer("large").visual_NVD))
                return rights(work, shape, draw_NV if drawn else scores_NV[0], drawn)

            key = f"star {'drawn' if drawn else ''} {one} {shape.layer} {two}"
            known[budget, label] = work.rights(key, compute)
            found.append(
                {
                    "budget": budget,
                    "way": label,
                    "counts": [one, two],
                    "layer": shape.layer,
                    "retention": round(shape.retention(layers, visual), 4),
                    **share(known[budget, label]),
                }
            )
    for budget in FIRST:
        for way in ("stage 1 alone", "stage 2 alone", "both stages, random"):
            test = paired(known[budget, "both stages"], known[budget, way])
            tests.append({"claim": "both stages against", "against": way, "retention": budget, **test})
    for budget in MORE:
        test = paired(known[budget, "both stages"], known[budget, ONE_MORE])
        tests.append({"claim": "both stages against", "against": ONE_MORE, "retention": budget, **test})
    holm(tests)
    return {"ways": found, "tests": tests}
