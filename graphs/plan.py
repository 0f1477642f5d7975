"""The pruning plan: where visual tokens are dropped, by which score, and how many stay.

Legend: L decoder layers, K the layer before which a prune point sits, N visual tokens, r the share kept.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from graphs.errors import UsageError
from graphs.merging import checked_merging, recycling

Score = Literal["attention", "preview", "priority", "random"]
Rows = Literal["text", "last", "text_and_last_visual", "raters"]
VisionScore = Literal["received", "cls", "zip", "tome", "divprune", "cdpruner", "random"]
Role = Literal["small", "large", "alone"]

BY_ATTENTION: tuple[Score, ...] = ("attention", "preview")
FROM_OUTSIDE: tuple[Score, ...] = ("priority", "random")  # the host feeds them as the graph input ``priority``
ON_HOST: tuple[VisionScore, ...] = ("divprune", "cdpruner", "random")  # greedy loops and draws, between two stages
MERGING: tuple[VisionScore, ...] = ("zip", "tome")  # rows of the tower may become averages


class Record(BaseModel):
    """Base of every record that is written to a file: immutable, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(Record):
    """How many visual tokens stay: ``keep``, a share of the original ones, or ``count`` of them.

    Both are defaults; a run may choose another number.
    """

    keep: float = Field(default=1.0, gt=0, le=1)
    count: int | None = Field(default=None, ge=1)

    def kept_of(self, tokens: int, images: int = 1) -> int:
        """Tokens that stay of ``tokens``; a count is per image where the point is per image."""
        if getattr(self, "per_image", False) and images > 1:
            return images * self.kept_of(tokens // images)
        return kept_count(tokens, self.keep) if self.count is None else min(self.count, tokens)

    def share_of(self, tokens: int) -> float:
        """What stays by default, as a share of ``tokens``."""
        return self.keep if self.count is None else min(1.0, self.count / tokens) if tokens else 1.0

    @property
    def prunes(self) -> bool:
        """Whether anything is dropped by default (a count may, by the image's size)."""
        return self.count is not None or self.keep < 1


class PrunePoint(Budget):
    """Drop visual tokens before decoder layer ``layer`` (0-based).

    score ``attention``: what each token receives in layer ``layer - 1`` from the guide ``rows``, summed over
    heads and rows (a mean ranks the same); ``preview``: the same of layer ``layer`` itself, from its q and k over all
    rows before it runs (PyramidDrop); ``priority``: the graph input of that name, guidance from outside
    (SGL's large model); ``random``: the same input, drawn by the host from ``seed``.
    rows: ``text`` behind the last image, ``last`` row only, or ``raters``: the text rows whose relevance to the
    image is at least the mean (SparseVLM).
    per_image: each image keeps its own share, at least one token; else the best of all images together.
    merge: this share of the kept tokens are clusters of the best of the dropped, ``recycle`` of those (SparseVLM).
    """

    layer: int = Field(ge=0)
    score: Score
    rows: Rows = "text"
    seed: int = Field(default=0, ge=0)
    per_image: bool = False
    merge: float = Field(default=0.0, ge=0, lt=1)
    recycle: float = Field(default=0.3, gt=0, le=1)

    def merging(self, before: int, kept: int) -> tuple[int, int]:
        """Lengths of the carriers merge_i and recycle_i where ``kept`` of ``before`` visual tokens go on."""
        return recycling(before, kept, self.merge, self.recycle)


class VisionPoint(Budget):
    """Drop visual tokens after (or, ``tome``, inside) the vision tower, before the decoder sees any.

    score ``received``: visual self-attention over the embeddings (STAR, stage 1); ``cls``: attention of the
    tower's class token; ``zip``: the same, and a share ``merge`` of the kept tokens are averages of dropped
    ones (VisionZip); ``tome``: bipartite merging in every tower layer; ``divprune``, ``cdpruner``, ``random``:
    chosen by the host between the vision and the embed stage.
    per_image: each image keeps its own share; else the best of all images together.
    """

    score: VisionScore
    per_image: bool = False
    merge: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    # tome: layers of the tower that merge, known once the plan is fitted to a model.
    tower_layers: int = Field(default=0, ge=0)

    def carriers(self, tokens: int, images: int = 1, keep: float | None = None) -> dict[str, int]:
        """Lengths of the vision graph's shape carriers for ``tokens`` visual tokens of all images.

        keep: a share in (0, 1] instead of the point's own. Of an image stays one at least, and where some are
        merged two. Raises UsageError for a number that cannot be had.
        """
        point = self if keep is None else self.model_copy(update={"keep": keep, "count": None})
        kept = point.kept_of(tokens, images) // (images if self.per_image else 1)
        if self.merge:
            kept = max(kept, min(2, tokens // max(1, images)))  # one as it is, and one of the merged
        if self.score == "tome":
            checked_merging(tokens // images, kept, self.tower_layers)
        merged = min(max(1, round(kept * self.merge)), kept - 1) if self.merge else 0
        if self.merge and not merged:
            raise UsageError(
                "an image of 1 visual token is too small for one to be kept and others merged; "
                "give a larger image, or a plan that merges nothing"
            )
        return {"keep_vision": kept - merged, **({"merge_vision": merged} if self.merge else {})}

    @property
    def merges(self) -> bool:
        """Whether rows of the tower become averages."""
        return self.score == "tome" or self.merge > 0

    @property
    def on_host(self) -> bool:
        """Whether the host chooses; the vision graph then gives every token."""
        return self.score in ON_HOST


class Guidance(Record):
    """The decoder returns ``attention_received``, summed over ``layers``, all heads, all guide rows.

    rows ``text`` is the SGL paper's (text after the image); ``text_and_last_visual`` starts one row
    earlier, as the authors' code does (NUS-HPC-AI-Lab/SGL 7e76fd2).
    """

    layers: tuple[int, ...]
    rows: Rows = "text"


class PruningPlan(Record):
    """At most one prune point at the vision stage, an ordered list of them in the decoder, or guidance for others.

    allow_nothing: a plan that prunes nothing was asked for.
    """

    name: str
    points: tuple[PrunePoint, ...] = ()
    guidance: Guidance | None = None
    vision: VisionPoint | None = None
    allow_nothing: bool = False

    @property
    def uses_guide(self) -> bool:
        """Whether the decoder graph reads the shape carrier ``guide``."""
        return self.guidance is not None or any(p.score in BY_ATTENTION for p in self.points)

    @property
    def uses_priority(self) -> bool:
        """Whether the decoder graph has the input ``priority``."""
        return any(p.score in FROM_OUTSIDE for p in self.points)

    @property
    def uses_visual(self) -> bool:
        """Whether the decoder graph has the input ``is_visual``."""
        return self.attention_rows == "raters" or any(not p.per_image for p in self.points)

    @property
    def uses_image(self) -> bool:
        """Whether the decoder graph has the input ``image_index``: which image each row is of."""
        return any(p.per_image for p in self.points)

    @property
    def needs_guidance(self) -> bool:
        """Whether another model has to say what stays."""
        return any(p.score == "priority" for p in self.points)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Every prune point in order, that of the vision stage first."""
        return (*([self.vision] if self.vision else []), *self.points)

    @property
    def prunes(self) -> bool:
        """Whether any point drops tokens by default."""
        return any(p.prunes for p in self.budgets)

    @property
    def attention_rows(self) -> Rows | None:
        """The guide rows of guidance and prune points, one choice for the plan; None where it has no guide."""
        if self.guidance:
            return self.guidance.rows
        return next((p.rows for p in self.points if p.score in BY_ATTENTION), None)

    def guide_rows(self, text: int) -> int:
        """G, how many of a chunk's last rows guide where the plan has a guide; text: rows behind the last image."""
        assert self.attention_rows
        return {"last": 1, "text_and_last_visual": text + 1}.get(self.attention_rows, text)

    def segments(self, layers: int) -> tuple[range, ...]:
        """The layers between prune points, one range per segment; each has its own cache length.

        Segment 0 is empty where a point sits before layer 0.
        """
        cuts = [0, *(p.layer for p in self.points), layers]
        return tuple(range(a, b) for a, b in pairwise(cuts))

    def validated(self, layers: int) -> PruningPlan:
        """Return the plan itself, or raise UsageError naming the first thing that cannot be."""
        before = -1
        for point in self.points:
            if not before < point.layer < layers:
                raise UsageError(
                    f"plan {self.name}: prune point before layer {point.layer}, but it must lie "
                    f"after layer {before} and below the model's {layers} layers; order the points "
                    "or choose an existing layer"
                )
            if point.score == "attention" and point.layer == 0:
                raise UsageError(
                    f"plan {self.name}: a point before layer 0 has no attention of its own to go by; "
                    "use score 'priority' or a later layer"
                )
            before = point.layer
        self._check_together()
        if self.guidance:
            self._check_guidance(layers, self.guidance)
        return self

    def _check_together(self) -> None:
        """What prune points may not say beside each other."""
        if len(rows := sorted({p.rows for p in self.points if p.score in BY_ATTENTION})) > 1:
            raise UsageError(
                f"plan {self.name}: prune points go by the rows {' and '.join(rows)}, but a decoder has one set of "
                "guide rows; give all points the same rows"
            )
        if len(scores := sorted({p.score for p in self.points if p.score in FROM_OUTSIDE})) > 1:
            raise UsageError(
                f"plan {self.name}: prune points go by {' and '.join(scores)}, but a decoder has one input priority; "
                "choose one of them"
            )
        keeps = [p.keep for p in self.budgets if p.count is None]
        counts = [p.count for p in self.points if p.count is not None]
        if any(b > a for a, b in [*pairwise(keeps), *pairwise(counts)]):
            said = [p.count or round(p.keep, 4) for p in self.budgets]
            raise UsageError(
                f"plan {self.name}: prune points keep {said} of the original tokens "
                "in turn, but dropped tokens do not come back; list them in decreasing order"
            )
        if any(b.per_image and not a.per_image for a, b in pairwise(self.points)):
            raise UsageError(
                f"plan {self.name}: a point per image follows one that is not, and how many tokens that one leaves of "
                "each image is unknown; put points per image first"
            )
        if any(p.per_image and p.merge for p in self.points):
            raise UsageError(
                f"plan {self.name}: merging in the decoder clusters the dropped tokens of all images together; give "
                "merge or per_image, not both"
            )
        if self.vision and self.vision.score in MERGING and not self.vision.per_image:
            raise UsageError(
                f"plan {self.name}: score {self.vision.score!r} merges tokens of one image, so each image keeps its "
                "own share; say per_image = true"
            )
        if self.vision and self.vision.merge and self.vision.score != "zip":
            raise UsageError(
                f"plan {self.name}: merge belongs to score 'zip', not to {self.vision.score!r}; leave it out"
            )

    def _check_guidance(self, layers: int, guidance: Guidance) -> None:
        if not guidance.layers or len(set(guidance.layers)) < len(guidance.layers):
            raise UsageError(
                f"plan {self.name}: guidance comes from layers {list(guidance.layers)}, but it is a sum over "
                "at least one layer, each once; list them like that"
            )
        if guidance.rows == "raters":
            raise UsageError(
                f"plan {self.name}: guidance is a plain sum over its rows; raters rank prune points only; choose other "
                "rows"
            )
        if bad := [i for i in guidance.layers if not 0 <= i < layers]:
            raise UsageError(
                f"plan {self.name}: guidance layers {bad} do not exist; the model has {layers}, "
                f"choose 0 to {layers - 1}"
            )
        if self.points or self.vision:
            raise UsageError(
                f"plan {self.name}: guidance is collected over full rows, so a plan that gives "
                "guidance cannot prune inside; split it over two exports"
            )


def layer_of(fraction: float, layers: int) -> int:
    """K = int(L·f), the SGL code's rounding (arXiv 2412.03324), of the decimal that was meant: 0.29·100 is 29."""
    if not 0 <= fraction < 1:
        raise UsageError(f"layer fraction {fraction} is outside [0, 1); give the share of the depth before the cut")
    return min(layers - 1, int(layers * fraction + 1e-9))


def average_retention(layers: int, layer: int, keep: float) -> float:
    """Average share of visual tokens over the layers: (K + (L−K)·r)/L (SGL, §4.1)."""
    return (layer + (layers - layer) * keep) / layers


def retention_of(plan: PruningPlan, layers: int, ratios: tuple[float, ...]) -> float:
    """Return the average share of visual tokens over the decoder's layers, for any number of prune points."""
    at_vision = len(plan.budgets) - len(plan.points)
    share = before = ratios[0] if at_vision else 1.0
    for point, ratio in zip(plan.points, ratios[at_vision:], strict=True):
        share += average_retention(layers, point.layer, ratio) - average_retention(layers, point.layer, before)
        before = ratio
    return share


def keep_for_retention(layers: int, layer: int, retention: float) -> float:
    """The r that gives an average retention, or UsageError where layers before K already exceed it."""
    keep = (retention * layers - layer) / (layers - layer)
    if not 0 < keep <= 1:
        raise UsageError(
            f"an average retention of {retention:g} cannot be reached with a cut before layer {layer} of {layers}; "
            f"give one above {layer / layers:.3g} and at most 1"
        )
    return keep


def kept_count(tokens: int, keep: float) -> int:
    """int(N·r) of N visual tokens, at least one (SGL's rounding; an empty image would not be one)."""
    if not 0 < keep <= 1:
        raise UsageError(f"keep is {keep:g}, but must lie in (0, 1]; give the share of visual tokens to keep")
    return max(1, int(tokens * keep + 1e-9)) if tokens else 0
