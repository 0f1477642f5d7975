"""A Hugging Face checkpoint in a local folder: its configuration, its family, where its weights lie.

No weight is read here. The model is a skeleton: real modules and buffers over parameters of
uninitialised memory that is never touched, so a model of any size costs only its address space.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter import attention, norm
from exporter.decoders import make_static, positions_of, refuse_unknown
from exporter.families import FAMILIES
from exporter.family import Family, family_of
from exporter.parameters import stored_parameters, tie_as_stored
from graphs.errors import BadArtefact
from graphs.files import unreadable
from graphs.spec import LanguageModel
from graphs.weights import TensorSlice, tensors_from_checkpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """config: the transformers configuration; tensors: by their names in the files."""

    folder: Path
    config: Any
    family: Family
    tensors: dict[str, TensorSlice]

    @property
    def text(self) -> Any:
        """The configuration of the language model."""
        return self.config.get_text_config()


def checkpoint_from_folder(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and headers; BadArtefact says what is missing, broken or unknown."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadArtefact(
            f"{folder} is not a folder; download the checkpoint (hf download NAME --local-dir DIR) and give DIR"
        )
    path = folder / "config.json"
    try:
        architectures = json.loads(path.read_text("utf-8")).get("architectures") or []
    except OSError as e:
        raise unreadable(path, e, "give the folder of a Hugging Face checkpoint") from None
    except (ValueError, AttributeError, RecursionError):
        raise BadArtefact(
            f"{path} is not a JSON object in UTF-8 without a byte order mark; download the checkpoint again"
        ) from None
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise BadArtefact(f"{path}: architectures is {architectures!r}, but must be a list of names; download it again")
    family = family_of(architectures, FAMILIES)
    tensors = tensors_from_checkpoint(folder)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise BadArtefact(f"{path} does not describe {family.architecture}: {e}; download it again") from None
    of_text = getattr(config.get_text_config(), "quantization_config", None)
    if how := getattr(config, "quantization_config", None) or of_text:
        method = how.get("quant_method", "") if isinstance(how, dict) else getattr(how, "quant_method", "")
        raise BadArtefact(
            f"{folder} is quantised ({getattr(method, 'value', method) or 'by a method without a name'}); quantised "
            f"checkpoints are not exported, give one in {', '.join(DTYPES)}"
        )
    wanted = family.model_class().config_class
    if not isinstance(config, wanted):
        raise BadArtefact(
            f"{path} contradicts itself: {family.architecture} wants {wanted.__name__}, its model_type gives "
            f"{type(config).__name__}; download the checkpoint again"
        )
    layers = config.get_text_config().num_hidden_layers
    if not 1 <= layers <= max(len(tensors), 1000):
        raise BadArtefact(
            f"{path}: num_hidden_layers is {layers}, but the files hold {len(tensors)} tensors; download the "
            "checkpoint again"
        )
    return Checkpoint(folder, config, family, tensors)


def language_of(checkpoint: Checkpoint) -> LanguageModel:
    """The decoder's sizes."""
    text = checkpoint.text
    heads = text.num_attention_heads
    refuse_unknown(text, checkpoint.folder)
    return LanguageModel(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_positions=positions_of(text, checkpoint.folder),
        position_axes=checkpoint.family.position_axes,
        deepstack=checkpoint.family.deepstack(checkpoint.config),
    )


def skeleton_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model's modules in eval mode, parameters uninitialised, the decoder's attention ours."""
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model = checkpoint.family.model_class()._from_config(checkpoint.config, dtype=dtype)
    except Exception as e:
        raise BadArtefact(
            f"{checkpoint.folder / 'config.json'} describes a {checkpoint.family.architecture} that cannot be "
            f"built ({e}); download the checkpoint again"
        ) from None
    tie_as_stored(model, checkpoint.tensors, checkpoint.folder)
    language = checkpoint.family.language(model)
    language.config._attn_implementation = attention.register()
    make_static(language.rotary_emb, checkpoint.folder)
    norm.use_one_op(model)
    checkpoint.family.prepare(model)
    return model.eval().requires_grad_(False)


def slices_of_parameters(model: Any, checkpoint: Checkpoint) -> dict[str, TensorSlice]:
    """Parameter name in ``model`` → its place in the checkpoint, through transformers' own renamings.

    BadArtefact names a parameter that no tensor fills, or whose shape differs.
    """
    by_name = stored_parameters(model, checkpoint.tensors, checkpoint.folder)
    for name, tied_to in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name not in by_name and tied_to in by_name:
            by_name[name] = by_name[tied_to]
        elif tied_to not in by_name and name in by_name:
            by_name[tied_to] = by_name[name]
    parameters = dict(model.named_parameters())
    if lacking := [name for name in parameters if name not in by_name]:
        raise BadArtefact(
            f"{checkpoint.folder} has no weight for {_some(lacking)} of {checkpoint.family.architecture}; "
            "the files do not belong to this config.json, download the checkpoint again"
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != by_name[name].shape:
            raise BadArtefact(
                f"{checkpoint.folder}: {name} has shape {list(by_name[name].shape)}, config.json wants "
                f"{list(parameter.shape)}; the files do not belong together, download the checkpoint again"
            )
        if by_name[name].dtype not in DTYPES:
            raise BadArtefact(
                f"{checkpoint.folder}: {name} is stored as {by_name[name].dtype}; quantised checkpoints are not "
                f"exported, give one in {', '.join(DTYPES)}"
            )
    return {name: by_name[name] for name in parameters}


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
