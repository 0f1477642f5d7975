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
    carried_body: the same with a Loop that carries its output and stacks nothing; '' where the body stacks nothing.
    """

    name: str
    body: str
    define: Callable[[], Any]
    flat_body: str = ""
    carried_body: str = ""

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
    def carried_function(self) -> Any:
        """``carried_body`` as onnx.FunctionProto; the body where that stacks nothing."""
        import onnx.parser

        return onnx.parser.parse_function(self.carried_body or self.body)

    @cached_property
    def torch_op(self) -> Any:
        """The torch custom op, registered on first use."""
        return self.define()
