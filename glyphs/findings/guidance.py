"""Findings i and ii: whose attention, of which layers and rows, says what the large model may drop.

Source: SGL, arXiv 2412.03324, §3.1, §3.2 and its ablations. N questions, V visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from glyphs.findings.models import best_visual
from glyphs.findings.statistics import holm, paired, share
from glyphs.findings.work import Work
from graphs.console import track
from graphs.plan import average_retention, keep_for_retention, kept_count, layer_of

FRACTION = 0.05  # of the depth, before the cut; the demo's
DRAWS = 3
ROWS = ("last", "prompt", "generated", "both")
SGL_CUTS = ((0.4, 0.4), (0.2, 0.2), (0.05, 0.05))  # the paper's fraction of the depth and share kept


@dataclass(frozen=True)
class Cut:
    """Before which layer the large model is pruned, and to how many visual tokens."""

    layer: int
    keep: float
    count: int
    retention: float

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.retention:.0%}"

    def document(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {"layer": self.layer, "keep": round(self.keep, 4), "count": self.count, "retention": self.retention}


def cuts_of(layers: int, visual: int) -> list[Cut]:
    """The demo's three average retentions; and two below them, which only a cut before layer 0 can have."""
    places = [(layer_of(FRACTION, layers), r) for r in (0.64, 0.35, 0.09)] + [(0, r) for r in (0.05, 0.03)]
    keeps = [(layer, keep_for_retention(layers, layer, r), r) for layer, r in places]
    return [Cut(layer, keep, kept_count(visual, keep), r) for layer, keep, r in keeps]


def sgl_cuts(layers: int, visual: int) -> list[Cut]:
    """SGL's own three."""
    places = [(layer_of(fraction, layers), keep) for fraction, keep in SGL_CUTS]
    return [Cut(k, r, kept_count(visual, r), round(average_retention(layers, k, r), 4)) for k, r in places]


@dataclass(frozen=True)
class Source:
    """Whose attention: a model's layers and rows; or a draw of that seed, where the model is `random`."""

    model: str
    layers: tuple[int, ...] = ()
    rows: str = "both"
    draw: int = 0

    def scores(self, work: Work) -> np.ndarray:
        """[N,V]"""
        if self.model == "random":
            visual = work.heard("large").received.shape[-1]
            return np.random.default_rng([self.draw, 20261121]).random((work.n, visual))
        return work.heard(self.model).scores(self.layers, self.rows)

    def rights(self, work: Work, cut: Cut) -> np.ndarray:
        """Which questions the large model answers right, cut by this source; bool [N]."""
        key = f"{work.digests.get(self.model, 'random')} {self.layers} {self.rows} {self.draw} {cut.layer} {cut.count}"
        return work.rights(key, lambda: work.pruned(best_visual(self.scores(work), cut.count), cut.layer))

    def document(self) -> dict[str, Any]:
        """As JSON knows it."""
        if self.model == "random":
            return {"model": "random", "draw": self.draw}
        return {"model": self.model, "layers": list(self.layers), "rows": self.rows}


def shares_of(layers: int) -> dict[str, tuple[int, ...]]:
    """All layers; the first third, half, two thirds; the last ones."""
    every = tuple(range(layers))
    parts = {"1/3": layers // 3, "1/2": layers // 2, "2/3": 2 * layers // 3}
    first = {f"first {name}": every[:n] for name, n in parts.items()}
    return {"all": every, **first, **{f"last {name}": every[-n:] for name, n in parts.items()}}


def sources_of(name: str, layers: int) -> list[Source]:
    """All that is asked of one small model."""
    parts = [Source(name, part) for part in shares_of(layers).values()]
    single = [Source(name, (i,)) for i in range(layers)]
    return parts + single + [Source(name, tuple(range(layers)), rows) for rows in ROWS[:-1]]


def large_sources(layers: int) -> list[Source]:
    """The large model's own: all layers (oracle), each alone, and what is known at the cut: layer 0's prompt rows."""
    every = tuple(range(layers))
    asked = [Source("large", every), Source("large", every, "prompt")]
    asked += [Source("large", (i,)) for i in every]
    return [*asked, Source("large", (0,), "prompt"), Source("large", (0,), "last")]


def guidance(work: Work, small: list[str]) -> dict[str, Any]:
    """Every source at every cut, and the paired tests behind the claims."""
    layers, visual = work.heard("large").received.shape[1::2]
    cuts = cuts_of(layers, visual)
    sources = [Source("random", draw=i) for i in range(DRAWS)]
    for name in small:
        sources += sources_of(name, work.heard(name).received.shape[1])
    sources += large_sources(layers)
    settings = [(source, cut) for cut in reversed(cuts) for source in sources]
    for source, cut in track(settings, f"{len(sources)} sources at {len(cuts)} retentions"):
        source.rights(work, cut)
    return {
        "cuts": [cut.document() for cut in cuts],
        "sources": [
            {**source.document(), "at": [share(source.rights(work, cut)) for cut in cuts]} for source in sources
        ],
        "tests": [test for name in small for test in tests(work, name, cuts)] + oracle_tests(work, cuts),
        "sgl_cuts": at_sgl_cuts(work, small, layers, visual),
    }


def tests(work: Work, small: str, cuts: list[Cut]) -> list[dict[str, Any]]:
    """Paired tests of a small model's guidance, corrected within each claim."""
    depth, large = (work.heard(name).received.shape[1] for name in (small, "large"))
    every, oracle = Source(small, tuple(range(depth))), Source("large", tuple(range(large)))
    draw = Source("random")
    shares = {name: Source(small, part) for name, part in shares_of(depth).items() if name != "all"}
    claims: dict[str, list[tuple[Source, Source, str]]] = {
        f"{small} all against one layer of {small}": [(every, Source(small, (i,)), f"layer {i}") for i in range(depth)],
        f"{small} all against random": [(every, draw, "random")],
        f"{small} all against large all": [(every, oracle, "large all")],
        f"{small} all against a share of its layers": [(every, source, name) for name, source in shares.items()],
        f"{small} both rows against others": [(every, Source(small, every.layers, rows), rows) for rows in ROWS[:-1]],
        f"{small} all against large layer before the cut": [
            (every, Source("large", (0,), rows), f"large layer 0, {rows}") for rows in ("prompt", "last")
        ],
    }
    return [test for claim, pairs in claims.items() for test in tests_of(work, claim, pairs, cuts)]


def oracle_tests(work: Work, cuts: list[Cut]) -> list[dict[str, Any]]:
    """All layers of the large model against each of them."""
    layers = range(work.heard("large").received.shape[1])
    pairs = [(Source("large", tuple(layers)), Source("large", (i,)), f"layer {i}") for i in layers]
    return tests_of(work, "large all against one layer of large", pairs, cuts)


def tests_of(work: Work, claim: str, pairs: list[tuple[Source, Source, str]], cuts: list[Cut]) -> list[dict[str, Any]]:
    """One claim's tests at every retention, corrected for their number."""
    rows = []
    for a, b, name in pairs:
        for cut in cuts:
            test = paired(a.rights(work, cut), b.rights(work, cut))
            rows.append({"claim": claim, "against": name, "retention": cut.retention, **test})
    holm(rows)
    return rows


def at_sgl_cuts(work: Work, small: list[str], layers: int, visual: int) -> list[dict[str, Any]]:
    """The paper's own cuts: where more layers see everything, the layer before the cut has seen more."""
    found = []
    for cut in track(sgl_cuts(layers, visual), "the cuts of SGL's paper"):
        sources = [Source(name, tuple(range(work.heard(name).received.shape[1]))) for name in small]
        sources += [Source("large", tuple(range(layers))), Source("large", (cut.layer - 1,), "prompt")]
        sources += [Source("large", (cut.layer - 1,), "last"), Source("random")]
        at = [{**source.document(), **share(source.rights(work, cut))} for source in sources]
        found.append({"cut": cut.document(), "sources": at})
    return found
