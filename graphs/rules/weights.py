"""G4xx: every weight lies once, in a weight file of the export, where any reader finds and accepts it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from graphs.files import path_inside
from graphs.rules.rule import Export, Report, Stage, export_rule, stage_rule
from graphs.rules.tensors import HEAD, Constant, constants_of, dtype_of, lists_of

EMBEDDED_LIMIT = (
    64 * 1024
)  # what a tracer computes (int64 positions of a tower, frequencies) is smaller; a weight is larger
SAME_FROM = 256  # smaller constants may well be equal by what they mean
PIECE = 1 << 22
EXPONENTS = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000), 8: (np.uint64, 0x7FF0000000000000)}
AGAIN = "export the checkpoint again"
NO_PLACE = "it leaves the export's folder, is a symbolic link or cannot be the name of a file"


@stage_rule("G401", "path escapes", "do not use this export, or export the checkpoint again")
def path_escapes(stage: Stage) -> Report:
    """External data lies in the export's folder or below, reached by no link, no ``..`` and no absolute path."""
    for location in sorted({c.location for c in constants_of(stage) if c.location is not None}):
        path = path_inside(stage.folder, location)
        if path is None:
            yield repr(location), NO_PLACE
        elif path.is_file() and path.stat().st_nlink > 1:
            yield repr(location), "it is a hard link, which onnx's loaders refuse"


@stage_rule("G402", "outside its file", AGAIN)
def outside_its_file(stage: Stage) -> Report:
    """A weight's range lies within its file and is as long as dtype and shape say; so are values in the .onnx."""
    for constant in constants_of(stage):
        if any(size < 0 for size in constant.tensor.dims):
            yield constant.name, f"its shape is {list(constant.tensor.dims)}, which no tensor has"
            continue
        if constant.location is None and not constant.is_readable:
            yield constant.name, f"its values in the .onnx are not the {constant.wanted_bytes} bytes its shape takes"
        if constant.location is None or constant.path is None:
            continue
        if not constant.path.is_file():
            yield constant.name, f"{constant.location} is missing"
            continue
        end, size = constant.offset + constant.length, constant.path.stat().st_size
        if end > size:
            yield constant.name, f"it ends at byte {end} of {constant.location}, which has {size}"
        elif constant.length != constant.wanted_bytes:
            yield constant.name, f"it is given {constant.length} bytes, its shape takes {constant.wanted_bytes}"


@export_rule("G403", "weight files differ", AGAIN)
def weight_files_differ(export: Export) -> Report:
    """The files that the graphs point into are those spec.json lists, with the size it gives."""
    used = {c.location for s in export.stages.values() for c in constants_of(s) if c.location is not None}
    listed = {weight.name: weight.bytes for weight in export.spec.weights}
    for location in sorted(used - set(listed)):
        yield repr(location), "graphs point into it, but spec.json does not list it"
    for name, wanted in listed.items():
        path = path_inside(export.folder, name)
        if path is None:
            yield repr(name), f"spec.json lists it, but {NO_PLACE}"
        elif not path.is_file():
            yield name, "spec.json lists it, but it is missing"
        elif (found := path.stat().st_size) != wanted:
            yield name, f"it has {found} bytes, in spec.json {wanted}"


@stage_rule("G404", "weight in the graph", "bind it to the weight file as external data")
def weight_in_the_graph(stage: Stage) -> Report:
    """No constant of more than 64 KiB lies in the .onnx itself."""
    for constant in constants_of(stage):
        if constant.location is None and constant.length > EMBEDDED_LIMIT:
            yield constant.name, f"{constant.length} bytes lie in the .onnx"
    for where, size in lists_of(stage):
        if size > EMBEDDED_LIMIT:
            yield where, f"{size} bytes lie in the .onnx"


@export_rule("G405", "weight stored twice", "point both at one place; switch the folding of weight transposes off")
def weight_stored_twice(export: Export) -> Report:
    """No two matrices of one export have the same bytes in two places, and no graph reads one place twice."""
    matrices = [c for s in export.stages.values() for c in constants_of(s) if _is_matrix(c)]
    by_place: dict[tuple[object, ...], list[Constant]] = defaultdict(list)
    for constant in matrices:
        by_place[constant.place].append(constant)
    for sharing in by_place.values():
        for one, other in _pairs_in_one_stage(sharing):
            yield other.where, f"the same place as {one.name}, so a runtime loads it twice"
    for one, other in _equal([sharing[0] for sharing in by_place.values()]):
        yield other.where, f"the same {one.length} bytes as {one.where}"


@stage_rule("G406", "not finite", "look for the damage in the checkpoint, then export it again")
def not_finite(stage: Stage) -> Report:
    """No weight holds NaN or infinity, and none is empty."""
    for constant in constants_of(stage):
        if constant.location is None or not constant.is_readable:
            continue
        if constant.length == 0:
            yield constant.name, f"it is empty (shape {list(constant.tensor.dims)})"
        elif bad := _count_not_finite(constant):
            yield constant.name, f"{bad} values are NaN or infinite"


def _is_matrix(constant: Constant) -> bool:
    return len(constant.tensor.dims) > 1 and constant.length >= SAME_FROM and constant.is_readable


def _pairs_in_one_stage(sharing: list[Constant]) -> list[tuple[Constant, Constant]]:
    first: dict[str, Constant] = {}
    pairs = []
    for constant in sharing:
        if constant.stage.name in first:
            pairs.append((first[constant.stage.name], constant))
        first.setdefault(constant.stage.name, constant)
    return pairs


def _equal(constants: list[Constant]) -> list[tuple[Constant, Constant]]:
    """Pairs of equal bytes; whole weights are read only where the first 4 KiB agree and vary."""
    alike: dict[tuple[int, str], list[Constant]] = defaultdict(list)
    for constant in constants:
        head = constant.bytes(HEAD)
        if (head.reshape(-1, 4) != head[:4]).any() if head.size % 4 == 0 else True:
            alike[constant.length, constant.digest(HEAD)].append(constant)
    pairs = []
    for group in alike.values():
        first: dict[str, Constant] = {}
        for constant in group if len(group) > 1 else ():
            digest = constant.digest()
            if digest in first:
                pairs.append((first[digest], constant))
            first.setdefault(digest, constant)
    return pairs


def _count_not_finite(constant: Constant) -> int:
    """How many values of a float weight have all exponent bits set; read in pieces."""
    dtype = dtype_of(constant.tensor)
    if dtype is None or dtype.kind != "f" or constant.length % dtype.itemsize:
        return 0
    word, exponent = EXPONENTS[dtype.itemsize]
    data = constant.bytes()
    step = PIECE * dtype.itemsize
    pieces = (data[at : at + step].view(word) for at in range(0, data.size, step))
    return sum(int(((piece & word(exponent)) == exponent).sum()) for piece in pieces)
