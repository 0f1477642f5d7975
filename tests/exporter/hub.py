"""Ways to store the same tiny checkpoint: as llava-hf's are on the hub, or under the module's own names."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def hub_name(name: str) -> str:
    """A key as in the index of llava-hf/llava-1.5-7b-hf, from the one transformers 5.23 saves.

    There: language_model.model.layers.0…, language_model.lm_head.weight, multi_modal_projector.linear_1…,
    vision_tower.vision_model.encoder…
    """
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def module_name(name: str) -> str:
    """The parameter's own name in LlavaForConditionalGeneration."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def roughen(folder: Path) -> None:
    """Give norms and biases values of their own: as ones and zeros, any of them would do for any other."""
    tensors = load_file(folder / WEIGHTS)
    draw = torch.Generator().manual_seed(1)
    for name, tensor in sorted(tensors.items()):
        if tensor.dim() == 1:
            tensors[name] = (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def stored_as_on_the_hub(folder: Path) -> None:
    """Old keys, a buffer that is no weight, two shards and their index instead of ``model.safetensors``."""
    single = folder / WEIGHTS
    tensors = {hub_name(name): tensor for name, tensor in load_file(single).items()}
    patches = tensors["vision_tower.vision_model.embeddings.position_embedding.weight"].shape[0]
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(patches)[None]
    single.unlink()
    names = sorted(tensors)
    table: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        table |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
