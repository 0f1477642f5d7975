"""The door of this room: which ops have kernels, and their registration with a TensorRT.

``register(trt, sms)`` once per process, before the network is parsed (``sms`` not empty) or before an engine is
deserialised (``sms`` empty); every node that is to be served carries ``NODE_ATTRIBUTES``, for without them the body
serves. A failure inside a plugin aborts the process, so a build runs in a process of its own, and for TensorRT-RTX with
the environment of ``plugins.trt.process_environment``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from packaging.version import Version

from graphs.ops import DOMAIN
from graphs.versions import installed_version
from plugins.ops import SERVED
from plugins.ops.keep_topk import MOST_ROWS
from plugins.trt import LEAST, VERSION

NODE_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": VERSION}

__all__ = ["MOST_ROWS", "NODE_ATTRIBUTES", "ops_with_kernels", "register", "service"]


def ops_with_kernels() -> tuple[str, ...]:
    """Names of the ops of domain ``saccade`` that a kernel can serve."""
    return tuple(SERVED)


def register(trt: Any, sms: Sequence[int] = ()) -> tuple[str, ...]:
    """Register a creator per op with the plugin registry of ``trt`` and return the ops' names.

    trt: the module ``tensorrt`` (10.16, 11.x) or ``tensorrt_rtx``. sms: the compute capabilities whose cubins a build
    serialises into the engine, as 89 for 8.9; () where engines are only deserialised, which needs no Triton. A second
    call replaces the first's list. Errors: BackendMissing where ``sms`` asks for kernels and Triton is not installed;
    UsageError for a capability that no kernel is compiled for.
    """
    from plugins.creator import register_creators

    return register_creators(trt, tuple(sms), tuple(SERVED.values()))


def service(op: str, module: str | None) -> tuple[Literal["kernel", "body"], str]:
    """What serves an op if it is built here, and why not the kernel ('' where the kernel serves).

    module: the TensorRT that it is built by, ``tensorrt`` or ``tensorrt_rtx``; None where the graphs are run. The
    answer is for this machine and this Python; nothing is imported and no device is touched.
    """
    if module is None:
        return "body", "it runs the graphs, which take no plugins"
    if op not in SERVED:
        return "body", "no kernel is written for it"
    needed = {module: module, "triton": "triton", "cuda": "cuda-python"}
    if lacking := [name for needs, name in needed.items() if not find_spec(needs)]:
        return "body", f"{' and '.join(lacking)} not installed here"
    version = installed_version(module) if module == "tensorrt" else None
    if version and Version(version) < Version(LEAST):
        return "body", f"tensorrt {version} takes no plugins of ours, {LEAST} and newer do"
    return "kernel", ""
