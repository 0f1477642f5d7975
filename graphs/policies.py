"""Named plans: what each published method prunes, with its paper's defaults and source; ``saccade show policies``.

Where a paper's number is absolute for a 32-layer model, the layer is given as that share of the depth.
Layers are counted as everywhere here: a point before layer K goes by the attention of layer K−1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from graphs.errors import UsageError
from graphs.plan import PruningPlan, Role, kept_count, layer_of
from graphs.plan_file import GuidanceDocument, PlanDocument, PointDocument


@dataclass(frozen=True)
class Policy:
    """A named plan. points: what the model in this role prunes; guidance: what it gives instead of pruning."""

    name: str
    meaning: str
    source: str
    points: Callable[[Role], tuple[PointDocument, ...]]
    guidance: Callable[[Role], GuidanceDocument | None] = lambda _: None

    def document(self, role: Role) -> PlanDocument:
        """The plan of a model in this role, not yet fitted to a depth."""
        return PlanDocument(
            name=self.name, point=self.points(role), guidance=self.guidance(role), allow_nothing=self.name == "none"
        )


def _always(*points: PointDocument) -> Callable[[Role], tuple[PointDocument, ...]]:
    return lambda _: points


def _point(where: Any, score: Any, **more: Any) -> PointDocument:
    return PointDocument(where=where, score=score, **more)


def _sgl_points(role: Role) -> tuple[PointDocument, ...]:
    if role == "small":
        return ()
    return (_point(0.05, "priority" if role == "large" else "attention", keep=0.05),)


TABLE = (
    Policy("none", "Nothing is pruned and nothing is given; asked for by name, so it is no error.", "", _always()),
    Policy(
        "sgl",
        "The small model's attention, summed over all layers, heads and text rows, says what the large model keeps; "
        "alone, a model goes by its own attention of the layer before the cut.",
        "SGL, arXiv 2412.03324: before layer int(0.05·L), keep 5 % (the paper's 9 % average retention)",
        _sgl_points,
        lambda role: GuidanceDocument() if role == "small" else None,
    ),
    Policy(
        "star",
        "Twice: after the vision tower, what each visual token receives in softmax(HHᵀ/√d) over the embeddings of its "
        "image; before a layer in the middle, what it receives from all text behind the image.",
        "STAR, arXiv 2505.12359; its R, K and P are not published where we could read: 50 % at the vision stage is "
        "ours, K = 14 of 32 and keep 5 % are those of a close successor",
        _always(
            _point("vision", "received", keep=0.5, per_image=True),
            _point(0.4375, "attention", rows="text", keep=0.05),
        ),
    ),
    Policy(
        "fastervlm",
        "What each visual token receives from the tower's class token, in the layer whose output is used, as a mean "
        "over its patches. Towers with a class token only (CLIP, InternViT).",
        "FasterVLM, arXiv 2412.01818: keep 144 of 576 (the mildest of 144, 58, 29)",
        _always(_point("vision", "cls", keep=0.25, per_image=True)),
    ),
    Policy(
        "visionzip",
        "As fastervlm for the dominant tokens, in towers without a class token by attention received from all patches; "
        "the rest is averaged into contextual ones by the likeness of keys. In image order; the class token itself is "
        "not passed on.",
        "VisionZip, arXiv 2412.04467: 54 dominant and 10 contextual of 576",
        _always(_point("vision", "zip", keep=64 / 576, per_image=True, merge=10 / 64)),
    ),
    Policy(
        "tome",
        "Merges the most alike tokens in every tower layer, evenly, weighing attention by size; SGL's other baseline. "
        "A merged token stands where the one stood that the others were merged into; where a visual token is several "
        "patches, whole ones are merged.",
        "ToMe, arXiv 2210.09461; the paper has no LVLM budget: keep 25 % is ours",
        _always(_point("vision", "tome", keep=0.25, per_image=True)),
    ),
    Policy(
        "divprune",
        "The tokens that lie farthest from each other by cosine distance, chosen greedily by the host between the "
        "vision and the embed stage; text-free.",
        "DivPrune, arXiv 2503.02175: keep 9.8 %",
        _always(_point("vision", "divprune", keep=0.098, per_image=True)),
    ),
    Policy(
        "cdpruner",
        "Tokens that are relevant to the question and unlike each other: greedy MAP of a DPP, by the host. Relevance "
        "is cosine to the language model's own text embeddings, not to a CLIP text tower as in the paper.",
        "CDPruner, arXiv 2506.10967: keep 64 of 576",
        _always(_point("vision", "cdpruner", keep=64 / 576, per_image=True)),
    ),
    Policy(
        "fastv",
        "What the last row attends to in layer 1; a mean over heads ranks as our sum does.",
        "FastV, arXiv 2403.06764: before layer K = 2, keep 50 %",
        _always(_point(2, "attention", rows="last", keep=0.5)),
    ),
    Policy(
        "pyramiddrop",
        "What the last row would attend to in the layer behind the cut, three times. Positions stay the original ones; "
        "the authors renumber.",
        "PyramidDrop, arXiv 2410.17247: layers 8, 16, 24 of 32, keep 50, 25 and 12.5 % of the original",
        _always(
            *(
                _point(where, "preview", rows="last", keep=keep)
                for where, keep in ((0.25, 0.5), (0.5, 0.25), (0.75, 0.125))
            )
        ),
    ),
    Policy(
        "sparsevlm",
        "What the text rows that are about the image (relevance to it at least the mean) attend to, three times. Of "
        "the dropped the best 30 % are clustered by density peaks; each cluster's mean goes on at its centre's place.",
        "SparseVLM, arXiv 2410.04417: after layers 2, 6, 15 of 32, keep 66, 30, 17 of 576 and behind them a tenth of "
        "the recycled as clusters (16, 2, 1)",
        _always(
            *(
                _point(
                    layer / 32,
                    "attention",
                    rows="raters",
                    keep=(count + clusters) / 576,
                    merge=clusters / (count + clusters),
                )
                for layer, count, clusters in ((3, 66, 16), (7, 30, 2), (16, 17, 1))
            )
        ),
    ),
    Policy(
        "random",
        "Drawn uniformly from a seed, at SGL's place: the baseline of every comparison.",
        "no paper; where and how many as sgl",
        _always(_point(0.05, "random", keep=0.05)),
    ),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in TABLE}


def policy_document(policy: str, role: Role) -> PlanDocument:
    """The plan of a name, or of several joined by ``+``, whose points follow each other (``visionzip+sgl``)."""
    parts = []
    for name in policy.split("+"):
        if name not in POLICIES:
            near = get_close_matches(name, POLICIES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown policy {name!r}; known are {', '.join(sorted(POLICIES))}{hint}")
        parts.append(POLICIES[name].document(role))
    if len(parts) == 1:
        return parts[0]
    if empty := [part.name for part in parts if part.allow_nothing]:
        raise UsageError(f"policy {policy}: {empty[0]} prunes nothing, so it joins no other; leave it out")
    guidance = next((part.guidance for part in parts if part.guidance), None)
    return PlanDocument(name=policy, point=tuple(p for part in parts for p in part.point), guidance=guidance)


def plan_of_policy(policy: str, role: Role, layers: int, **options: float) -> PruningPlan:
    """The named plan for a model of ``layers`` layers in this role; unknown names list the known ones.

    options: ``fraction`` (the share of the depth before the cut) and ``keep``, for plans with one prune point.
    """
    document = policy_document(policy, role)
    said = " and no ".join(options)
    if options and document.guidance:
        raise UsageError(
            f"the small model of {policy} is not pruned, so it takes no {said}; give that to the large model's export, "
            "or --role large"
        )
    if options and not document.point:
        raise UsageError(f"policy {policy} takes no {said}; leave them out or use --policy sgl")
    if options and len(document.point) > 1:
        raise UsageError(
            f"policy {policy} has {len(document.point)} prune points, so one {' and one '.join(options)} says too "
            "little; write a plan file and give it with --plan"
        )
    if options:
        document = document.model_copy(update={"point": (_with_options(policy, document.point[0], options),)})
    return document.resolved(layers, refuse_nothing=False)


def _with_options(policy: str, point: PointDocument, options: dict[str, float]) -> PointDocument:
    changed: dict[str, Any] = {}
    if "keep" in options:
        kept_count(1, options["keep"])
        changed |= {"keep": options["keep"], "count": None}
    if "fraction" in options:
        if point.where == "vision":
            raise UsageError(f"policy {policy} prunes at the vision stage, so it takes no fraction; leave it out")
        layer_of(options["fraction"], 1)
        changed["where"] = float(options["fraction"])
    return point.model_copy(update=changed)
