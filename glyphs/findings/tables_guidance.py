"""The tables of findings i and ii: who says which tokens stay."""

from __future__ import annotations

from glyphs.findings.cells import (
    ROWS,
    SIGNIFICANT,
    Document,
    at,
    by,
    depth,
    heads,
    interval_cells,
    percent,
    points,
    runs,
    table,
)


def singles(document: Document, model: str) -> list[str]:
    """Best, mean and worst of one layer's attention, per retention."""
    every = [at(document, model, [i]) for i in range(depth(document, model))]
    cells = []
    for column in zip(*every, strict=True):
        shares = [cell["share"] for cell in column]
        best, worst = (shares.index(pick(shares)) for pick in (max, min))
        cells.append(
            f"{percent(shares[best])} (l. {best}) / {percent(sum(shares) / len(shares))}"
            f" / {percent(shares[worst])} (l. {worst})"
        )
    return cells


def drawn(document: Document) -> list[str]:
    """The mean of the random draws and their range."""
    every = [s["at"] for s in document["guidance"]["sources"] if s["model"] == "random"]
    cells = []
    for column in zip(*every, strict=True):
        shares = [cell["share"] for cell in column]
        cells.append(f"{percent(sum(shares) / len(shares))} ({percent(min(shares))}–{percent(max(shares))})")
    return cells


def verdicts(document: Document, claim: str, against: str | None = None) -> list[str]:
    """A claim's tests, one cell per retention: points, starred; of several how many are better : worse."""
    cells = []
    for cut in document["guidance"]["cuts"]:
        here = [
            t
            for t in document["guidance"]["tests"]
            if t["claim"] == claim and t["retention"] == cut["retention"] and against in (None, t["against"])
        ]
        sure = [t for t in here if t["p_holm"] < SIGNIFICANT]
        if len(here) == 1:
            cells.append(points(here[0]["difference"]) + "*" * len(sure))
        else:
            better = sum(t["difference"] > 0 for t in sure)
            cells.append(f"{better} : {len(sure) - better} of {len(here)}")
    return cells


def claims_short(document: Document) -> list[str]:
    """The paired differences that findings i and ii are about, for every small model."""
    single = "large all against one layer of large"
    rows = [["i: large all − one layer of it, better : worse", *verdicts(document, single)]]
    names = runs(document)
    for title, claim, against in (
        ("i: {} all − one layer of it, better : worse", "{0} all against one layer of {0}", None),
        ("ii: {} all − large all", "{} all against large all", None),
        ("ii: {} all − its first half", "{} all against a share of its layers", "first 1/2"),
        ("ii: {} both rows − prompt rows", "{} both rows against others", "prompt"),
        ("{} all − random", "{} all against random", None),
    ):
        rows += [[title.format(name), *verdicts(document, claim.format(name), against)] for name in names]
    return table(["difference", *heads(document)], rows)


def all_sources(document: Document) -> list[str]:
    """Everything but single layers, with intervals."""
    head = ["tokens chosen by", *heads(document)]
    small, large = (list(range(depth(document, name))) for name in ("small", "large"))
    rows = [[f"random, draw {i}", *interval_cells(s["at"])] for i, s in enumerate(by(document, "random"))]
    for source in document["guidance"]["sources"]:
        if source["model"] == "random" or (len(source["layers"]) == 1 and source["rows"] == "both"):
            continue
        layers = source["layers"]
        whole = small if source["model"] != "large" else large
        which = "all layers" if layers == whole else f"layers {layers[0]}–{layers[-1]}"
        which = f"layer {layers[0]}" if len(layers) == 1 else which
        rows.append([f"{source['model']}: {which}, {ROWS[source['rows']]}", *interval_cells(source["at"])])
    return table(head, rows)


def single_layers(document: Document) -> list[str]:
    """Each layer alone, of every model."""
    rows = []
    for name in document["models"]:
        for i in range(depth(document, name)):
            cells = interval_cells(at(document, name, [i]))
            rows.append([f"{name}: layer {i}", *cells])
    return table(["tokens chosen by", *heads(document)], rows)


def best_layers(document: Document) -> list[str]:
    """All layers beside the best, mean and worst single one, by model."""
    rows = []
    for name in document["models"]:
        every = at(document, name, range(depth(document, name)))
        rows.append([f"{name}: all", *(percent(c["share"]) for c in every)])
        rows.append([f"{name}: one, best / mean / worst", *singles(document, name)])
    return table(["layers", *heads(document)], rows)


def paired_tests(document: Document) -> list[str]:
    """Every paired test of findings i and ii, single layers of the large model apart."""
    rows = []
    asked = dict.fromkeys((t["claim"], t["against"]) for t in document["guidance"]["tests"])
    for claim, against in asked:
        if claim != "large all against one layer of large":
            first = claim.partition(" against")[0]
            rows.append([f"{first} − {against}", *verdicts(document, claim, against)])
    return table(["difference", *heads(document)], rows)


def sgl_cuts(document: Document) -> list[str]:
    """The paper's own places of the cut."""
    found = document["guidance"]["sgl_cuts"]
    columns = [f"{c['cut']['retention']:.1%} (K {c['cut']['layer']}, r {c['cut']['keep']:g})" for c in found]
    rows = []
    for i, source in enumerate(found[0]["sources"]):
        model, layers = source["model"], source.get("layers", [])
        whole = model == "random" or len(layers) > 1
        name = (
            model
            if model == "random"
            else f"{model}: all layers"
            if whole
            else f"{model}: layer K−1, {ROWS[source['rows']]}"
        )
        rows.append([name, *interval_cells([c["sources"][i] for c in found])])
    return table(["tokens chosen by", *columns], rows)
