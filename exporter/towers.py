"""Whether a family's vision tower serves a policy that looks into it, and what a runtime has to know of it."""

from __future__ import annotations

from typing import Any

from exporter.family import Family
from exporter.looking import MergingTower
from graphs.errors import UsageError
from graphs.families import refusal
from graphs.plan import MERGING, PruningPlan, VisionPoint


def check_tower(family: Family, model: Any, point: VisionPoint) -> None:
    """UsageError where this family, or this checkpoint's tower, has not what the point's score looks at."""
    if reason := refusal(family.name, point.score):
        raise UsageError(f"score {point.score!r} does not work with {family.name}: {reason}; use score 'received'")
    tower = getattr(model.model, "vision_tower", None)
    wants_class = point.score == "cls" or (point.score in MERGING and family.name == "llava")
    if wants_class and not _has_class(tower):
        raise UsageError(
            f"score {point.score!r} needs a vision tower with a class token, and {type(tower).__name__} has none; "
            "use score 'received'"
        )


def merging_tower(family: Family, model: Any) -> MergingTower:
    """The tower of a family that merges inside; ``check_tower`` has passed it."""
    assert family.merging
    return family.merging(model)


def with_tower(plan: PruningPlan, model: Any, family: Family) -> PruningPlan:
    """The plan with what a runtime has to know of the tower; UsageError where this family's tower does not serve."""
    if not plan.vision:
        return plan
    check_tower(family, model, plan.vision)
    if plan.vision.score != "tome":
        return plan
    layers = len(merging_tower(family, model).layers)
    return plan.model_copy(update={"vision": plan.vision.model_copy(update={"tower_layers": layers})})


def _has_class(tower: Any) -> bool:
    embeddings = getattr(tower, "embeddings", None)
    return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")
