"""What an export folder says about itself: ``spec.json``, the contract between exporter and engines.

Legend of symbolic dimensions in tensor shapes:
B batch (1), S rows of this chunk, S_i rows behind prune point i-1, P_j cached rows of segment j,
G guide rows, R rows with logits, V visual rows of all images, N images or tiles, T = P_0 + S,
m·V patches of all images (m = merge²), W attention windows, I images, K patches of the longest;
K_v tokens that the vision stage keeps, M merged ones, M_i and Q_i merged and recycled rows of prune point i-1.
C_j rows that a buffer of segment j holds, in a decoder that writes its cache in place.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from graphs.errors import BadArtefact
from graphs.plan import PrunePoint, PruningPlan, Record, Role

SPEC_FILE = "spec.json"
GOLDEN_FILE = "golden.safetensors"
PROCESSOR_FOLDER = "processor"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_HOLDERS = (
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)  # where it lies else, the first that has one
STAGES = ("vision", "embed", "decoder")

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
FloatType = Literal["float32", "float16", "bfloat16"]  # bfloat16: engines only, no export
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
# concat: present_* are new tensors, one chunk longer than past_*. in-place: past_* and present_* are one buffer of C_j
# rows, of which the first ``length_j`` are filled; the chunk's rows are written behind them.
CacheForm = Literal["concat", "in-place"]
Parser = Literal["current", "10.3"]  # of TensorRT, whose operators a file is lowered to


class TensorSpec(Record):
    """One graph input or output; a carrier's values are never read, only its length."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    carrier: bool = False


class StageSpec(Record):
    """One ONNX file and its interface, in the file's order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class LanguageModel(Record):
    """Sizes of the decoder that the runtime needs for caches and limits."""

    layers: Annotated[int, Field(ge=1, le=10_000)]
    width: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive
    max_positions: Positive
    # 3: position_ids are [3,1,S] (time, row, column of a visual token; Qwen's M-RoPE).
    position_axes: Literal[1, 3] = 1
    # How many of the first layers have visual features added behind them (Qwen3-VL).
    deepstack: Natural = 0


class VisualGrid(Record):
    """How an image becomes visual tokens; two models of a pair must agree in all of it.

    kind ``fixed``: an image is one tile of rows × columns tokens (LLaVA-1.5).
    ``tiles``: it is cut into such tiles, each rows × columns tokens (InternVL, Idefics3).
    ``anyres``: tiles on the best of ``pinpoints``, unpadded, a newline token per row (LLaVA-NeXT, OneVision).
    ``patches``: it keeps its own shape, in patches of ``patch`` pixels of which merge × merge make a token
    (Qwen); image size and rows × columns are 0 then, for every image has its own.
    """

    image_height: Natural
    image_width: Natural
    rows: Natural
    columns: Natural
    kind: Literal["fixed", "tiles", "anyres", "patches"] = "fixed"
    # anyres: allowed (height, width); above max_tiles · rows · columns tokens the map is shrunk, 0 never.
    pinpoints: tuple[tuple[Positive, Positive], ...] = ()
    max_tiles: Natural = 0
    # patches: pixels of a patch's side, frames of a patch, patches of a token's side.
    patch: Natural = 0
    frames: Natural = 0
    merge: Positive = 1
    # patches: side of an attention window in patches, 0 for none; side of the learned position table, 0 for none.
    window: Natural = 0
    position_side: Natural = 0

    @model_validator(mode="after")
    def _has_sizes(self) -> Self:
        tile = ("image_height", "image_width", "rows", "columns")
        needed = {"patches": ("patch", "frames"), "anyres": (*tile, "pinpoints")}.get(self.kind, tile)
        if lacking := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"{lacking[0]} is missing, but a grid of kind {self.kind} needs one")
        return self

    @property
    def tokens(self) -> int:
        """Visual tokens of one tile."""
        return self.rows * self.columns

    def most_windows(self, patches: int, images: int) -> int:
        """W at its largest, for ``patches`` of all images: a window at an edge is cut off; 1 where there are none."""
        return max(1, 4 * patches // self.window**2 + images) if self.window else 1

    @property
    def tokens_alike(self) -> bool:
        """Whether images are tiles of equally many tokens; else they are packed behind each other."""
        return self.kind in ("fixed", "tiles")


class Tokens(Record):
    """Token ids with a meaning for the runtime; ``image`` is also the placeholder's text."""

    image: int
    image_text: str
    eos: tuple[int, ...]
    pad: int | None = None


class WeightFile(Record):
    """One safetensors file that the stages' external tensors point into."""

    name: str
    bytes: Natural


class ExportSpec(Record):
    """The whole of ``spec.json``."""

    schema_id: Literal["saccade.spec/1"] = Field(default="saccade.spec/1", alias="schema")
    family: str
    architecture: str
    role: Role
    dtype: FloatType
    cache: CacheForm = "concat"
    plan: PruningPlan
    language: LanguageModel
    grid: VisualGrid
    tokens: Tokens
    stages: dict[str, StageSpec]
    weights: tuple[WeightFile, ...]
    weights_are: Literal["clone", "copy", "in-place", "converted"]
    tools: dict[str, str]

    model_config = {**Record.model_config, "populate_by_name": True}

    @model_validator(mode="after")
    def _has_every_stage(self) -> Self:
        if set(self.stages) != set(STAGES):
            raise ValueError(f"stages are {', '.join(self.stages) or 'none'}, but must be {', '.join(STAGES)}")
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as files."""
        return sum(weight.bytes for weight in self.weights)

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def budget_names(point: PrunePoint, i: int) -> tuple[str, ...]:
    """The decoder's inputs that say how many rows stay at prune point i; all carriers but pick_i."""
    if point.per_image:
        return (f"pick_{i}",)
    return (f"keep_{i}", f"merge_{i}", f"recycle_{i}") if point.merge else (f"keep_{i}",)


@cache
def past_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache inputs, each [B, Hkv, P_j, d]."""
    return f"past_k_{layer}", f"past_v_{layer}"


def visual_names(language: LanguageModel) -> tuple[str, ...]:
    """What the vision stage gives and embed takes, each [V,D]: the visual tokens, then their deepstack features."""
    return ("visual_embeds", *(f"visual_{name}" for name in deepstack_names(language)))


def deepstack_names(language: LanguageModel) -> tuple[str, ...]:
    """Features added behind the first layers, each [1,S,D], from embed to decoder; zeros on text rows."""
    return tuple(f"deepstack_{i}" for i in range(language.deepstack))


@cache
def present_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache outputs, each [B, Hkv, P_j + S_j, d], or the buffer where it is written in place."""
    return f"present_k_{layer}", f"present_v_{layer}"


LENGTH = "length_"


def length_name(segment: int) -> str:
    """The input that says how many rows of a segment's buffers are filled, int64 [1]; of decoders in place only.

    A segment without layers, in front of a point before layer 0, has none.
    """
    return f"{LENGTH}{segment}"


def form_of(inputs: Collection[str]) -> CacheForm:
    """The form of the cache of a decoder with these inputs; any other stage counts as ``concat``."""
    return "in-place" if any(name.startswith(LENGTH) for name in inputs) else "concat"


# What the visual rows received in earlier steps, fp32 [1, C_0]; of decoders in place that give guidance. Their output
# ``attention_received`` is this and what the chunk adds, zero for rows that are not filled.
RECEIVED_BEFORE = "received_before"


def spec_from_folder(folder: Path) -> ExportSpec:
    """Read ``spec.json`` of an export folder; BadArtefact where it is missing, broken or of another format."""
    path = Path(folder) / SPEC_FILE
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if (Path(folder) / "manifest.json").is_file() and not (Path(folder) / "config.json").is_file():
            raise BadArtefact(
                f"{folder} is a bundle, not an export; give the folder that saccade export wrote"
            ) from None
        raise BadArtefact(
            f"{folder} is not an export folder: {SPEC_FILE} is missing; make one with: saccade export CHECKPOINT -o DIR"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise BadArtefact(f"{path} cannot be read ({e}); export the checkpoint again") from None
    try:
        spec = ExportSpec.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        got = "" if first["type"] in ("missing", "value_error") else f", got {str(first['input'])[:60]!r}"
        what = first["msg"].removeprefix("Value error, ")
        raise BadArtefact(
            f"{path}: {where}: {what}{got} (this version reads saccade.spec/1); export the checkpoint again"
        ) from None
    if "schema_id" not in spec.model_fields_set:
        raise BadArtefact(
            f"{path} names no schema, so its format is unknown (this version reads saccade.spec/1); "
            "export the checkpoint again"
        )
    return spec
