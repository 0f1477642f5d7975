"""One import layer over ``tensorrt`` (10.16, 11.x) and ``tensorrt_rtx``: what differs between them stands here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphs.errors import BackendMissing
from graphs.versions import missing

# Triton's name of a type → TensorRT's
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "i64": "INT64", "i32": "INT32", "i8": "INT8", "i1": "BOOL"}
NAMES = {theirs: ours for ours, theirs in TYPES.items()}

VERSION = "1"  # of our plugins, which a node asks for by it
LIBRARY = "libtensorrt_rtx.so"
LEAST = "10.16"  # the first full TensorRT that our plugins are written for


def load(module: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx`` for our plugins, which take 10.16; BackendMissing where it is not had."""
    trt = imported(module)
    if not hasattr(trt, "IPluginCreatorV3One"):
        raise BackendMissing(f"{module} {trt.__version__} knows no IPluginV3: install {LEAST} or newer")
    return trt


def imported(module: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx`` for bodies; BackendMissing where it or its library is not there."""
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        raise missing(module) from e
    except (ImportError, OSError) as e:
        raise BackendMissing(f"{module} is installed, but does not load ({e}): install its libraries") from e


def type_name(kind: Any) -> str:
    """Triton's name of a TensorRT data type; '' for one that no kernel takes."""
    return NAMES.get(kind.name, "")


def data_type(trt: Any, name: str) -> Any:
    """TensorRT's data type of a Triton name."""
    return getattr(trt.DataType, TYPES[name])


def process_environment(folder: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a process needs before TensorRT-RTX may parse plugin nodes in it.

    Its parser opens ``libtensorrt_rtx.so``, the wheel brings ``libtensorrt_rtx.so.1`` only, and without the first the
    process aborts: so a link is made in ``folder`` (private, existing) and put on LD_LIBRARY_PATH. Where
    ``tensorrt_rtx`` is not installed from a wheel, the environment is ``base`` (default: this process's) as it is.
    """
    environment = dict(os.environ if base is None else base)
    found = find_spec("tensorrt_rtx_libs")
    places = found.submodule_search_locations if found else None
    libraries = sorted(path for place in places or () for path in Path(place).glob(f"{LIBRARY}.*"))
    if not libraries:
        return environment
    link = folder / LIBRARY
    if not link.exists():
        link.symlink_to(libraries[-1])
    paths = [str(folder.resolve()), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    return environment | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
