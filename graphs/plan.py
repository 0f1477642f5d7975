"""The pruning plan: where visual tokens are dropped, by which score, and how many stay.

Legend: L decoder layers, K the layer before which a prune point sits, N visual tokens, r the share kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from graphs.errors import UsageError

Score = Literal["attention", "priority"]
Rows = Literal["text", "last", "text_and_last_visual"]
Role = Literal["small", "large", "alone"]


class Record(BaseModel):
    """Base of every record that is written to a file: immutable, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PrunePoint(Record):
    """Drop visual tokens before decoder layer ``layer`` (0-based).

    score ``attention``: what each token receives in layer ``layer - 1`` from the guide ``rows``;
    ``priority``: the graph input of that name, guidance from outside (SGL's large model).
    ``keep`` is the default share of the image's original visual tokens; a run may choose another.
    """

    layer: int = Field(ge=0)
    score: Score
    rows: Rows = "text"
    keep: float = Field(gt=0, le=1)


class Guidance(Record):
    """The decoder returns ``attention_received``, summed over ``layers``, all heads, all guide rows.

    rows ``text`` is the SGL paper's (text after the image); ``text_and_last_visual`` starts one row
    earlier, as the authors' code does (NUS-HPC-AI-Lab/SGL 7e76fd2).
    """

    layers: tuple[int, ...]
    rows: Rows = "text"


class PruningPlan(Record):
    """An ordered list of prune points, and whether the model gives guidance to another one."""

    name: str
    points: tuple[PrunePoint, ...] = ()
    guidance: Guidance | None = None

    @property
    def uses_guide(self) -> bool:
        """Whether the decoder graph reads the shape carrier ``guide``."""
        return self.guidance is not None or any(p.score == "attention" for p in self.points)

    @property
    def uses_priority(self) -> bool:
        """Whether the decoder graph has the input ``priority``."""
        return any(p.score == "priority" for p in self.points)

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
        if self.guidance:
            if not self.guidance.layers or len(set(self.guidance.layers)) < len(self.guidance.layers):
                raise UsageError(
                    f"plan {self.name}: guidance comes from layers {list(self.guidance.layers)}, but it is a sum over "
                    "at least one layer, each once; list them so"
                )
            if bad := [i for i in self.guidance.layers if not 0 <= i < layers]:
                raise UsageError(f"plan {self.name}: guidance layers {bad} do not exist; the model has {layers}")
            if self.points:
                raise UsageError(
                    f"plan {self.name}: guidance is collected over full rows, so a plan that gives "
                    "guidance cannot prune inside; split it over two exports"
                )
        return self


def layer_of(fraction: float, layers: int) -> int:
    """K = int(L·f), the SGL code's rounding (arXiv 2412.03324), of the decimal that was meant: 0.29·100 is 29."""
    if not 0 <= fraction < 1:
        raise UsageError(f"layer fraction {fraction} is outside [0, 1); give the share of the depth before the cut")
    return min(layers - 1, int(layers * fraction + 1e-9))


def average_retention(layers: int, layer: int, keep: float) -> float:
    """Average share of visual tokens over the layers: (K + (L−K)·r)/L (SGL, §4.1)."""
    return (layer + (layers - layer) * keep) / layers


def keep_for_retention(layers: int, layer: int, retention: float) -> float:
    """The r that gives an average retention, or UsageError where layers before K already exceed it."""
    keep = (retention * layers - layer) / (layers - layer)
    if not 0 < keep <= 1:
        raise UsageError(
            f"an average retention of {retention:g} cannot be had with a cut before layer {layer} of {layers}; "
            f"it lies between {layer / layers:.3g} and 1"
        )
    return keep


def kept_count(tokens: int, keep: float) -> int:
    """int(N·r) of N visual tokens, at least one (SGL's rounding; an empty image would not be one)."""
    if not 0 < keep <= 1:
        raise UsageError(f"keep is {keep:g}, but must lie in (0, 1]; give the share of visual tokens to keep")
    return max(1, int(tokens * keep + 1e-9)) if tokens else 0


def plan_none(role: Role, layers: int) -> PruningPlan:
    """Nothing is pruned and nothing is given; asked for by name, so it is not an error."""
    return PruningPlan(name="none")


def plan_sgl(role: Role, layers: int, **options: float) -> PruningPlan:
    """SGL: the small model gives guidance, the large one is cut before layer int(L·f) by it.

    Alone, a model is cut by its own attention of the layer before the cut. Options: ``fraction`` (f) and
    ``keep``, both 0.05 unless given; the small model is not cut, so it takes neither.
    """
    if role == "small":
        if options:
            raise UsageError(
                f"the small model of sgl is not pruned, so it takes no {' and no '.join(options)}; "
                "give that to the large model's export, or --role large"
            )
        return PruningPlan(name="sgl", guidance=Guidance(layers=tuple(range(layers))))
    (keep,) = checked_keep([options.get("keep", 0.05)])
    layer = layer_of(options.get("fraction", 0.05), layers)
    score: Score = "priority" if role == "large" else "attention"
    if role == "alone":
        layer = max(1, layer)
    return PruningPlan(name="sgl", points=(PrunePoint(layer=layer, score=score, keep=keep),))


POLICIES = {"none": plan_none, "sgl": plan_sgl}


def plan_of_policy(policy: str, role: Role, layers: int, **options: float) -> PruningPlan:
    """The named plan for a model of ``layers`` layers in this role; unknown names list the known ones."""
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}; known are {', '.join(sorted(POLICIES))}")
    if options and policy == "none":
        raise UsageError(f"policy none takes no {', '.join(options)}; leave them out or use --policy sgl")
    return POLICIES[policy](role, layers, **options).validated(layers)


def checked_keep(values: Sequence[float]) -> tuple[float, ...]:
    """Keep ratios as given, each in (0, 1]."""
    for value in values:
        kept_count(1, value)
    return tuple(values)
