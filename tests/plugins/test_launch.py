"""What a launch hands to CUDA, watched through a driver that stands in for cuda-python's."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import driver as binding
from cuda.bindings import runtime
from cuda.pathfinder import DynamicLibNotFoundError

from graphs.errors import BackendMissing, OperationFailed
from plugins.creator import ALIGNMENT, plugin_class_of
from plugins.cubin_file import Cubin
from plugins.launch import Launcher
from plugins.ops import SERVED
from plugins.table import bits_of
from plugins.trt import TYPES as TRT_TYPES

TYPES, SHAPES = ("fp16", "fp16", "i32"), ((1, 8, 100, 64), (1, 2, 300, 64), (24,))
FUNCTION = binding.CUfunction(7)
# With a driver the same arguments would be acted on.
HAS_DRIVER = int(runtime.cudaGetDeviceCount()[0]) == 0
SUMS, SHARES = SERVED["AttentionReceived"].variants(TYPES, SHAPES)


class Driver:
    """Every call answers 0 and is written down; cuda-python has taken its arguments, and has no driver to act with."""

    CUdevice_attribute = binding.CUdevice_attribute
    CUfunction_attribute = binding.CUfunction_attribute

    def __init__(self, sm: int = 89, failing: str = "") -> None:
        self.sm, self.failing, self.calls = sm, failing, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if not HAS_DRIVER:
                with contextlib.suppress(DynamicLibNotFoundError):  # looked for when the arguments are taken
                    getattr(binding, name)(*arguments)
            self.calls.append((name, arguments))
            return (int(name == self.failing), self.answer(name, arguments))

        return call

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        major = binding.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        if name == "cuDeviceGetAttribute":
            return self.sm // 10 if arguments[0] == major else self.sm % 10
        return {
            "cuCtxGetCurrent": binding.CUcontext(5),
            "cuCtxGetDevice": binding.CUdevice(0),
            "cuModuleLoadData": binding.CUmodule(1),
            "cuModuleGetFunction": FUNCTION,
        }.get(name)

    def named(self, name: str) -> list[Any]:
        return [arguments for called, arguments in self.calls if called == name]


def cubin(variant: Any = SUMS, shared: int = 20480) -> Cubin:
    return Cubin(variant, 89, shared, False, b"image")


def values() -> dict[str, int]:
    pointers = dict(q=11, k=12, weight=13, peak=14, total=15, received=16)
    sizes = SERVED["AttentionReceived"].sizes(SUMS, TYPES, SHAPES)
    return pointers | {"scale_bits": bits_of(0.125)} | dict(sizes)


def test_arguments_are_in_the_tables_order_with_two_scratch_pointers_behind():
    driver = Driver()
    Launcher([cubin()], driver).launch(SUMS, values(), stream=99)
    [(function, *rest)] = driver.named("cuLaunchKernel")
    grid, block, (shared, stream, (numbers, kinds), extra) = rest[:3], rest[3:6], rest[6:]
    assert (function, grid, block, shared, stream, extra) == (FUNCTION, [6, 2, 1], [128, 1, 1], 20480, 99, 0)
    assert numbers == (11, 12, 13, 0x3E000000, 100, 300, 24, 8, 2, 64, 14, 15, 0, 0)
    assert kinds == (*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 7, *[ctypes.c_void_p] * 4)


def test_the_second_pass_has_a_program_per_block_of_keys():
    driver = Driver()
    Launcher([cubin(SHARES)], driver).launch(SHARES, values(), 0)
    [call] = driver.named("cuLaunchKernel")
    assert call[1:4] == (10, 1, 1)
    assert call[9][0] == (11, 12, 13, 14, 15, 0x3E000000, 100, 300, 24, 8, 2, 64, 16, 0, 0)


def test_a_cubin_is_loaded_once_and_asks_for_shared_memory_only_where_it_has_to():
    driver = Driver()
    launcher = Launcher([cubin()], driver)
    launcher.launch(SUMS, values(), 0)
    launcher.launch(SUMS, values(), 0)
    assert len(driver.named("cuLaunchKernel")) == 2
    assert driver.named("cuModuleLoadData") == [(b"image",)]
    assert driver.named("cuFuncSetAttribute") == []
    Launcher([cubin(shared=50_000)], driver).launch(SUMS, values(), 0)
    shared = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert driver.named("cuFuncSetAttribute") == [(FUNCTION, shared, 50_000)]


def test_a_device_without_a_cubin_is_told_so():
    with pytest.raises(
        BackendMissing, match=r"attention_row_sums for 8\.9, this device is 12\.0: build it with --sm 120"
    ):
        Launcher([cubin()], Driver(sm=120)).launch(SUMS, values(), 0)


def test_a_refusal_of_cuda_is_an_error():
    with pytest.raises(OperationFailed, match="cuLaunchKernel failed with 1"):
        Launcher([cubin()], Driver(failing="cuLaunchKernel")).launch(SUMS, values(), 0)


def test_the_narrowest_selection_that_holds_the_rows_is_launched():
    served = SERVED["KeepTopK"]
    variants = served.variants(("fp32", "i1", "i32"), ((1, 16384), (1, 16384), (1,)))
    widths = [
        dict(served.chosen(variants, ((1, s), (1, s), (1,)))[0].constants)["BLOCK_S"] for s in (1, 1024, 1025, 16384)
    ]
    assert widths == [1024, 1024, 4096, 16384]


ATTENDED, RATED, LENGTH = SHAPES[:2], (1, 24), (1,)
CALLS = {
    "AttentionReceived": (TYPES, SHAPES),
    "RatedAttentionReceived": (("fp16", "fp16", "fp32"), (*ATTENDED, RATED)),
    "ReceivedInCache": ((*TYPES, "i64"), (*SHAPES, LENGTH)),
    "RatedReceivedInCache": (("fp16", "fp16", "fp32", "i64"), (*ATTENDED, RATED, LENGTH)),
    "KeepTopK": (("fp32", "i1", "i32"), ((2, 5000), (2, 5000), (400,))),
    "CompactRows": (("fp16", "i64"), ((2, 5000, 64), (2, 400))),
}


@pytest.mark.parametrize("op", SERVED)
def test_a_plugin_hands_its_kernels_every_address_and_number(op):
    """TensorRT's call of a plugin, down to the driver: each kernel's arguments by name."""
    trt = pytest.importorskip("tensorrt_rtx")
    served, (types, shapes), driver = SERVED[op], CALLS[op], Driver()
    held = tuple(cubin(variant) for variant in served.variants(types, shapes))
    plugin = plugin_class_of(trt)(served, dict.fromkeys(served.attributes, 0.125), held, ())
    plugin.launcher = Launcher(held, driver)
    descs = [
        SimpleNamespace(type=SimpleNamespace(name=TRT_TYPES[kind]), dims=shape)
        for kind, shape in zip(types, shapes, strict=True)
    ]
    addresses = [1 << (20 + i) for i in range(len(descs))]
    workspace, out, stream = 1 << 30, 1 << 31, 7
    plugin.enqueue(descs, [], addresses, [out], workspace, stream)
    chosen = served.chosen(plugin.variants, shapes)
    launched = driver.named("cuLaunchKernel")
    assert len(launched) == len(chosen)
    sizes = served.scratch(shapes)
    for variant, (_, *rest) in zip(chosen, launched, strict=True):
        got = dict(zip(variant.arguments, rest[8][0], strict=False))
        known = dict(zip(served.inputs, addresses, strict=True)) | {served.output: out}
        known |= {f"{name}_bits": bits_of(0.125) for name in served.attributes}
        known |= dict(served.sizes(variant, types, shapes)) | {"peak": workspace}
        known["total"] = workspace + -(-sizes.get("peak", 0) // ALIGNMENT) * ALIGNMENT
        known["weight"] = addresses[min(2, len(addresses) - 1)]
        assert got == {name: known[name] for name in variant.arguments}
        assert rest[7] == stream
