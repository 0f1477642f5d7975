"""What is measured: a line for each system, how its files are made, and in which Python it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Python = Literal["ours", "peers"]


@dataclass(frozen=True)
class System:
    """made: a line of ``MADE``; the folder it runs from. python: whose interpreter. options: of the runtime's class."""

    name: str
    runtime: str
    made: str
    python: Python = "ours"
    options: dict[str, Any] = field(default_factory=dict)


# Folder → the commands that make it, in order. {checkpoint} {work} {saccade} {optimum}
MADE: dict[str, tuple[str, ...]] = {
    "checkpoint": (),
    "none": (
        "{saccade} export {checkpoint} -o {work}/none-export --role alone --policy none",
        "{saccade} build {work}/none-export -o {work}/none --target cpu --precision fp32",
    ),
    "star": (
        "{saccade} export {checkpoint} -o {work}/star-export --role alone --plan {work}/star.toml",
        "{saccade} build {work}/star-export -o {work}/star --target cpu --precision fp32",
    ),
    "fastv": (
        "{saccade} export {checkpoint} -o {work}/fastv-export --role alone --plan {work}/fastv.toml",
        "{saccade} build {work}/fastv-export -o {work}/fastv --target cpu --precision fp32",
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
for _precision in ("int8", "int4"):
    MADE[f"none-{_precision}"] = (
        f"{{saccade}} build {{work}}/none-export -o {{work}}/none-{_precision} --target cpu --precision {_precision}",
    )

for _name in ("none", "fastv", "star"):
    for _precision in ("fp32", "bf16", "int8", "int4"):
        MADE[f"{_name}-openvino-{_precision}"] = (
            *MADE[_name][:1],
            f"{{saccade}} build {{work}}/{_name}-export -o {{work}}/{_name}-openvino-{_precision} --target openvino "
            f"--precision {_precision}",
        )

# Average retention 9 %: after layer 1 of 24 keeps 5 %; STAR halves at the vision stage first.
HEAD = 'schema = "saccade.plan/1"\nname = "{}"\n\n'
VISION = '[[point]]\nwhere = "vision"\nscore = "received"\nkeep = 0.5\n\n'
LANGUAGE = '[[point]]\nwhere = {}\nscore = "attention"\nrows = "text"\nkeep = 0.05\n'
PLANS = {
    "fastv": HEAD.format("fastv") + LANGUAGE.format(1),
    "star": HEAD.format("star") + VISION + LANGUAGE.format(2),
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
    System("transformers fp32", "transformers", "checkpoint", options={"dtype": "float32"}),
    System("transformers bf16", "transformers", "checkpoint", options={"dtype": "bfloat16"}),
    System("openvino genai f32", "openvino-genai", "genai-fp32", "peers", {"precision": "f32"}),
    System("openvino genai default", "openvino-genai", "genai-fp32", "peers"),
    System("openvino genai default, 50 % pruned", "openvino-genai", "genai-fp32", "peers", {"pruning": 50}),
    System("openvino genai default, 90 % pruned", "openvino-genai", "genai-fp32", "peers", {"pruning": 90}),
    System("openvino genai int8", "openvino-genai", "genai-int8", "peers"),
    System("openvino genai int4", "openvino-genai", "genai-int4", "peers"),
)
SYSTEMS = {system.name: system for system in (*OURS, *PEERS)}
