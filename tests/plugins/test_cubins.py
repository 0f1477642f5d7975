"""Cubins for every SM without a GPU, their file, and which of them a device is given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphs.errors import BadArtefact, UsageError
from plugins.cubin_file import Cubin, pack, serving, unpack
from plugins.cubins import SMS, cubins_from_variants, ptx_from_variant
from plugins.ops import SERVED
from plugins.table import KERNELS, Variant

HALF = ((1, 8, 512, 64), (1, 2, 512, 64), (32,))
VARIANTS = (
    *SERVED["AttentionReceived"].variants(("fp16", "fp16", "i32"), HALF),
    *SERVED["ReceivedInCache"].variants(("fp16", "fp16", "i32", "i64"), (*HALF, (1,))),
    *SERVED["KeepTopK"].variants(("fp32", "i1", "i32"), ((1, 1000), (1, 1000), (500,))),
    *SERVED["CompactRows"].variants(("fp16", "i64"), ((1, 512, 64), (1, 100))),
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Nothing compiled earlier is taken, nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_every_kernel_is_here():
    assert {variant.kernel for variant in VARIANTS} == set(KERNELS)


@pytest.mark.parametrize("sm", SMS)
def test_every_kernel_compiles(sm):
    for cubin in cubins_from_variants(VARIANTS, [sm]):
        assert cubin.image.startswith(b"\x7fELF")
        assert cubin.variant.kernel.encode() in cubin.image
        assert cubin.shared <= 99 * 1024  # what 8.6, 8.9 and 12.0 have for one program
        assert cubin.arch_specific == (sm >= 90)


@pytest.mark.parametrize(("sm", "dtype"), [(80, "bf16"), (120, "fp32")])
def test_the_other_types_and_the_widest_blocks_compile(sm, dtype):
    wide = ((1, 8, 512, 256), (1, 2, 512, 256), (1, 32))
    variants = (
        *SERVED["RatedAttentionReceived"].variants((dtype, dtype, "fp32"), wide),
        *SERVED["KeepTopK"].variants(("fp32", "i1", "i32"), ((1, 16384), (1, 16384), (500,)))[2:],
    )
    assert len(variants) == 3
    assert all(cubin.shared <= 99 * 1024 for cubin in cubins_from_variants(variants, [sm]))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.kernel)
def test_the_machine_code_takes_the_tables_arguments_and_two_scratch_pointers(variant):
    ptx, metadata = ptx_from_variant(variant, 80)
    [header] = re.findall(rf"\.entry {variant.kernel}\((.*?)\)", ptx, re.DOTALL)
    widths = re.findall(r"\.param \.(u64|u32|b64|b32)", header)
    wanted = ["64" if kind.startswith("*") else "32" for kind in variant.arguments.values()]
    assert [width[1:] for width in widths] == [*wanted, "64", "64"]
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    assert metadata.num_warps == variant.warps


def test_no_kernel_is_compiled_for_an_unknown_sm():
    with pytest.raises(UsageError, match="SM 75: kernels exist for 80"):
        cubins_from_variants(VARIANTS, [75, 80])


def cubin_of(sm: int, variant: Variant = VARIANTS[0], *, specific: bool = False) -> Cubin:
    return Cubin(variant, sm, 7, specific, bytes([sm]) * sm)


def test_what_is_packed_is_unpacked():
    cubins = tuple(cubin_of(sm, variant) for variant in VARIANTS for sm in (80, 90))
    assert unpack(pack(cubins)) == cubins
    assert unpack(pack(())) == ()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-9], lambda b: b"x" + b[1:], lambda b: b[:30] + bytes([b[30] ^ 255]) + b[31:]],
)
def test_damaged_cubins_are_refused(damage):
    with pytest.raises(BadArtefact, match="build the engine again"):
        unpack(damage(pack([cubin_of(80)])))


@pytest.mark.parametrize(
    ("held", "device", "served"),
    [
        ((80, 86), 89, 86),
        ((80, 86), 86, 86),
        ((80, 89), 86, 80),
        ((86,), 80, None),
        ((80,), 87, None),
        ((87,), 89, None),
        ((89,), 90, None),
        ((80, 120), 120, 120),
    ],
)
def test_a_device_gets_its_own_cubin_or_an_older_one_of_its_kind(held, device, served):
    found = serving([cubin_of(sm) for sm in held], VARIANTS[0], device)
    assert (found.sm if found else None) == served
    assert serving([cubin_of(sm) for sm in held], VARIANTS[1], device) is None


def test_an_architecture_specific_cubin_serves_its_own_sm_only():
    assert serving([cubin_of(120, specific=True)], VARIANTS[0], 121) is None


def test_the_kernels_files_are_the_tables():
    folder = Path(__file__).parent.parent.parent / "plugins" / "kernels"
    files = {f.stem for f in folder.glob("*.py")} - {"__init__", "launch_torch"}
    assert files == {kernel.module for kernel in KERNELS.values()}
