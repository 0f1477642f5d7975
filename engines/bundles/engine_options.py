"""How ``saccade build`` is told what engines are to be; values are checked where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engines.options import stacked

# For every target that has engines: rtx and tensorrt.
_OF_ENGINES = (
    click.option(
        "--sm",
        "sms",
        type=int,
        multiple=True,
        metavar="SM",
        help="rtx: GPU compute capability, 89 for 8.9; required, repeatable.",
    ),
    click.option(
        "--precision",
        metavar="P",
        help="int8, int4: weights only; cpu: also fp32; openvino: bf16, fp32; rtx, tensorrt: fp16, bf16, fp32. "
        "[the export's]",
    ),
    click.option(
        "--ops",
        metavar="HOW",
        help="rtx, tensorrt: run custom ops by our kernels (plugin) or as standard ONNX (body). [body]",
    ),
)
_BOUNDS = (
    click.option(
        "--max-prompt",
        type=int,
        metavar="N",
        help="rtx, tensorrt: most tokens in one prefill chunk. [2048, more if a 1920×1080 photo needs it]",
    ),
    click.option(
        "--max-length",
        type=int,
        metavar="N",
        help="rtx, tensorrt: most tokens in a KV cache. [4096, more if --max-prompt plus 1024 is]",
    ),
    click.option(
        "--max-guide",
        type=int,
        metavar="N",
        help="rtx, tensorrt: most tokens whose attention ranks the visual ones. [512]",
    ),
    click.option(
        "--max-tail",
        type=int,
        metavar="N",
        help="rtx, tensorrt: most tokens of a run with logits, as of a scored answer. [128]",
    ),
    click.option(
        "--max-images",
        type=int,
        metavar="N",
        help="rtx, tensorrt: most images or tiles at once. [8, more if such a photo needs it]",
    ),
)
# For full TensorRT alone.
_OF_TENSORRT = (
    click.option(
        "--plugins",
        metavar="FORM",
        help="tensorrt: python, or aot, which needs no Python at run time. [python]",
    ),
    click.option("--parser", metavar="V", help="tensorrt: current, or 10.3 for JetPack 6. [current]"),
    click.option(
        "--timing-cache",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="tensorrt: timing cache; read if it exists, then updated.",
    ),
    click.option("--optimization-level", type=int, metavar="N", help="tensorrt: 0 to 5. [TensorRT's own]"),
    click.option(
        "--workspace",
        type=float,
        metavar="GB",
        help="tensorrt: most GPU memory that a kernel may take beside its tensors. [TensorRT's own: all there is]",
    ),
    click.option("--version-compatible", is_flag=True, help="tensorrt: engines that newer TensorRT versions run too."),
    click.option(
        "--hardware-compatibility",
        metavar="HOW",
        help="tensorrt: none, ampere-plus or same-cc. [none]",
    ),
)


# What ``engine_options_from`` takes.
engine_options = stacked(*_OF_ENGINES, *_BOUNDS, *_OF_TENSORRT)


def engine_options_from(
    sms: tuple[int, ...],
    precision: str | None,
    ops: str | None,
    plugins: str | None,
    parser: Any,
    timing_cache: Path | None,
    optimization_level: int | None,
    workspace: float | None,
    version_compatible: bool,
    hardware_compatibility: str | None,
    **bounds: int | None,
) -> Any:
    """The options of engines; None where none was given, so that a target without engines can refuse the others."""
    of_full = (
        *(plugins, parser, timing_cache, optimization_level, workspace),
        *(version_compatible or None, hardware_compatibility),
    )
    if not sms and all(value is None for value in (precision, ops, *bounds.values(), *of_full)):
        return None
    from engines.trt.bounds import Bounds
    from engines.trt.full import TensorrtOptions
    from engines.trt.options import EngineOptions

    full = None
    if any(value is not None for value in of_full):
        full = TensorrtOptions(
            timing_cache,
            optimization_level,
            version_compatible,
            hardware_compatibility or "none",
            plugins,
            parser or "current",
            workspace,
        )
    return EngineOptions(sms, precision, ops or "body", Bounds(**bounds), full)
