"""What each kind of TensorRT layer computes, in numpy: the interpreter's table.

By the semantics that TensorRT's operator reference documents (docs.nvidia.com/deeplearning/tensorrt, "Operators", and
the docstrings of the bindings). Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Values = list[np.ndarray]
KINDS: dict[str, Callable[..., Values]] = {}


def kind(name: str, binding: str) -> Callable[[Callable[..., Values]], Callable[..., Values]]:
    """Register what runs layers of a kind; ``binding`` is the class that shows such a layer's parameters."""

    def note(function: Callable[..., Values]) -> Callable[..., Values]:
        KINDS[name] = function
        function.binding = binding  # type: ignore[attr-defined]
        return function

    return note


def dtype_of(kind_of_data: Any) -> Any:
    names = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool", "INT8": "int8"}
    return ml_dtypes.bfloat16 if kind_of_data.name == "BF16" else np.dtype(names[kind_of_data.name])


def axes_of(mask: int, rank: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if mask >> i & 1)


@kind("CONSTANT", "IConstantLayer")
def constant(layer: Any, inputs: Values) -> Values:
    dtype = dtype_of(layer.get_output(0).dtype)
    return [np.asarray(layer.weights).astype(dtype).reshape(tuple(layer.shape))]


@kind("CAST", "ICastLayer")
def cast(layer: Any, inputs: Values) -> Values:
    return [inputs[0].astype(dtype_of(layer.to_type))]


@kind("IDENTITY", "IIdentityLayer")
def identity(layer: Any, inputs: Values) -> Values:
    return [inputs[0].astype(dtype_of(layer.get_output(0).dtype))]


@kind("SHAPE", "IShapeLayer")
def shape(layer: Any, inputs: Values) -> Values:
    return [np.array(inputs[0].shape, np.int64)]


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers are divided towards zero."""
    return (np.trunc(a / b)).astype(a.dtype) if a.dtype.kind == "i" else a / b


ELEMENTWISE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "SUB": np.subtract,
    "DIV": quotient,
    "POW": np.power,
    "FLOOR_DIV": np.floor_divide,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}


@kind("ELEMENTWISE", "IElementWiseLayer")
def elementwise(layer: Any, inputs: Values) -> Values:
    a, b = inputs
    assert a.ndim == b.ndim, "TensorRT broadcasts lengths of 1, never ranks"
    assert a.dtype == b.dtype, "a strongly typed network mixes no types"
    return [ELEMENTWISE[layer.op.name](a, b)]


UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "EXP": np.exp,
    "SQRT": np.sqrt,
    "RECIP": np.reciprocal,
    "ABS": np.abs,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "NOT": np.logical_not,
    "ISNAN": np.isnan,
}


@kind("UNARY", "IUnaryLayer")
def unary(layer: Any, inputs: Values) -> Values:
    return [UNARY[layer.op.name](inputs[0])]


ACTIVATION: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "SIGMOID": lambda x: (1 / (1 + np.exp(-x.astype(np.float32)))).astype(x.dtype),
    "RELU": lambda x: np.maximum(x, x.dtype.type(0)),
    "TANH": np.tanh,
}


@kind("ACTIVATION", "IActivationLayer")
def activation(layer: Any, inputs: Values) -> Values:
    return [ACTIVATION[layer.type.name](inputs[0])]


@kind("SELECT", "ISelectLayer")
def select(layer: Any, inputs: Values) -> Values:
    return [np.where(*inputs)]


@kind("CONCATENATION", "IConcatenationLayer")
def concatenation(layer: Any, inputs: Values) -> Values:
    return [np.concatenate(inputs, axis=layer.axis)]


@kind("UNSQUEEZE", "IUnsqueezeLayer")
def unsqueeze(layer: Any, inputs: Values) -> Values:
    return [np.expand_dims(inputs[0], tuple(int(i) for i in inputs[1]))]


@kind("SQUEEZE", "ISqueezeLayer")
def squeeze(layer: Any, inputs: Values) -> Values:
    return [np.squeeze(inputs[0], tuple(int(i) for i in inputs[1]) if len(inputs) > 1 else None)]


@kind("SHUFFLE", "IShuffleLayer")
def shuffle(layer: Any, inputs: Values) -> Values:
    """Transpose, reshape, transpose; a length 0 copies the input's where the layer says so, −1 is what is left."""
    x = inputs[0]
    x = x.transpose(list(layer.first_transpose)[: x.ndim])
    wanted = [int(n) for n in inputs[1]] if len(inputs) > 1 else reshape_of(layer)
    if wanted is not None:
        if layer.zero_is_placeholder:
            wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        if -1 in wanted:
            known = int(np.prod([n for n in wanted if n != -1]))
            wanted[wanted.index(-1)] = x.size // known if known else 0
        x = x.reshape(wanted)
    return [x.transpose(list(layer.second_transpose)[: x.ndim])]


def reshape_of(layer: Any) -> list[int] | None:
    """The wanted shape where it is known when the network is made; None for a layer that only transposes."""
    try:
        return None if layer.reshape_dims is None else list(layer.reshape_dims)
    except ValueError:  # the bindings' word for no reshape
        return None


@kind("SLICE", "ISliceLayer")
def slice_(layer: Any, inputs: Values) -> Values:
    assert layer.mode.name in ("STRICT_BOUNDS", "DEFAULT"), layer.mode
    x = inputs[0]
    given: list[list[int]] = []
    for i, parameter in enumerate(("start", "shape", "stride"), start=1):
        there = layer.num_inputs > i and layer.get_input(i) is not None
        given.append([int(n) for n in (inputs[i] if there else getattr(layer, parameter))])
    start, size, stride = given
    assert layer.num_inputs < 6 or layer.get_input(5) is None, "axes as a tensor"
    axes = list(layer.axes or ()) or range(x.ndim)
    for axis, first, length, pace in zip(axes, start, size, stride, strict=True):
        x = np.take(x, first + pace * np.arange(length), axis=axis)
    return [x]


@kind("GATHER", "IGatherLayer")
def gather(layer: Any, inputs: Values) -> Values:
    data, index = inputs
    batch = layer.num_elementwise_dims
    if layer.mode.name == "DEFAULT":
        assert batch == 0
        return [np.take(data, index, axis=layer.axis)]
    if layer.mode.name == "ELEMENT":
        return [np.take_along_axis(data, index, axis=layer.axis)]
    assert layer.mode.name == "ND"
    rows = np.indices(index.shape[:-1])[:batch]
    return [data[(*rows, *np.moveaxis(index, -1, 0))]]


@kind("FILL", "IFillLayer")
def fill(layer: Any, inputs: Values) -> Values:
    """LINSPACE: alpha + beta · i along the axis of beta, both given as tensors or as numbers."""
    assert layer.operation.name == "LINSPACE"
    there = [layer.num_inputs > i and layer.get_input(i) is not None for i in range(3)]
    lengths = [int(n) for n in (inputs[0] if there[0] else layer.shape)]
    assert len(lengths) == 1
    alpha = inputs[1] if there[1] else layer.alpha
    beta = inputs[2].reshape(()) if there[2] else layer.beta
    dtype = dtype_of(layer.get_output(0).dtype)
    return [(alpha + beta * np.arange(lengths[0])).astype(dtype)]


REDUCE = {"SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean}


@kind("REDUCE", "IReduceLayer")
def reduce(layer: Any, inputs: Values) -> Values:
    axes = axes_of(layer.axes, inputs[0].ndim)
    return [REDUCE[layer.op.name](inputs[0], axis=axes, keepdims=layer.keep_dims).astype(inputs[0].dtype)]


@kind("SOFTMAX", "ISoftMaxLayer")
def softmax(layer: Any, inputs: Values) -> Values:
    return [softmax_over(inputs[0], axes_of(layer.axes, inputs[0].ndim))]


def softmax_over(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    power = np.exp(x - x.max(axis=axes, keepdims=True))
    return power / power.sum(axis=axes, keepdims=True)


@kind("TOPK", "ITopKLayer")
def topk(layer: Any, inputs: Values) -> Values:
    """The k best along one axis, in order; which of equals comes first is not documented, here the lower index."""
    x, count = inputs[0], int(inputs[1]) if len(inputs) > 1 else layer.k
    [axis] = axes_of(layer.axes, x.ndim)
    order = np.argsort(-x if layer.op.name == "MAX" else x, axis=axis, kind="stable").take(range(count), axis=axis)
    return [np.take_along_axis(x, order, axis=axis), order.astype(dtype_of(layer.get_output(1).dtype))]


@kind("MATRIX_MULTIPLY", "IMatrixMultiplyLayer")
def matrix_multiply(layer: Any, inputs: Values) -> Values:
    """Products over the last two axes, sums in fp32."""
    sides = []
    for x, operation in zip(inputs, (layer.op0, layer.op1), strict=True):
        assert operation.name in ("NONE", "TRANSPOSE"), operation
        sides.append(np.swapaxes(x, -1, -2) if operation.name == "TRANSPOSE" else x)
    return [np.matmul(*(x.astype(np.float32) for x in sides)).astype(inputs[0].dtype)]


@kind("ATTENTION_INPUT", "IAttentionInputLayer")
def attention(layer: Any, inputs: Values) -> Values:
    """softmax(q kᵀ) v in fp32; query head h reads key-value head h // (H/V). A boolean mask keeps where it is true."""
    settings = layer.attention
    assert settings.norm_op.name == "SOFTMAX"
    assert settings.causal_kind.name == "NONE"
    assert settings.key_value_lengths is None
    q, k, v = (x.astype(np.float32) for x in inputs[:3])
    groups = q.shape[1] // k.shape[1]
    logit_BHST = q @ np.repeat(k, groups, axis=1).swapaxes(-1, -2)
    if settings.mask is not None:
        mask = inputs[3]
        logit_BHST = np.where(mask, logit_BHST, -np.inf) if mask.dtype == bool else logit_BHST + mask
    out = softmax_over(logit_BHST, (3,)) @ np.repeat(v, groups, axis=1)
    return [out.astype(inputs[0].dtype)]


@kind("KV_CACHE_UPDATE", "IKVCacheUpdateLayer")
def kv_cache_update(layer: Any, inputs: Values) -> Values:
    """The cache [B,V,C,D] with the update [B,V,S,D] written from row write_indices[b] on; C is static."""
    cache, update, index_B = inputs
    assert layer.cache_mode.name == "LINEAR"
    assert layer.update_form.name == "PADDED_BHND"
    assert layer.get_input(0).shape[2] == cache.shape[2], "the capacity must be known when the network is made"
    out = cache.copy()
    for b, first in enumerate(index_B):
        assert first + update.shape[2] <= cache.shape[2], "written behind the buffer's end"
        out[b, :, first : first + update.shape[2]] = update[b]
    return [out]


@kind("ATTENTION_OUTPUT", "IAttentionOutputLayer")
def attention_output(layer: Any, inputs: Values) -> Values:
    return [inputs[0]]
