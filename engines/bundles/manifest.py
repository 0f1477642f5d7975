"""What a bundle says about itself: ``manifest.json``.

Everything ``show`` prints stands here, and every file of the bundle with its size and digest. The
manifest carries a digest of itself, so that an edited threshold is noticed like an edited weight.
This guards against damage and accidents; who can write the whole folder can also write the digests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from engines.calibration.record import Calibration
from graphs.errors import BadArtefact
from graphs.files import unreadable
from graphs.plan import PruningPlan, Record, Role
from graphs.spec import SPEC_FILE, LanguageModel, Parser, StageSpec, VisualGrid

MANIFEST_FILE = "manifest.json"
FORMAT = 1
SCHEMA = f"saccade.bundle/{FORMAT}"
REBUILD = "build it again with: saccade build"

Served = Literal["kernel", "body"]
Hardware = Literal["none", "same-cc", "ampere-plus"]
Plugins = Literal["none", "python", "aot"]


class FileEntry(Record):
    """One file of the bundle; ``path`` is relative, with forward slashes.

    pieces: of a file longer than ``graphs.files.PIECE``, the digests of its pieces, so that cores can share it.
    """

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    pieces: tuple[str, ...] = ()


class Compatibility(Record):
    """What an engine of full TensorRT runs on beyond the place of its build.

    hardware: none and same-cc: GPUs of its SM (none: TensorRT warns where the model of the GPU is another);
    ampere-plus: SM 8.0 and newer. versions: newer TensorRTs too, by a runtime that the engine brings.
    """

    hardware: Hardware = "none"
    versions: bool = False


class EngineEntry(Record):
    """One TensorRT engine of a model: what it was built with and for.

    sms: compute capabilities, as 89. profiles: profile → input → its least, best served and largest shape, in the
    engine's order. served: node of ours → what the parsed network serves it with. plugins: what the kernels are in it;
    ``python`` needs our plugins at run, ``aot`` nothing. parser: whose operators the file was lowered to. platform: the
    system it was built on, as ``Linux x86_64``; '' in bundles of before.
    """

    file: str
    target: str
    tensorrt: str
    sms: tuple[int, ...]
    precision: str
    profiles: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]]
    served: dict[str, Served]
    bytes: int
    weight_bytes: int
    compatibility: Compatibility = Compatibility()
    plugins: Plugins = "none"
    parser: Parser = "current"
    platform: str = ""


@dataclass(frozen=True)
class EngineFile:
    """What a session must know of an engine's file from the manifest.

    sha256: the digest of the bytes that it may deserialise. plugins, versions: as in ``EngineEntry``.
    """

    sha256: str
    plugins: Plugins
    versions: bool


class Footprint(Record):
    """What a model takes on a target while it runs, in bytes: estimates, made at the build.

    rows: length of the caches that are counted, and images: what the vision stage sees at once; the engines' bounds, or
    for graphs those that engines have by default. cache_bytes: all layers, a step's old and new caches both, without
    what pruning saves. activation_bytes: stage → the most that lives at once between its nodes.
    """

    rows: int
    images: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: dict[str, int]

    @property
    def total(self) -> int:
        """The sum in bytes; the stages' activations are added up, for runtimes keep what they once took."""
        return self.weight_bytes + self.cache_bytes + sum(self.activation_bytes.values())


class Loss(Record):
    """How far one golden output is from its reference in a narrower precision.

    max_error, mean_error: of |got − wanted|, as a share of the largest wanted magnitude. top1: share of logit rows
    whose first token is the same. overlap: for kept rows, the share in common.
    """

    stage: str
    case: str
    tensor: str
    max_error: float = 0.0
    mean_error: float = 0.0
    top1: float | None = None
    overlap: float | None = None


class TargetEntry(Record):
    """One model on one target.

    spec: its spec.json and stages[…].file: its stages, both below the model's folder; targets that run graphs share
    them. ops: for each op of the plan whether a kernel or the body serves it. precision: of packed stages (fp32, int8,
    int4; bf16 where their weights are in fp32 and it computes in bf16) or of engines (int8, int4), with what quantising
    costs; '' where all is in dtype.
    """

    spec: str
    dtype: str
    stages: dict[str, StageSpec]
    ops: dict[str, Served]
    weight_bytes: int
    engines: dict[str, EngineEntry] = {}
    precision: str = ""
    losses: tuple[Loss, ...] = ()
    footprint: Footprint

    @property
    def computed_in(self) -> str:
        """How its numbers are held and multiplied: the precision of packed stages, else the float type."""
        return self.precision or self.dtype


class MemberEntry(Record):
    """One model of the bundle, and what it is on each target."""

    folder: str
    family: str
    architecture: str
    role: Role
    plan: PruningPlan
    language: LanguageModel
    grid: VisualGrid
    targets: dict[str, TargetEntry]


class Manifest(Record):
    """The whole of ``manifest.json``."""

    schema_id: Literal["saccade.bundle/1"] = Field("saccade.bundle/1", alias="schema")
    created_by: str
    tools: dict[str, str]
    targets: tuple[str, ...] = Field(min_length=1)
    threshold: float = Field(ge=0, le=1)
    members: dict[Literal["small", "large", "alone"], MemberEntry]
    files: tuple[FileEntry, ...]
    calibrations: tuple[Calibration, ...] = ()
    sha256: str = ""

    model_config = {**Record.model_config, "populate_by_name": True}

    def signed(self) -> Manifest:
        """The same manifest with the digest of its own content filled in."""
        return self.model_copy(update={"sha256": digest_of(self.model_dump(mode="json", by_alias=True))})

    @property
    def models_sha256(self) -> str:
        """A digest of all but the calibrations, which change no answer of a model."""
        return digest_of(self.model_copy(update={"calibrations": ()}).model_dump(mode="json", by_alias=True))

    def engines(self, target: str) -> list[EngineEntry]:
        """The engines of all models for a target; none for one that runs graphs."""
        return [engine for member in self.members.values() for engine in member.targets[target].engines.values()]

    def engine_files(self, member: str, target: str) -> dict[str, EngineFile]:
        """Engine file, relative to the model's folder → what its session must know; none for targets of graphs."""
        digests, entry = {file.path: file.sha256 for file in self.files}, self.members[member]  # type: ignore[index]
        return {
            engine.file: EngineFile(
                digests.get(f"{entry.folder}/{engine.file}", ""), engine.plugins, engine.compatibility.versions
            )
            for engine in entry.targets[target].engines.values()
        }

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own digest."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_of(bundle: Path) -> Manifest:
    """Read and check a bundle's manifest; BadArtefact says what does not hold and what mends it."""
    path = bundle / MANIFEST_FILE
    if not bundle.is_dir():
        what = "is a file" if bundle.exists() else "does not exist"
        if bundle.suffix == ".saccade" and bundle.is_file():
            raise BadArtefact(f"{bundle} is a packed bundle; unpack it first: saccade unpack {bundle} -o BUNDLE")
        raise BadArtefact(f"bundle {bundle} {what}; give the folder that saccade build wrote")
    if not path.exists():
        if (bundle / SPEC_FILE).is_file():
            raise BadArtefact(f"{bundle} is an export, not a bundle; make one with: saccade build {bundle} -o BUNDLE")
        raise BadArtefact(f"{bundle} is not a bundle: {MANIFEST_FILE} is missing; {REBUILD} SMALL LARGE -o {bundle}")
    try:
        return manifest_from(path.read_bytes(), path)
    except OSError as e:
        raise unreadable(path, e, REBUILD) from None


def manifest_from(text: bytes, path: Path) -> Manifest:
    """Check a manifest's content; ``path`` is how messages call it."""
    try:
        document = json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise BadArtefact(f"{path} is not JSON, so it is damaged or truncated; {REBUILD}") from None
    _check_format(path, document)
    if digest_of(document) != document.get("sha256"):
        raise BadArtefact(f"{path} was changed after it was written (its digest does not match); {REBUILD}")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise BadArtefact(f"{path}: {where}: {first['msg']}; {REBUILD}") from None
    for name, member in manifest.members.items():
        if set(member.targets) != set(manifest.targets):
            raise BadArtefact(f"{path}: model {name} does not have the bundle's targets; {REBUILD}")
    return manifest


def _check_format(path: Path, document: Any) -> None:
    """Which format the file is in is told before anything else of it is believed."""
    schema = document.get("schema") if isinstance(document, dict) else None
    name, _, version = str(schema).partition("/")
    if name != "saccade.bundle" or not (version.isdecimal() and len(version) < 10):
        raise BadArtefact(
            f"{path} is not a manifest of a bundle (schema {str(schema)[:40]!r}, wanted {SCHEMA!r}); {REBUILD}"
        )
    if int(version) > FORMAT:
        maker = document.get("created_by", "a newer saccade")
        raise BadArtefact(
            f"{path.parent} is of bundle format {version}, written by {maker}, and this saccade reads up to "
            f"{FORMAT}; upgrade saccade to that version, or {REBUILD}"
        )
