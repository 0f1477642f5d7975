"""A pruning plan as a file: TOML, with layers absolute or as a share of the depth, until a model fits it.

schema = "saccade.plan/1"
name = "mine"

[[point]]
where = "vision"        # or a layer: 2, or 0.25 of the depth
score = "received"
keep = 0.5              # of the original visual tokens; or: count = 64

[[point]]
where = 0.25
score = "attention"
rows = "text"
keep = 0.05
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StrictFloat, StrictInt, ValidationError

from graphs.errors import UsageError
from graphs.files import unreadable
from graphs.plan import (
    BY_ATTENTION,
    Guidance,
    PrunePoint,
    PruningPlan,
    Record,
    Rows,
    Score,
    VisionPoint,
    VisionScore,
    layer_of,
)

SCHEMA: Literal["saccade.plan/1"] = "saccade.plan/1"
Layer = Annotated[StrictInt, Field(ge=0)]
Share = Annotated[StrictFloat, Field(ge=0, lt=1)]
DECODER_ONLY = ("rows", "recycle")


class PointDocument(Record):
    """One prune point of a file; the fields are those of PrunePoint and VisionPoint."""

    where: Literal["vision"] | Layer | Share
    score: Score | VisionScore
    rows: Rows = "text"
    keep: float | None = Field(default=None, gt=0, le=1)
    count: Annotated[StrictInt, Field(ge=1)] | None = None
    per_image: bool = False
    merge: float = Field(default=0.0, ge=0, lt=1)
    recycle: float = Field(default=0.3, gt=0, le=1)
    seed: int = Field(default=0, ge=0)


class GuidanceDocument(Record):
    """The guidance of a file; layers are named, or all of them."""

    layers: Literal["all"] | tuple[Layer, ...] = "all"
    rows: Rows = "text"


class PlanDocument(Record):
    """A whole plan file."""

    schema_id: Literal["saccade.plan/1"] = Field(default=SCHEMA, alias="schema")
    name: str = Field(min_length=1)
    allow_nothing: bool = False
    point: tuple[PointDocument, ...] = ()
    guidance: GuidanceDocument | None = None

    model_config = {**Record.model_config, "populate_by_name": True}

    def resolved(self, layers: int, *, refuse_nothing: bool = True) -> PruningPlan:
        """Fit the plan to a model of ``layers`` layers: shares of the depth become layers.

        Raises UsageError naming the first thing that cannot be: order, ranges, layers that do not exist, a score
        at the wrong place, a plan that prunes nothing unless ``allow_nothing`` says so.
        """
        vision = [i for i, p in enumerate(self.point) if p.where == "vision"]
        if vision not in ([], [0]):
            raise UsageError(
                f"plan {self.name}: point {vision[-1]} is at the vision stage, which comes once and before every "
                "layer; put one such point first"
            )
        plan = PruningPlan(
            name=self.name,
            vision=self._vision_point(self.point[0]) if vision else None,
            points=tuple(self._prune_point(i, p, layers) for i, p in enumerate(self.point) if p.where != "vision"),
            guidance=self._guidance(layers),
            allow_nothing=self.allow_nothing,
        ).validated(layers)
        if refuse_nothing and not (plan.prunes or plan.guidance or plan.allow_nothing):
            raise UsageError(
                f"plan {self.name} prunes nothing; give a point that keeps less than all, or say allow_nothing = true"
            )
        return plan

    def dumps(self) -> str:
        """The file's text; what is a default is left out."""
        document = self.model_dump(mode="python", by_alias=True, exclude_defaults=True)
        lines = [f'schema = "{SCHEMA}"', *_entries({k: v for k, v in document.items() if k != "schema"})]
        for point in self.point:
            lines += ["", "[[point]]", *_entries(point.model_dump(exclude_defaults=True))]
        if self.guidance:
            lines += ["", "[guidance]", *_entries(self.guidance.model_dump())]
        return "\n".join(lines) + "\n"

    def _vision_point(self, p: PointDocument) -> VisionPoint:
        self._refuse_fields(0, p, DECODER_ONLY, "at the vision stage")
        self._refuse_fields(0, p, ("seed",) * (p.score != "random"), f"of score {p.score!r}")
        if p.score not in get_args(VisionScore):
            raise UsageError(
                f"plan {self.name}: point 0 is at the vision stage, where there is no score {p.score!r}; "
                f"known are {', '.join(get_args(VisionScore))}"
            )
        return VisionPoint(
            score=p.score,  # type: ignore[arg-type]
            per_image=p.per_image,
            merge=p.merge,
            seed=p.seed,
            **self._budget(0, p),
        )

    def _prune_point(self, i: int, p: PointDocument, layers: int) -> PrunePoint:
        if p.score not in get_args(Score):
            raise UsageError(
                f"plan {self.name}: point {i} is before a decoder layer, where there is no score {p.score!r}; "
                f"known are {', '.join(get_args(Score))}"
            )
        self._refuse_fields(i, p, ("rows",) * (p.score not in BY_ATTENTION), f"of score {p.score!r}")
        self._refuse_fields(i, p, ("seed",) * (p.score != "random"), f"of score {p.score!r}")
        assert not isinstance(p.where, str)
        layer = p.where
        if isinstance(layer, float):
            layer = layer_of(layer, layers)
            layer = max(1, layer) if p.score == "attention" else layer
        if p.recycle != PointDocument.model_fields["recycle"].default and not p.merge:
            raise UsageError(
                f"plan {self.name}: point {i} recycles but merges nothing; give merge, or leave recycle out"
            )
        return PrunePoint(
            layer=layer,
            score=p.score,  # type: ignore[arg-type]
            rows=p.rows,
            seed=p.seed,
            per_image=p.per_image,
            merge=p.merge,
            recycle=p.recycle,
            **self._budget(i, p),
        )

    def _budget(self, i: int, p: PointDocument) -> dict[str, Any]:
        if (p.keep is None) == (p.count is None):
            raise UsageError(
                f"plan {self.name}: point {i} needs keep (a share of the original tokens) or count; give one of them"
            )
        return {"keep": p.keep} if p.count is None else {"count": p.count}

    def _refuse_fields(self, i: int, p: PointDocument, names: tuple[str, ...], place: str) -> None:
        for name in names:
            if getattr(p, name) != PointDocument.model_fields[name].default:
                raise UsageError(f"plan {self.name}: point {i} is {place}, and has no {name}; leave it out")

    def _guidance(self, layers: int) -> Guidance | None:
        if not self.guidance:
            return None
        named = self.guidance.layers
        return Guidance(layers=tuple(range(layers)) if named == "all" else named, rows=self.guidance.rows)


def document_of(plan: PruningPlan, name: str, keep: Sequence[float], layer: int | None = None) -> PlanDocument:
    """Return the document of a fitted plan under another name and with other shares.

    keep: one per prune point, the vision stage's first. layer: of the only point in the decoder, None for the plan's.
    """
    points = []
    for budget, share in zip(plan.budgets, keep, strict=True):
        own = budget.model_dump(exclude={"layer", "keep", "count", "tower_layers"})
        where = (budget.layer if layer is None else layer) if isinstance(budget, PrunePoint) else "vision"
        points.append(PointDocument(where=where, keep=share, **own))  # type: ignore[arg-type]
    given = plan.guidance
    guidance = GuidanceDocument(layers=given.layers, rows=given.rows) if given else None
    return PlanDocument(name=name, point=tuple(points), guidance=guidance, allow_nothing=all(s == 1 for s in keep))


def plan_from_toml(text: str, where: str = "the plan") -> PlanDocument:
    """Read a plan file's text; UsageError names the line or the field that is wrong, and what is known there."""
    try:
        entries = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{where} nests too deep to be read as TOML; write it flat") from None
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"{where} is not TOML: {e}; correct that line") from None
    if "schema" not in entries:
        raise UsageError(f'{where} names no schema; begin it with: schema = "{SCHEMA}"')
    try:
        return PlanDocument.model_validate(entries)
    except ValidationError as e:
        raise UsageError(f"{where}: {_first(e)}") from None


def plan_from_file(path: Path) -> PlanDocument:
    """Read a plan file."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as e:
        raise unreadable(Path(path), e, "give a plan file (TOML)") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; give a plan file (TOML)") from None
    return plan_from_toml(text, str(path))


def _first(error: ValidationError) -> str:
    """The first complaint as a sentence; of a field with several kinds, those of the kind that was given."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if isinstance(part, int) or part in FIELDS]
    name = ".".join(map(str, place)) or "schema"
    if first["type"] == "extra_forbidden":
        table = TABLES.get(str(first["loc"][0]), PlanDocument)
        known = sorted(field.alias or key for key, field in table.model_fields.items())
        return f"there is no {'.'.join(map(str, first['loc']))}; known are {', '.join(known)}"
    said = "missing" if first["type"] == "missing" else repr(first["input"])
    if place and place[-1] in WANTED:
        return f"{name} is {said}; {WANTED[place[-1]]}"
    if first["type"] == "missing":
        return f"{name} is missing; add it"
    return f"{name}: {first['msg']}, got {str(first['input'])[:60]!r}"


TABLES: dict[str, type[Record]] = {"point": PointDocument, "guidance": GuidanceDocument}
WANTED = {
    "where": 'give "vision", a layer (2) or a share of the depth below 1 (0.25)',
    "score": f"known are {', '.join(sorted({*get_args(Score), *get_args(VisionScore)}))}",
    "layers": 'give "all", or layers ([0, 1])',
}
FIELDS = {*PointDocument.model_fields, *PlanDocument.model_fields, "layers", "schema"} - {"schema_id"}


def _entries(values: Mapping[str, Any]) -> list[str]:
    """``key = value`` of every plain value, as TOML writes it."""
    return [
        f"{key} = {_value(value)}"
        for key, value in values.items()
        if key not in ("point", "guidance") and value is not None
    ]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
