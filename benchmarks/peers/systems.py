"""What is measured: a line for each system, how its files are made, and in which Python it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Python = Literal["runtime", "torch", "peers", "ort-genai"]


@dataclass(frozen=True)
class System:
    """made: a line of ``MADE``; the folder it runs from. python: whose interpreter. options: of the runtime's class.

    threads: its own number instead of the run's.
    """

    name: str
    runtime: str
    made: str
    python: Python = "runtime"
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None


# Folder → the commands that make it, in order. {checkpoint} {work} {exports} {saccade} {optimum} {python} {mobius}
MADE: dict[str, tuple[str, ...]] = {
    "checkpoint": (),
    "none": (
        "{saccade} export {checkpoint} -o {exports}/none-export --role alone --policy none",
        "{saccade} build {exports}/none-export -o {work}/none --target cpu --precision fp32",
    ),
    "star": (
        "{saccade} export {checkpoint} -o {exports}/star-export --role alone --plan {work}/star.toml",
        "{saccade} build {exports}/star-export -o {work}/star --target cpu --precision fp32",
    ),
    "fastv": (
        "{saccade} export {checkpoint} -o {exports}/fastv-export --role alone --plan {work}/fastv.toml",
        "{saccade} build {exports}/fastv-export -o {work}/fastv --target cpu --precision fp32",
    ),
    "genai-fp32": (
        "{optimum} export openvino --model {checkpoint} --task image-text-to-text --weight-format fp32 "
        "{work}/genai-fp32",
    ),
    "genai-int8": (
        "{optimum} export openvino --model {checkpoint} --task image-text-to-text --weight-format int8 "
        "{work}/genai-int8",
    ),
    "genai-int4": (
        "{optimum} export openvino --model {checkpoint} --task image-text-to-text --weight-format int4 "
        "{work}/genai-int4",
    ),
}
# Its builder writes the decoder alone; the tower and the embedding come from mobius. Logits of the last row only.
for _precision in ("fp32", "int4"):
    _partial = f"{{work}}/ort-genai-{_precision}.partial"
    _blocks = " block_size=128 accuracy_level=4" if _precision == "int4" else ""
    MADE[f"ort-genai-{_precision}"] = (
        f"{{python}} -m onnxruntime_genai.models.builder --input {{checkpoint}} --output {_partial} "
        f"--precision {_precision} --execution_provider cpu --cache_dir {{work}}/ort-genai-cache "
        f"--extra_options exclude_embeds=true prune_lm_head=true{_blocks}",
        f"{{mobius}} build --config {{checkpoint}} --dtype f32 --ep cpu --component vision_encoder {_partial}/vision",
        f"{{mobius}} build --config {{checkpoint}} --dtype f32 --ep cpu --component embedding {_partial}/embedding",
        f"{{python}} -m benchmarks.peers.ortgenai {{checkpoint}} {_partial} {{work}}/ort-genai-{_precision}"
        + (" --int4" if _precision == "int4" else ""),
    )
for _precision in ("int8", "int4"):
    MADE[f"none-{_precision}"] = (
        *MADE["none"][:1],
        f"{{saccade}} build {{exports}}/none-export -o {{work}}/none-{_precision} --target cpu "
        f"--precision {_precision}",
    )

for _name in ("none", "fastv", "star"):
    for _precision in ("fp32", "bf16", "int8", "int4"):
        MADE[f"{_name}-openvino-{_precision}"] = (
            *MADE[_name][:1],
            f"{{saccade}} build {{exports}}/{_name}-export -o {{work}}/{_name}-openvino-{_precision} --target openvino "
            f"--precision {_precision}",
        )

HEAD = 'schema = "saccade.plan/1"\nname = "{}"\n\n'
VISION = '[[point]]\nwhere = "vision"\nscore = "received"\nkeep = {:.3f}\n\n'
LANGUAGE = '[[point]]\nwhere = {}\nscore = "attention"\nrows = "text"\nkeep = {:.3f}\n'
STAR_AT, STAR_KEEPS = 0.4375, 0.05  # as the policy has them: before layer 14 of 32, behind it 5 %


def plans(layers: int) -> dict[str, str]:
    """Plans that keep 9 % on average over a decoder of so many layers: FastV behind layer 1, STAR in its two stages.

    STAR's share behind the tower is what makes 9 % with the layer and the share of its second stage.
    """
    fastv, at = (0.09 * layers - 1) / (layers - 1), int(STAR_AT * layers)
    star = (0.09 * layers - STAR_KEEPS * (layers - at)) / at
    return {
        "fastv": HEAD.format("fastv") + LANGUAGE.format(1, fastv),
        "star": HEAD.format("star") + VISION.format(star) + LANGUAGE.format(at, STAR_KEEPS),
    }


OURS = (
    System("saccade cpu fp32", "saccade", "none", options={"target": "cpu"}),
    System("saccade cpu fp32, fastv 9 %", "saccade", "fastv", options={"target": "cpu"}),
    System("saccade cpu fp32, star 9 %", "saccade", "star", options={"target": "cpu"}),
    System("saccade openvino fp32", "saccade", "none-openvino-fp32", options={"target": "openvino"}),
    System("saccade openvino bf16", "saccade", "none-openvino-bf16", options={"target": "openvino"}),
    System("saccade openvino bf16, fastv 9 %", "saccade", "fastv-openvino-bf16", options={"target": "openvino"}),
    System("saccade openvino bf16, star 9 %", "saccade", "star-openvino-bf16", options={"target": "openvino"}),
    System("saccade openvino int8", "saccade", "none-openvino-int8", options={"target": "openvino"}),
    System("saccade openvino int4", "saccade", "none-openvino-int4", options={"target": "openvino"}),
    System("saccade cpu int8", "saccade", "none-int8", options={"target": "cpu"}),
    System("saccade cpu int4", "saccade", "none-int4", options={"target": "cpu"}),
)
PEERS = (
    System("transformers fp32", "transformers", "checkpoint", "torch", {"dtype": "float32"}),
    System("transformers bf16", "transformers", "checkpoint", "torch", {"dtype": "bfloat16"}),
    System("openvino genai f32", "openvino-genai", "genai-fp32", "peers", {"precision": "f32"}),
    System("openvino genai default", "openvino-genai", "genai-fp32", "peers"),
    System("openvino genai default, 50 % pruned", "openvino-genai", "genai-fp32", "peers", {"pruning": 50}),
    System("openvino genai default, 90 % pruned", "openvino-genai", "genai-fp32", "peers", {"pruning": 90}),
    System("openvino genai int8", "openvino-genai", "genai-int8", "peers"),
    System("openvino genai int4", "openvino-genai", "genai-int4", "peers"),
    System("onnxruntime genai fp32", "onnxruntime-genai", "ort-genai-fp32", "ort-genai"),
    System("onnxruntime genai int4", "onnxruntime-genai", "ort-genai-int4", "ort-genai"),
)
# A pair of shape (a) twice: what the small model's guidance and the large model's pruning cost on one size.
for _target, _precision in (("cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
    MADE[f"twice-{_target}-{_precision}"] = (
        "{saccade} export {checkpoint} -o {exports}/twice-small-export --role small",
        "{saccade} export {checkpoint} -o {exports}/twice-large-export --role large --keep 0.05",
        "{saccade} build {exports}/twice-small-export {exports}/twice-large-export "
        f"-o {{work}}/twice-{_target}-{_precision} --target {_target} --precision {_precision}",
    )

# Whole questions of the shipped pair, calibrated for losses of 2 and 5 %. {pair} its folder, {keep} the share kept at
# the cut for 35 % on average.
for _target, _loss in (("cpu", 2), ("cpu", 5), ("openvino", 2)):
    _made = f"pair-{_target}-{_loss}"
    MADE[_made] = (
        "{saccade} export {pair}/small -o {exports}/small-export --role small",
        "{saccade} export {pair}/large -o {exports}/large-export --role large --keep {keep}",
        f"{{saccade}} build {{exports}}/small-export {{exports}}/large-export -o {{work}}/{_made} --target {_target} "
        "--precision fp32",
        f"{{saccade}} calibrate {{work}}/{_made} glyphs --max-loss 0.0{_loss} --max-new-tokens 16",
    )
MADE["alone-cpu"] = (
    "{saccade} export {pair}/large -o {exports}/alone-export --role alone --policy none",
    "{saccade} build {exports}/alone-export -o {work}/alone-cpu --target cpu --precision fp32",
)
MADE["large"] = ("cp -r {pair}/large {work}/large",)
QUESTIONS = (
    System("saccade cpu: cascade, calibrated to lose 2 %", "saccade", "pair-cpu-2", options={"target": "cpu"}),
    System("saccade cpu: cascade, calibrated to lose 5 %", "saccade", "pair-cpu-5", options={"target": "cpu"}),
    System("saccade cpu: small, then always large", "saccade", "pair-cpu-2", options={"target": "cpu", "threshold": 1}),
    System("saccade cpu: large alone, unpruned", "saccade", "alone-cpu", options={"target": "cpu"}),
    System(
        "saccade openvino: cascade, calibrated to lose 2 %",
        "saccade",
        "pair-openvino-2",
        options={"target": "openvino"},
    ),
    System("transformers generate: large", "transformers", "large", "torch", {"dtype": "float32"}),
    System("transformers generate: large, 1 thread", "transformers", "large", "torch", {"dtype": "float32"}, 1),
)

SYSTEMS = {system.name: system for system in (*OURS, *PEERS)}
