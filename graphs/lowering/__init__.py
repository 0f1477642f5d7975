"""From the canonical graphs to what one target parses: a short, ordered list of passes, on this page.

0. ``WeightOnly``     where asked: weights of 8 or 4 bits behind a DequantizeLinear
1. ``Precision``      weights, activations and caches in one float type, islands of fp32 written out
2. ``CacheInPlace``   where asked: caches of fixed capacity, written in place by TensorScatter, masked by their length
3. ``ExplicitMask``   elsewhere: one-output attention behind a Concat, causality as a boolean mask
4. ``FlatBodies``     bodies without a Loop, on which TensorRT-RTX 1.7's compiler dies (signal 11) behind an attention
5. ``AskForPlugins``  which nodes of ours a plugin is asked to serve; the others are served by their bodies
6. ``older_parser``   for TensorRT 10.3: what its parser does not know, written out in what it does

A lowered file equals the canonical one in ONNX Runtime, up to the precision. No pass reads or copies a weight; those
that are made of an export's are written when all stages are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphs.errors import OperationFailed
from graphs.lowering.attention import ExplicitMask
from graphs.lowering.derived import DerivedWeights
from graphs.lowering.flat import FlatBodies
from graphs.lowering.in_place import CacheInPlace
from graphs.lowering.precision import Precision, Rebind
from graphs.lowering.roles import Width, width_of
from graphs.lowering.served import AskForPlugins
from graphs.lowering.weight_only import WeightOnly
from graphs.spec import CacheForm, FloatType, Parser

ONNX_TYPES: dict[FloatType, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Lowering:
    """What a target wants.

    precision: the narrow type. plugin_ops: ops that a plugin is asked to serve, with the node attributes that ask for
    it. parser: ``10.3`` for TensorRT 10.3, which takes no plugins of ours. capacity: rows of the decoder's
    caches, which are then written in place (``graphs.lowering.in_place.refusal`` must have no objection); None: they
    are concatenated, and as long as they are filled. bits: of the weights of products; None: they are in ``precision``.
    """

    precision: FloatType
    plugin_ops: frozenset[str] = frozenset()
    plugin_attributes: Mapping[str, str] = field(default_factory=dict)
    parser: Parser = "current"
    capacity: int | None = None
    bits: Width | None = None

    @property
    def cache(self) -> CacheForm:
        """The form of the decoder's cache."""
        return "in-place" if self.capacity else "concat"

    def apply(self, model: ir.Model, rebind: Rebind, derived: DerivedWeights | None = None) -> ir.Model:
        """Lower one stage; OperationFailed where a graph is not what the exporter writes.

        rebind: gives the place of a weight in the wanted type (``ConvertedWeights.rebind``). derived: where weights of
        fewer bits go.
        """
        narrow = ONNX_TYPES[self.precision]
        passes = ir.passes.Sequential(
            *([WeightOnly(derived, narrow, width_of(model, self.bits))] if self.bits and derived else []),
            Precision(narrow, rebind),
            *([CacheInPlace("scattered", self.capacity)] if self.capacity else []),
            ExplicitMask(),
            FlatBodies(),
            AskForPlugins(self.plugin_ops, self.plugin_attributes),
        )
        try:
            lowered = passes(model).model
        except (ir.passes.PassError, ir.passes.InvariantError) as e:
            cause = e.__cause__ or e
            raise OperationFailed(f"a graph cannot be lowered ({cause}); export the checkpoint again") from e
        if self.parser == "current":
            return lowered
        from graphs.lowering.older_parser import written_out

        return written_out(lowered)
