"""Ops are translated as they were traced; one that torch.onnx knows in pieces only still comes out right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from exporter import trace
from exporter.attention import Blocks, block_attention_function
from exporter.golden import wide_products


class Program(nn.Module):
    """One computation between a feed and an output."""

    outputs = ("out",)

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute
        self.conv = nn.Conv2d(3, 4, (3, 2), padding="same")
        self.patches = nn.Conv2d(4, 6, 2, stride=2, padding="valid", bias=False, groups=2)

    def forward(self, feed):
        return {"out": self.compute(self, feed["x"])}


def in_place(self, x):
    y = x.clone()
    y[:, 1:] += 1
    y.mul_(2)
    return y


PROGRAMS = {
    "writes in place": (in_place, 1, 1e-5),
    "an op without translation": (lambda self, x: nn.functional.softshrink(x, 0.3), 1, 1e-5),
    "convolutions padded by name": (lambda self, x: self.patches(self.conv(x)), 0, 1e-5),
    # ONNX Runtime computes float16 in float32 on a CPU.
    "casts": (lambda self, x: (x.to(torch.float16) * 3).to(x.device, torch.float32), 0, 1e-2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_graph_is_the_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, decomposed, tolerance = PROGRAMS[name]
    program, ran = Program(compute), []
    original = torch.export.ExportedProgram.run_decompositions
    spied = lambda self, *given, **named: ran.append(1) or original(self, *given, **named)  # noqa: E731
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", spied)
    model = trace.onnx_from_program(program, {"x": torch.zeros(2, 3, 4, 4)}, {"x": ("N", 3, 4, 4)})
    assert len(ran) == decomposed
    assert [str(model.graph.inputs[0].shape[0]), str(model.graph.outputs[0].shape[0])] == ["N", "N"]
    ir.save(trace.finish(model), tmp_path / "x.onnx")
    x = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
    (got,) = ort.InferenceSession(tmp_path / "x.onnx").run(None, {"x": x})
    with torch.no_grad():
        wanted = program({"x": torch.from_numpy(x)})["out"]
    np.testing.assert_allclose(got, wanted.numpy(), atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_wide_products_are_float16_products_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 40, bias=bias)).half()
    x = torch.randn(1, 100, 300).half()
    with torch.no_grad(), wide_products(model):
        got = model(x)
        few = model(x[:, :3])
    model.requires_grad_(False)
    exact = x.double() @ model[0].weight.double().T + (model[0].bias.double() if bias else 0)
    assert got.dtype == torch.float16
    # Half a unit in the last place of float16, and what float32 sums may add.
    assert float(((got.double() - exact).abs() / exact.abs().clamp(min=1e-1)).max()) < 2**-11 + 1e-4
    with torch.no_grad():
        assert torch.equal(few, model(x[:, :3]))
    assert "forward" not in vars(model[0])


def test_packed_rows_attend_to_the_rows_of_their_own_block_the_first_too() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=rng) for _ in range(3))
    rows = torch.tensor([[3, 0, -1], [1, 4, 2]])
    place = torch.tensor([1, 3, 5, 0, 4])
    blocks = Blocks(rows, place)
    got, _ = block_attention_function(nn.Identity(), q, k, v, None, 0.5, saccade_blocks=blocks)
    wanted = torch.empty(1, 5, 2, 4)
    for block in ([3, 0], [1, 4, 2]):
        share = torch.softmax(q[0][:, block] @ k[0][:, block].transpose(1, 2) * 0.5, -1)
        wanted[0, block] = (share @ v[0][:, block]).transpose(0, 1)
    torch.testing.assert_close(got, wanted)
