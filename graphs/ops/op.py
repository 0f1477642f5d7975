"""What an op is: a name, a body in ONNX's own text form, and a torch meaning that is traced as one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

DOMAIN = "saccade"
VERSION = 1
BODY_OPSET = 23


@dataclass(frozen=True)
class Op:
    """One op of domain ``saccade``.

    name: unique in any model and no standard op's name, for TensorRT-RTX looks functions up by name alone.
    body: an ONNX FunctionProto in onnx.parser's text form.
    define: registers the torch custom op (meaning and fake) and returns it; imports torch, so call it late.
    flat_body: the same meaning without a Loop, for a compiler that fails on one; '' where the body has none.
    scores: the inputs that are scores, sizes or weights of rows: fp32, whatever the others are in.
    carries: whether its first output has the type of its first input; every other float output is fp32.
    ranks: whether it chooses rows by a TopK over a chunk's, as a prune point of the decoder does.
    in_cache: the op that means the same over a cache written in place; '' where there is none.
    """

    name: str
    body: str
    define: Callable[[], Any]
    flat_body: str = ""
    scores: tuple[int, ...] = ()
    carries: bool = False
    ranks: bool = False
    in_cache: str = ""

    @cached_property
    def function(self) -> Any:
        """The body as onnx.FunctionProto."""
        import onnx.parser

        return onnx.parser.parse_function(self.body)

    @cached_property
    def flat_function(self) -> Any:
        """``flat_body`` as onnx.FunctionProto; the body where that has no Loop."""
        import onnx.parser

        return onnx.parser.parse_function(self.flat_body or self.body)

    @cached_property
    def torch_op(self) -> Any:
        """The torch custom op, registered on first use."""
        return self.define()
