"""ONNX Runtime's GPU providers as targets: one record each, and every reason why one cannot be had here.

Nothing of a bundle is read for it and no session is opened: ONNX Runtime itself falls back to the CPU with a line in
its log where a provider cannot be loaded, so a session that exists proves nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engines.sessions.nvidia import driver_reasons, library_reasons
from graphs.versions import extras_of, installed_rivals, installed_version

DISTRIBUTION = "onnxruntime-gpu"
CUDA_MAJOR = 13

# What the CUDA provider of onnxruntime-gpu 1.31.1 is linked to, and cuDNN, which it opens for convolutions.
CUDA_LIBRARIES = {
    "libcudart.so.13": "pip install nvidia-cuda-runtime",
    "libcublasLt.so.13": "pip install nvidia-cublas",
    "libcublas.so.13": "pip install nvidia-cublas",
    "libcurand.so.10": "pip install nvidia-curand",
    "libcudnn.so.9": "pip install nvidia-cudnn-cu13",
}
TENSORRT_PACKAGE = "tensorrt_libs"  # the folder in which pip puts these
TENSORRT_LIBRARIES = {
    "libnvinfer.so.10": "TensorRT 10 for CUDA 13: pip install tensorrt-cu13==10.*",
    "libnvonnxparser.so.10": "TensorRT 10 for CUDA 13: pip install tensorrt-cu13==10.*",
}


@dataclass(frozen=True)
class Provider:
    """One provider of ONNX Runtime.

    options: as ONNX Runtime documents them. decodes: whether it gets the decoder too; where not, the CUDA provider runs
    that. libraries: shared library → what brings it.
    """

    target: str
    name: str
    options: Mapping[str, str]
    decodes: bool
    libraries: Mapping[str, str]


# use_tf32=0: fp32 is to be fp32, as the golden tensors are. HEURISTIC: the exhaustive search would run anew for every
# size of image. The first visible GPU is used; CUDA_VISIBLE_DEVICES chooses it.
CUDA = Provider(
    "cuda",
    "CUDAExecutionProvider",
    {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
    True,
    CUDA_LIBRARIES,
)
# The TensorRT providers build an engine per range of shapes they have met, and a cache grows with every token; their
# parsers also refuse the decoder's Attention with its three outputs. So they get the other stages.
TENSORRT = Provider(
    "ort-tensorrt", "TensorrtExecutionProvider", {"device_id": "0"}, False, CUDA_LIBRARIES | TENSORRT_LIBRARIES
)
RTX = Provider("ort-rtx", "NvTensorRTRTXExecutionProvider", {"device_id": "0"}, False, CUDA_LIBRARIES)

PROVIDERS = {provider.target: provider for provider in (TENSORRT, RTX, CUDA)}


def cuda_reasons(_: Sequence[Any] = ()) -> list[str]:
    """Why the CUDA provider cannot be had here; empty where it can. The graphs are run as they are, so no engines."""
    return reasons(CUDA)


def tensorrt_reasons(_: Sequence[Any] = ()) -> list[str]:
    """The same for ONNX Runtime's TensorRT provider."""
    return reasons(TENSORRT)


def rtx_reasons(_: Sequence[Any] = ()) -> list[str]:
    """The same for ONNX Runtime's TensorRT-RTX provider."""
    return reasons(RTX)


def reasons(provider: Provider) -> list[str]:
    """Every reason at once: driver, GPU, package, provider, libraries."""
    found = driver_reasons(CUDA_MAJOR)
    rivals = installed_rivals("onnxruntime")
    if len(rivals) > 1:
        uninstall = f"pip uninstall {' '.join(rivals)}, then pip install 'saccade[gpu]'"
        return [*found, f"{' and '.join(rivals)} are both installed and overwrite each other ({uninstall})"]
    if rivals != [DISTRIBUTION] or not find_spec("onnxruntime"):
        instead = f"; {rivals[0]}, which is here, serves the CPU only" if rivals else ""
        return [*found, f"{DISTRIBUTION} is not installed (pip install {extras_of(DISTRIBUTION)}){instead}"]
    offered = _preloaded()
    if provider.name not in offered:
        version = installed_version(DISTRIBUTION)
        return [*found, f"{DISTRIBUTION} {version} was built without {provider.name} (it has {', '.join(offered)})"]
    package = find_spec(TENSORRT_PACKAGE)
    folder = Path(package.submodule_search_locations[0]) if package and package.submodule_search_locations else None
    return [*found, *library_reasons(provider.libraries, folder)]


def _preloaded() -> list[str]:
    """Load the CUDA libraries that pip brought, and return the providers this build has."""
    import onnxruntime

    # It prints what it misses on stdout, which is the answer's; ``library_reasons`` says it better.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    return list(onnxruntime.get_available_providers())
