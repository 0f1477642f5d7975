"""From the names of stored tensors to a model's parameters, and which of them are one weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphs.console import say
from graphs.errors import BadArtefact
from graphs.rules.tensors import HEAD
from graphs.rules.weights import SAME_FROM
from graphs.weights import TensorSlice

CHUNK = 1 << 24  # bytes that are compared at a time


def stored_parameters(model: Any, tensors: Mapping[str, TensorSlice], folder: object) -> dict[str, TensorSlice]:
    """Parameter name → its place, through transformers' own renamings; BadArtefact for a layout that is converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    by_name: dict[str, TensorSlice] = {}
    for key, where in tensors.items():
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise BadArtefact(
                f"{folder}: tensor {key} is stored in a layout that transformers converts at load; "
                "load and save the checkpoint once with transformers, then export that"
            )
        by_name[name] = where
    return by_name


def tie_as_stored(model: Any, tensors: Mapping[str, TensorSlice], folder: object) -> None:
    """Tie what the configuration ties, but no two weights that are stored and differ, as ``from_pretrained`` does.

    The configuration is then wrong, which is said: InternVL's published ``-hf`` ones lack ``tie_word_embeddings``, and
    the class has it true by default.
    """
    model.tie_weights()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = stored_parameters(model, tensors, folder) if tied else {}
    for target, source in list(tied.items()):
        if target in stored and source in stored and not _equal(stored[target], stored[source]):
            parent, _, name = target.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, name, torch.nn.Parameter(torch.empty_like(getattr(module, name)), requires_grad=False))
            del tied[target]
            say(f"{folder}: config.json ties {target} to {source}, but both are stored and differ: they are not tied")


def once_each(slices: Mapping[str, TensorSlice]) -> dict[str, TensorSlice]:
    """The same names, matrices that are stored twice at the first one's place: graph rule G405.

    Of those whose first 4 KiB are one number, no byte more is read.
    """
    alike: dict[tuple[str, tuple[int, ...], bytes], list[TensorSlice]] = {}
    placed = dict(slices)
    for name, where in slices.items():
        if len(where.shape) < 2 or where.length < SAME_FROM:
            continue
        with where.file.open("rb") as f:
            f.seek(where.offset)
            head = f.read(min(HEAD, where.length))
        if head == head[:4] * (len(head) // 4):
            continue
        seen = alike.setdefault((where.dtype, where.shape, head), [])
        twin = next((other for other in seen if _equal(other, where)), None)
        if twin is None:
            seen.append(where)
        else:
            placed[name] = twin
    return placed


def _equal(one: TensorSlice, other: TensorSlice) -> bool:
    """Whether two tensors hold the same bytes; of a few, most differ in the first."""
    if (one.dtype, one.shape, one.length) != (other.dtype, other.shape, other.length):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for done in range(0, one.length, CHUNK):
            size = min(CHUNK, one.length - done)
            if first.read(size) != second.read(size):
                return False
    return True
