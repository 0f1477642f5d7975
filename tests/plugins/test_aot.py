"""The contract of ahead-of-time plugins: a stand-in for ``tensorrt.plugin`` reads what TensorRT would read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Tuple, Union  # noqa: UP035

import pytest
from onnx.helper import get_attribute_value, make_graph, make_model, make_node

from graphs.errors import UsageError
from plugins import aot
from plugins.ops import SERVED
from plugins.table import bits_of


class Expressions(list[Any]):
    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class TensorDesc:
    def __init__(self, shape_expr: list[Any], dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self.shape_expr, self.dtype, self.shape, self.ndim = shape_expr, dtype, shape, len(shape_expr)


class Plugin:
    """tensorrt.plugin as far as we use it; expressions are ints here."""

    TensorDesc, ShapeExprs, SymIntExprs, SymInt32 = TensorDesc, Expressions, Expressions, int
    KernelLaunchParams, SymExprs = SimpleNamespace, Expressions

    def __init__(self) -> None:
        self.described: dict[str, Callable[..., Any]] = {}
        self.implemented: dict[str, Callable[..., Any]] = {}

    def register(self, identity: str) -> Callable[..., Any]:
        return lambda function: self.described.setdefault(identity, function)

    def aot_impl(self, identity: str) -> Callable[..., Any]:
        return lambda function: self.implemented.setdefault(identity, function)


TRT = SimpleNamespace(
    DataType=SimpleNamespace(**{n: SimpleNamespace(name=n) for n in ("FLOAT", "HALF", "INT64", "INT32", "BOOL")})
)


def desc(kind: str, *shape: int, dynamic: bool = True) -> TensorDesc:
    known = tuple(-1 if dynamic and i == len(shape) - 2 else size for i, size in enumerate(shape))
    return TensorDesc(list(shape), getattr(TRT.DataType, kind), known)


@pytest.fixture(scope="module")
def plugin() -> Plugin:
    made = Plugin()
    ids = aot.register(TRT, made, 89)
    assert {f"saccade::{name}" for name in CALLS} == set(ids) == set(made.described) == set(made.implemented)
    return made


Q, K, GUIDE = desc("HALF", 1, 8, 100, 64), desc("HALF", 1, 2, 300, 64), desc("INT32", 24)
WEIGHT = desc("FLOAT", 1, 24, dynamic=False)
PEAK, TOTAL = desc("FLOAT", 1, 8, 24), desc("FLOAT", 1, 8, 24)
LENGTH = desc("INT64", 1)
CALLS = {
    "KeepTopK": ([desc("FLOAT", 1, 5000), desc("BOOL", 1, 5000), desc("INT32", 400)], [], [((1, 400), "INT64")]),
    "CompactRows": ([desc("HALF", 1, 5000, 64), desc("INT64", 1, 400)], [], [((1, 400, 64), "HALF")]),
    "AttentionReceivedSums": ([Q, K, GUIDE], [0.125], [((1, 8, 24), "FLOAT")] * 2),
    "AttentionReceivedShares": ([Q, K, GUIDE, PEAK, TOTAL], [0.125], [((1, 300), "FLOAT")]),
    "RatedAttentionReceivedSums": ([Q, K, WEIGHT], [0.125], [((1, 8, 24), "FLOAT")] * 2),
    "RatedAttentionReceivedShares": ([Q, K, WEIGHT, PEAK, TOTAL], [0.125], [((1, 300), "FLOAT")]),
    "ReceivedInCacheSums": ([Q, K, GUIDE, LENGTH], [0.125], [((1, 8, 24), "FLOAT")] * 2),
    "ReceivedInCacheShares": ([Q, K, GUIDE, LENGTH, PEAK, TOTAL], [0.125], [((1, 300), "FLOAT")]),
    "RatedReceivedInCacheSums": ([Q, K, WEIGHT, LENGTH], [0.125], [((1, 8, 24), "FLOAT")] * 2),
    "RatedReceivedInCacheShares": ([Q, K, WEIGHT, LENGTH, PEAK, TOTAL], [0.125], [((1, 300), "FLOAT")]),
}
LAUNCHES = {
    "KeepTopK": ((1, 1, 1), 512, [5000, 400]),
    "CompactRows": ((7, 1, 1), 128, [5000, 400, 16]),
    "AttentionReceivedSums": ((6, 2, 1), 128, [bits_of(0.125), 100, 300, 24, 8, 2, 64]),
    "AttentionReceivedShares": ((10, 1, 1), 128, [bits_of(0.125), 100, 300, 24, 8, 2, 64]),
}
LAUNCHES |= {
    f"{op}{half}": LAUNCHES[f"AttentionReceived{half}"]
    for op in ("RatedAttentionReceived", "ReceivedInCache", "RatedReceivedInCache")
    for half in ("Sums", "Shares")
}


@pytest.mark.parametrize("name", CALLS)
def test_the_signature_is_inputs_attributes_outputs_tactic(plugin, name):
    inputs, floats, _ = CALLS[name]
    signature = inspect.signature(plugin.implemented[f"saccade::{name}"])
    annotations = [p.annotation for p in signature.parameters.values()]
    assert annotations[: len(inputs) + len(floats)] == [TensorDesc] * len(inputs) + [float] * len(floats)
    assert list(signature.parameters)[-2:] == ["outputs", "tactic"]
    assert annotations[-1] is int
    text = Union[str, bytes]  # noqa: UP007 (typing's forms are what TensorRT compares with)
    assert signature.return_annotation == Tuple[text, text, SimpleNamespace, Expressions]  # noqa: UP006
    assert annotations[-2] == Tuple[TensorDesc]  # noqa: UP006
    described = inspect.signature(plugin.described[f"saccade::{name}"])
    assert list(described.parameters) == list(signature.parameters)[:-2]


@pytest.mark.parametrize("name", CALLS)
def test_outputs_are_described_by_the_ops_shape_rule(plugin, name):
    inputs, floats, wanted = CALLS[name]
    made = plugin.described[f"saccade::{name}"](*inputs, *floats)
    made = made if isinstance(made, tuple) else (made,)
    assert [(tuple(m.shape_expr), m.dtype.name) for m in made] == wanted


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_takes_inputs_numbers_and_outputs_and_nothing_more(plugin, name):
    inputs, floats, outputs = CALLS[name]
    function, ptx, launch, extra = plugin.implemented[f"saccade::{name}"](*inputs, *floats, outputs=(), tactic=0)
    grid, threads, numbers = LAUNCHES[name]
    assert (launch.grid_x, launch.grid_y, launch.grid_z) == grid
    assert launch.block_x == threads
    assert 0 <= launch.shared_mem <= 48 * 1024
    assert list(extra) == numbers
    [header] = re.findall(rf"\.entry {function}\((.*?)\n\)", ptx, re.DOTALL)
    assert re.findall(r"\.param \.[ub](\d\d)", header) == ["64"] * len(inputs) + ["32"] * len(numbers) + ["64"] * len(
        outputs
    )
    assert ".target sm_89" in ptx


def test_ptx_with_other_parameters_is_refused():
    parameters = ",\n".join(f"\t.param .u64 k_param_{i}" for i in range(3))
    ptx = f".visible .entry k(\n{parameters}\n)\n{{ld [k_param_2]}}"
    with pytest.raises(UsageError, match="has 3 parameters instead of 2 and 2"):
        aot.without_scratch(ptx, "k", 2)
    with pytest.raises(UsageError, match="reads a scratch pointer"):
        aot.without_scratch(ptx, "k", 1)
    assert aot.without_scratch(ptx.replace("ld [k_param_2]", ""), "k", 1) == (
        ".visible .entry k(\n\t.param .u64 k_param_0\n)\n{}"
    )


def test_ptx_that_drivers_do_not_read_is_not_offered():
    with pytest.raises(UsageError, match="not 120"):
        aot.register(TRT, Plugin(), 120)


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("AttentionReceived", ["q", "k", "guide"]),
        ("RatedAttentionReceived", ["q", "k", "weight"]),
        ("RatedReceivedInCache", ["q", "k", "weight", "length"]),
    ],
)
def test_an_attention_node_becomes_the_two_plugins_nodes(op, given):
    asked = {"scale": 0.5, "plugin_namespace": "saccade"}
    node = make_node(op, given, ["r"], domain="saccade", name="n", **asked)
    after = make_node("Identity", ["r"], ["out"])
    model = make_model(make_graph([node, after], "g", [], []))
    assert aot.split_attention(model) == {"n_sums": op, "n_shares": op}
    kept = {"scale": 0.5, "plugin_namespace": b"saccade"}
    made = [
        (n.op_type, list(n.input), list(n.output), {a.name: get_attribute_value(a) for a in n.attribute})
        for n in model.graph.node
    ]
    assert made == [
        (f"{op}Sums", given, ["r_peak", "r_total"], kept),
        (f"{op}Shares", [*given, "r_peak", "r_total"], ["r"], kept),
        ("Identity", ["r"], ["out"], {}),
    ]


def test_every_op_with_a_kernel_has_one_ahead_of_time():
    assert {plugin.op for plugin in aot.PLUGINS} == set(SERVED)


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
@pytest.mark.parametrize("width", [64, 128])
def test_received_attention_fits_what_ptx_may_have(kind: str, width: int) -> None:
    """In every type and in both widths that models have."""
    for op, last in (("AttentionReceived", ()), ("ReceivedInCache", ((1,),))):
        shapes = [(1, 8, 64, width), (1, 2, 1024, width), (16,), *last]
        types = [kind, kind, "i64", "i64"][: len(shapes)]
        for variant in SERVED[op].variants(types, shapes):
            assert aot.ptx_from_variant(variant, 89)[1].shared <= aot.NARROW_SHARED
