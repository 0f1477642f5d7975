"""``python -m benchmarks.peers.ortgenai CHECKPOINT PARTIAL OUT``: finish a folder that ONNX Runtime GenAI can open.

PARTIAL holds the decoder of its model builder (``model.onnx``) and, in folders of their own, ``vision`` and
``embedding`` as mobius writes them, for the builder exports the text alone. Added here: both parts' lines in
genai_config.json, the image preparation, and with ``--int4`` those parts' weights in blocks of 128, as the published
recipe for Qwen2.5-VL has all three (olive-recipes, Qwen-Qwen2.5-VL-3B-Instruct, cpu_and_mobile). PARTIAL becomes OUT.

It runs in the Python of requirements-ort-genai.txt, so nothing of ours is imported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BLOCK = 128
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id")  # M-RoPE positions are counted from them


def settings(checkpoint: Path, genai: dict[str, Any]) -> dict[str, Any]:
    """genai_config.json with the parts that the builder does not know. genai: what it wrote."""
    config = read(checkpoint / "config.json")
    vision, session = config["vision_config"], genai["model"]["decoder"]["session_options"]
    parts = {
        "vision": {
            "filename": "vision/model.onnx",
            "config_filename": "processor_config.json",
            "spatial_merge_size": vision["spatial_merge_size"],
            "tokens_per_second": vision.get("tokens_per_second", 2),
            "patch_size": vision["patch_size"],
            "inputs": {name: name for name in ("pixel_values", "image_grid_thw")},
            "outputs": {"image_features": "image_features"},
            "session_options": session,
        },
        "embedding": {
            "filename": "embedding/model.onnx",
            "inputs": {name: name for name in ("input_ids", "image_features")},
            "outputs": {"inputs_embeds": "inputs_embeds"},
            "session_options": session,
        },
    }
    return genai | {"model": genai["model"] | parts | {name: config[name] for name in TOKENS}}


def preparation(checkpoint: Path) -> dict[str, Any]:
    """processor_config.json: the checkpoint's image processor in the words of onnxruntime-extensions."""
    of = read(checkpoint / "preprocessor_config.json")
    patches = {"patch_size": of["patch_size"], "merge_size": of["merge_size"]}
    pixels = {"min_pixels": of["size"]["shortest_edge"], "max_pixels": of["size"]["longest_edge"]}
    # smart_resize computes the size from the image; width and height are wanted, and not used.
    resize = {"width": 540, "height": 360, "smart_resize": 1, **pixels, **patches}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),
        ("Resize", resize),
        ("Rescale", {"rescale_factor": of["rescale_factor"]}),
        ("Normalize", {"mean": of["image_mean"], "std": of["image_std"], "qwen2_5_vl": 1}),
        ("PatchImage", {"temporal_patch_size": of["temporal_patch_size"], **patches}),
    ]
    transforms = [{"operation": {"name": kind.lower(), "type": kind, "attrs": attrs}} for kind, attrs in steps]
    return {"processor": {"name": "qwen2_5_image_processor", "transforms": transforms}}


def quantise(path: Path, kinds: tuple[str, ...]) -> None:
    """The weights of these kinds of nodes in 4 bits, in the file's place; computed with int8 activations."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        str(path), bits=4, block_size=BLOCK, is_symmetric=True, accuracy_level=4, op_types_to_quantize=kinds
    )
    quantizer.process()
    for file in (path, path.with_name("model.onnx.data")):
        file.unlink(missing_ok=True)
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def main() -> None:
    """Finish the folder and give it its name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("checkpoint", "partial", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--int4", action="store_true", help="vision and embedding too")
    asked = parser.parse_args()
    config = asked.partial / "genai_config.json"
    config.write_text(json.dumps(settings(asked.checkpoint, read(config)), indent=1) + "\n", "utf-8")
    prepared = json.dumps(preparation(asked.checkpoint), indent=1) + "\n"
    (asked.partial / "processor_config.json").write_text(prepared, "utf-8")
    if asked.int4:
        quantise(asked.partial / "vision" / "model.onnx", ("MatMul",))
        quantise(asked.partial / "embedding" / "model.onnx", ("Gather",))
    asked.partial.rename(asked.out)


if __name__ == "__main__":
    main()
