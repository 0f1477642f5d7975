"""The tables of findings iii and iv, of STAR's stages, and of the models."""

from __future__ import annotations

from typing import Any

from glyphs.findings.cells import SIGNIFICANT, Document, interval_cells, percent, points, ranged, runs, table


def overlap(document: Document) -> list[str]:
    """Shared tokens at the counts kept."""
    found = document["overlap"]
    rows = [["chance", *map(percent, found["chance"]), "0.00"]]
    for row in found["rows"]:
        cells = [f"{percent(c['mean'])} [{percent(c['low'])}–{percent(c['high'])}]" for c in row["at"]]
        rows.append([row["maps"], *cells, f"{row['rank_correlation']['mean']:.2f}".replace("-", "−")])
    return table(["map", *(f"best {c}" for c in found["counts"]), "rank corr."], rows)


def exit_rows(document: Document, small: str, large: str) -> list[dict[str, Any]]:
    """The curves of one small model before one setting of the large."""
    return [r for r in document["exits"]["rows"] if (r["small"], r["large"]) == (small, large)]


def areas_of(document: Document) -> tuple[list[str], dict[str, list[str]]]:
    """What the large model keeps, and by score the area for each; the range over the small models."""
    names = runs(document)
    columns = list(dict.fromkeys(r["large"] for r in document["exits"]["rows"]))
    scores = [r["score"] for r in exit_rows(document, names[0], columns[0])]
    every: dict[str, list[str]] = {score: [] for score in scores}
    for score, cells in every.items():
        for large in columns:
            values = [next(r["area"] for r in exit_rows(document, n, large) if r["score"] == score) for n in names]
            cells.append(ranged([{"share": v} for v in values]))
    return columns, every


def areas(document: Document) -> list[str]:
    """The area of each score."""
    columns, every = areas_of(document)
    rows = [[score, *cells] for score, cells in every.items()]
    return table(["area under accuracy over calls", *(f"large at {c}" for c in columns)], rows)


def area_tests(document: Document) -> list[str]:
    """S against the other scores: difference of the areas in points and its bootstrap interval."""
    columns = list(dict.fromkeys(t["large"] for t in document["exits"]["tests"]))
    rows = []
    for small, against in dict.fromkeys((t["small"], t["against"]) for t in document["exits"]["tests"]):
        cells = []
        for large in columns:
            t = next(
                t
                for t in document["exits"]["tests"]
                if (t["small"], t["against"], t["large"]) == (small, against, large)
            )
            cells.append(
                f"{100 * t['difference']:+.2f} [{100 * t['low']:+.2f}, {100 * t['high']:+.2f}]".replace("-", "−")
            )
        rows.append([f"{small}: S − {against}", *cells])
    return table(["difference of areas, points", *(f"large at {c}" for c in columns)], rows)


def above_random(document: Document) -> list[str]:
    """How far a score's area lies above that of a random exit, points, for each small model in turn."""
    columns = list(dict.fromkeys(r["large"] for r in document["exits"]["rows"]))
    rows = []
    for score in ("S", "S_confidence", "S_consistency", "S_consistency at 35%", "entropy", "quantile 0"):
        cells = []
        for large in columns:
            of = [{r["score"]: r["area"] for r in exit_rows(document, small, large)} for small in runs(document)]
            above = [points(areas[score] - areas["random"]) for areas in of]
            cells.append(" / ".join(above))
        rows.append([score, *cells])
    return table(["area above a random exit, points, by seed", *(f"large at {c}" for c in columns)], rows)


def curves(document: Document) -> list[str]:
    """Accuracy over the share of calls, shipped pair."""
    rows = []
    for large in dict.fromkeys(r["large"] for r in document["exits"]["rows"]):
        every = exit_rows(document, "small", large)
        rows += [[f"large at {large}, {r['score']}", *map(percent, r["curve"])] for r in every]
    count = len(document["exits"]["rows"][0]["curve"]) - 1
    return table(["calls of the large model", *(f"{100 * i // count}%" for i in range(count + 1))], rows)


def star(document: Document) -> list[str]:
    """STAR's stages at equal budgets."""
    rows = []
    for way in document["star"]["ways"]:
        place = "" if way["layer"] is None else str(way["layer"])
        counts = f"{way['counts'][0]}, {way['counts'][1]}"
        rows.append([way["way"], f"{way['retention']:.1%}", place, counts, *interval_cells([way])])
    return table(["way", "budget", "cut before", "tokens", "right"], rows)


def star_tests(document: Document) -> list[str]:
    """Both stages against the others."""
    budgets = list(dict.fromkeys(t["retention"] for t in document["star"]["tests"]))
    rows = []
    for against in dict.fromkeys(t["against"] for t in document["star"]["tests"]):
        here = {t["retention"]: t for t in document["star"]["tests"] if t["against"] == against}
        cells = [
            points(here[b]["difference"]) + "*" * (here[b]["p_holm"] < SIGNIFICANT) if b in here else ""
            for b in budgets
        ]
        rows.append([f"both stages − {against}", *cells])
    return table(["difference", *(f"{b:.4g}" for b in (100 * b for b in budgets))], rows)


def models(document: Document) -> list[str]:
    """The models, nothing pruned."""
    rows = [[name, m["weights_sha256"], *interval_cells([m])] for name, m in document["models"].items()]
    return table(["model, nothing pruned", "weights", "right"], rows)
