"""safetensors files: where each weight of a checkpoint lies, no weight loaded; and new files, written as a stream.

A safetensors file is 8 bytes of header length (little-endian), the header (a JSON object: tensor name →
dtype, shape, data_offsets, beside an optional ``__metadata__``), then the tensors without a hole between
them (github.com/huggingface/safetensors, "Format"). Everything a header claims is checked against the
file before it is believed, for whoever reads the weights later reads by offset alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from graphs.errors import BadArtefact, OperationFailed

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOAD = "download the checkpoint again"
LONGEST_HEADER = 100_000_000  # the safetensors library's own limit

# safetensors' name of a dtype → ours (spec.json's) and its bytes
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
NAMES = {ours: (name, width) for name, (ours, width) in DTYPES.items()}


@dataclass(frozen=True)
class TensorSlice:
    """One tensor's place: ``length`` bytes at the absolute ``offset`` of ``file``; dtype as in spec.json."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header fits its bytes."""

    path: Path
    tensors: dict[str, TensorSlice]
    metadata: dict[str, str]
    bytes: int


def safetensors_file(path: Path, remedy: str = DOWNLOAD) -> SafetensorsFile:
    """Read and check the header of a safetensors file; BadArtefact says what does not hold, and the remedy."""
    try:
        return _checked(Path(path))
    except _Broken as broken:
        raise BadArtefact(f"{path} {broken}; {remedy}") from None


class _Broken(Exception):
    """Why a file is no whole safetensors file, as a sentence about it."""


def _checked(path: Path) -> SafetensorsFile:
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise _not_safetensors(f"it has {size} bytes, too few for a header")
            (length,) = struct.unpack("<Q", head)
            if length > LONGEST_HEADER:
                raise _not_safetensors(f"its first 8 bytes claim a header of {length} bytes")
            if 8 + length > size:
                raise _truncated(8 + length, size)
            text = f.read(length)
    except FileNotFoundError:
        raise _Broken("is missing") from None
    except OSError as e:
        raise BadArtefact(f"{path} cannot be read ({e.strerror}); check the file and its permissions") from None
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise _not_safetensors("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _not_safetensors("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _slice(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(tensors, start=8 + length, size=size)
    return SafetensorsFile(path, tensors, metadata if isinstance(metadata, dict) else {}, size)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; dtype as in spec.json. ``pieces`` makes its values, of that type and in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


def write_safetensors(
    path: Path, tensors: Sequence[NewTensor], *, header_bytes: int | None = None, align: int = 1
) -> dict[str, TensorSlice]:
    """Write a file a piece at a time, and return each tensor's place by its name.

    header_bytes: where the first tensor begins, for those who must know it before; None: as soon as it can, at a
    multiple of 8. align: each begins at a multiple of so many bytes behind that; what lies between is a tensor too.
    Errors: OperationFailed where the names do not fit into ``header_bytes``, and what ``pieces`` raises.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    spans, end = [], 0
    for i, tensor in enumerate(tensors):
        at = -(-end // align) * align
        if at > end:
            header[f"{i}.padding"] = {"dtype": "U8", "shape": [at - end], "data_offsets": [end, at]}
        name, width = NAMES[tensor.dtype]
        end = at + prod(tensor.shape) * width
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [at, end]}
        spans.append((at, end))
    text = json.dumps(header, separators=(",", ":")).encode()
    start = header_bytes or 8 + -(-len(text) // 8) * 8
    if 8 + len(text) > start:
        raise OperationFailed(f"{len(tensors)} weights are more than one file can name; report this")
    with path.open("wb") as out:
        written = out.write(struct.pack("<Q", start - 8) + text.ljust(start - 8))
        for tensor, (at, end) in zip(tensors, spans, strict=True):
            written += out.write(b"\0" * (start + at - written))
            for piece in tensor.pieces():
                written += out.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            assert written == start + end
    return {
        t.name: TensorSlice(path, t.dtype, t.shape, start + at, end - at)
        for t, (at, end) in zip(tensors, spans, strict=True)
    }


def index_of_checkpoint(folder: Path) -> dict[str, SafetensorsFile]:
    """Shard name → its file, for ``model.safetensors`` or the shards of its index; BadArtefact otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadArtefact(
            f"{folder} is not a folder; download the checkpoint (hf download NAME --local-dir DIR) and give DIR"
        )
    names = {SINGLE_FILE}
    if _is_sharded(folder):
        names = set(_weight_map(folder / INDEX_FILE).values())
    elif not (folder / SINGLE_FILE).exists():
        raise BadArtefact(_no_weights(folder))
    for name in sorted(names):
        if not (folder / name).is_file():
            raise BadArtefact(
                f"{folder}: shard {name} is missing, though {INDEX_FILE} names it; download the checkpoint again"
            )
    return {name: safetensors_file(folder / name) for name in sorted(names)}


def tensors_from_checkpoint(folder: Path) -> dict[str, TensorSlice]:
    """Tensor name → its place, over all shards of a checkpoint; BadArtefact where index and shards disagree."""
    folder = Path(folder)
    shards = index_of_checkpoint(folder)
    if not _is_sharded(folder):
        return dict(shards[SINGLE_FILE].tensors)
    tensors = {}
    for name, shard in _weight_map(folder / INDEX_FILE).items():
        if name not in shards[shard].tensors:
            raise BadArtefact(
                f"{folder / shard} holds no tensor {name}, though {INDEX_FILE} says so; download the checkpoint again"
            )
        tensors[name] = shards[shard].tensors[name]
    return tensors


def _is_sharded(folder: Path) -> bool:
    """Whether the index says where the weights lie; beside the single file it is not read, as transformers does."""
    return not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists()


def _slice(path: Path, name: str, entry: Any, start: int) -> TensorSlice:
    """One header entry, offsets made absolute; its dtype, shape and length must agree."""
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _not_safetensors(f"its entry {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise BadArtefact(
            f"{path}: tensor {name} has dtype {kind!r}, which is not supported; "
            f"save the checkpoint in one of {', '.join(DTYPES)}"
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise _not_safetensors(f"tensor {name} has a shape or an offset that is not a count")
    dtype, width = DTYPES[kind]
    if end - begin != prod(shape) * width:
        raise _not_safetensors(
            f"tensor {name} has {end - begin} bytes, but {kind} {list(shape)} takes {prod(shape) * width}"
        )
    return TensorSlice(path, dtype, shape, start + begin, end - begin)


def _check_layout(tensors: dict[str, TensorSlice], *, start: int, size: int) -> None:
    """Tensors follow one another without overlap or hole and end where the file does."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if tensor.offset != at:
            what = "overlaps the tensor before it" if tensor.offset < at else "leaves a hole before it"
            raise _not_safetensors(f"tensor {name} at byte {tensor.offset} {what} (expected {at})")
        at += tensor.length
    if at > size:
        raise _truncated(at, size)
    if at < size:
        raise _not_safetensors(f"the header describes {at} bytes, the file has {size}")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name → shard name, each shard a plain name inside the checkpoint's folder."""
    try:
        table = json.loads(path.read_text("utf-8"))["weight_map"]
        if not isinstance(table, dict) or not table:
            raise ValueError
    except OSError as e:
        raise BadArtefact(f"{path} cannot be read ({e.strerror}); check the file and its permissions") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadArtefact(f"{path} has no weight_map, so it is not an index; download the checkpoint again") from None
    for name, shard in table.items():
        if not isinstance(shard, str) or shard != PurePosixPath(shard).name or "\\" in shard or shard in ("", ".."):
            raise BadArtefact(
                f"{path}: tensor {name} points to {shard!r}, outside the folder; do not use this checkpoint"
            )
    return table


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickled:
        return (
            f"{folder} has {pickled[0]} but no safetensors, and pickled weights are not read; convert them with "
            "transformers: from_pretrained(…).save_pretrained(NEW), then export NEW"
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give the folder of a Hugging Face checkpoint"


def _not_safetensors(why: str) -> _Broken:
    return _Broken(f"is not a safetensors file: {why}")


def _truncated(wanted: int, got: int) -> _Broken:
    return _Broken(f"is truncated: its header says {wanted} bytes, the file has {got}")
