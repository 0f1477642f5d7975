"""Kernel variants → cubins, for any SM, on a machine that needs no GPU. The one place that compiles; needs Triton."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from graphs.errors import OperationFailed, UsageError
from graphs.versions import missing
from plugins.cubin_file import Cubin
from plugins.table import KERNELS, Variant

SMS = (80, 86, 87, 89, 90, 100, 110, 120, 121)


def check_sms(sms: Sequence[int]) -> None:
    """UsageError for a compute capability that no kernel is compiled for, BackendMissing without Triton."""
    unknown = sorted(set(sms) - set(SMS))
    if unknown:
        known = ", ".join(map(str, SMS))
        raise UsageError(f"no kernel is compiled for SM {unknown[0]}: kernels exist for {known}; build with --ops body")
    _triton()


def cubins_from_variants(variants: Sequence[Variant], sms: Sequence[int]) -> tuple[Cubin, ...]:
    """Compile every variant for every SM (as 89 for 8.9), each pair once in this process.

    Errors: UsageError for an unknown SM, BackendMissing without Triton, OperationFailed where a kernel needs scratch
    memory, which no launcher of ours gives it.
    """
    check_sms(sms)
    return tuple(_cubin(variant, sm) for variant in variants for sm in sms)


def ptx_from_variant(variant: Variant, sm: int) -> tuple[str, Any]:
    """A variant's PTX for an SM, and Triton's metadata (num_warps, shared, …)."""
    check_sms((sm,))
    compiled = _compiled(variant, sm)
    return compiled.asm["ptx"], compiled.metadata


@cache
def _cubin(variant: Variant, sm: int) -> Cubin:
    compiled = _compiled(variant, sm)
    target = re.search(r"^\.target sm_(\d+)(\w?)", compiled.asm["ptx"], re.MULTILINE)
    assert target is not None
    return Cubin(variant, sm, compiled.metadata.shared, bool(target[2]), compiled.asm["cubin"])


@cache
def _compiled(variant: Variant, sm: int) -> Any:
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = KERNELS[variant.kernel]
    function = getattr(import_module(f"plugins.kernels.{entry.module}"), entry.name)
    constants = dict(variant.constants)
    signature = {**variant.arguments, **dict.fromkeys(constants, "constexpr")}
    # In the order of the function's own arguments; a mismatch with the table would shift every one behind it.
    if list(signature) != function.arg_names:
        raise OperationFailed(
            f"{entry.name} takes {function.arg_names}, its table says {list(signature)}: correct one of them"
        )
    pointers = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(function, signature, constants, pointers)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # no paths of this machine in an engine, and half the bytes
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": variant.warps})
    scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
    if scratch:
        raise OperationFailed(f"{entry.name} asks for {scratch} bytes of scratch memory: write it without")
    return compiled


def _triton() -> Any:
    try:
        import triton
    except ImportError as e:
        raise missing("triton") from e
    return triton
