"""The compiled kernels on a GPU: launched by Triton, and as cubins through cuda-python, as an engine launches them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs.ops import OPS
from tests.plugins.plain import SCALE, TORCH, drawn, kept


def on_gpu(numbers: np.ndarray, dtype: str = "fp32") -> torch.Tensor:
    return torch.from_numpy(numbers).to("cuda", TORCH[dtype]) if numbers.dtype == np.float32 else torch.from_numpy(
        numbers
    ).to("cuda")  # fmt: skip


def carrier(length: int) -> torch.Tensor:
    return torch.full((length,), 7, dtype=torch.int32, device="cuda")


def by_cubin(op: str, inputs: list[torch.Tensor], attributes: tuple[float, ...] = ()) -> torch.Tensor:
    """The op's kernels as cubins of this device, on torch's current stream."""
    from plugins.cubin_file import pack, unpack
    from plugins.cubins import cubins_from_variants
    from plugins.kernels.launch_torch import DTYPES, NAMES
    from plugins.launch import Launcher
    from plugins.ops import SERVED
    from plugins.table import bits_of

    served, (major, minor) = SERVED[op], torch.cuda.get_device_capability()
    types, shapes = [NAMES[x.dtype] for x in inputs], [tuple(x.shape) for x in inputs]
    variants = served.variants(types, shapes)
    launcher = Launcher(unpack(pack(cubins_from_variants(variants, [10 * major + minor]))))
    out = torch.empty(tuple(served.output_shape(shapes)), dtype=DTYPES[served.output_type(types)], device="cuda")
    scratch = {
        name: torch.empty(size, dtype=torch.uint8, device="cuda") for name, size in served.scratch(shapes).items()
    }
    tensors = dict(zip(served.inputs, inputs, strict=True)) | {served.output: out, **scratch}
    values = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    values |= {f"{name}_bits": bits_of(value) for name, value in zip(served.attributes, attributes, strict=True)}
    values["weight"] = values.get("weight", inputs[2 if len(inputs) > 2 else -1].data_ptr())
    for variant in served.chosen(variants, shapes):
        numbers = dict(served.sizes(variant, types, shapes))
        launcher.launch(variant, values | numbers, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return out


def by_triton(op: str, inputs: list[torch.Tensor], attributes: tuple[float, ...] = ()) -> torch.Tensor:
    from plugins.kernels.launch_torch import run

    return run(op, inputs, attributes)


WAYS = pytest.mark.parametrize("way", [by_triton, by_cubin], ids=["triton", "cubin"])


@WAYS
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "groups", "rows", "keys", "guides", "width"),
    [(32, 8, 2048, 2048, 64, 128), (14, 2, 1, 777, 1, 64), (6, 2, 301, 555, 300, 80), (2, 1, 3, 65, 2, 256)],
)
def test_attention_received(way, dtype, heads, groups, rows, keys, guides, width):
    q, k = on_gpu(drawn(1, heads, rows, width), dtype), on_gpu(drawn(1, groups, keys, width, seed=1), dtype)
    wanted = OPS["AttentionReceived"].torch_op(q.float(), k.float(), carrier(guides), SCALE)
    got = way("AttentionReceived", [q, k, carrier(guides)], (SCALE,))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, way("AttentionReceived", [q, k, carrier(guides)], (SCALE,)))


@WAYS
def test_rated_attention_received(way):
    q, k = on_gpu(drawn(1, 8, 50, 64), "fp16"), on_gpu(drawn(1, 2, 300, 64, seed=1), "fp16")
    weight = on_gpu(drawn(1, 33, seed=2))
    wanted = OPS["RatedAttentionReceived"].torch_op(q, k, weight, SCALE)
    torch.testing.assert_close(way("RatedAttentionReceived", [q, k, weight], (SCALE,)), wanted, rtol=1e-3, atol=1e-3)


@WAYS
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("rows", "held", "capacity", "guides"), [(1, 700, 4096, 1), (300, 0, 1024, 64)])
def test_received_in_a_cache(way, dtype, rows, held, capacity, guides):
    """What lies behind the filled rows is never read; the length is on the device."""
    q, k = on_gpu(drawn(1, 8, rows, 64), dtype), on_gpu(drawn(1, 2, capacity, 64, seed=1), dtype)
    filled = held + rows
    k[:, :, filled:] = torch.nan
    weight = on_gpu(np.abs(drawn(1, guides, seed=2)))
    length = torch.tensor([held], device="cuda")
    for op, third in (("ReceivedInCache", carrier(guides)), ("RatedReceivedInCache", weight)):
        over_all = op.replace("ReceivedInCache", "AttentionReceived")
        wanted = OPS[over_all].torch_op(q.float(), k[:, :, :filled].float(), third, SCALE)
        got = way(op, [q, k, third, length], (SCALE,))
        torch.testing.assert_close(got[:, :filled], wanted, rtol=1e-3, atol=1e-4)
        assert (got[:, filled:] == 0).all()


@WAYS
@pytest.mark.parametrize(("rows", "keep"), [(1, 1), (576, 57), (1025, 1025), (4097, 3841), (16384, 5000)])
def test_keep_topk(way, rows, keep):
    score = np.round(drawn(2, rows, seed=rows) * 8) / 8
    score[:, ::17], score[:, ::23], score[:, ::29] = np.nan, np.inf, -0.0
    is_visual = np.random.default_rng(rows).random((2, rows)) < 0.9
    got = way("KeepTopK", [on_gpu(score.astype(np.float32)), on_gpu(is_visual), carrier(keep)])
    np.testing.assert_array_equal(got.cpu().numpy(), kept(score, is_visual, keep))


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("trailing", [(), (5,), (4096,)])
def test_compact_rows(way, dtype, trailing):
    x = torch.randint(0, 2, (2, 900, *trailing), device="cuda").to(dtype)
    at = torch.stack([torch.randperm(900, device="cuda")[:333].sort().values for _ in range(2)])
    assert torch.equal(way("CompactRows", [x, at]), torch.stack([x[b][at[b]] for b in range(2)]))
