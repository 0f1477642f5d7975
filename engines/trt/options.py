"""What a build of engines is told, for both TensorRTs, and the passes that follow from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from engines.trt.bounds import Bounds
from engines.trt.engine import checked_sms, refuse_missing
from engines.trt.flavour import FLAVOURS, RTX, Flavour
from engines.trt.full import TensorrtOptions, own_sm, refuse_for_parser
from graphs.console import say
from graphs.errors import UsageError
from graphs.lowering import Lowering
from graphs.lowering.roles import Width
from graphs.lowering.weight_only import BITS
from graphs.spec import ExportSpec, FloatType, Parser

PRECISIONS: dict[str, FloatType] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
OPS_CHOICES = ("plugin", "body")


@dataclass(frozen=True)
class EngineOptions:
    """What ``saccade build --target rtx`` or ``tensorrt`` is told.

    sms: compute capabilities, as 89. precision: fp16, bf16 or fp32; int8 or int4 for weights of so many bits and
    fp16 otherwise; None: the export's own. ops: whether plugins are asked to serve the ops that have a kernel, or the
    bodies serve all. tensorrt: what full TensorRT alone is told.
    """

    sms: tuple[int, ...] = ()
    precision: str | None = None
    ops: str = "body"
    bounds: Bounds = field(default_factory=Bounds)
    tensorrt: TensorrtOptions | None = None

    @property
    def full(self) -> TensorrtOptions:
        """What full TensorRT is told, said or not."""
        return self.tensorrt or TensorrtOptions()

    def checked(self, targets: Collection[str] = (RTX.target,)) -> EngineOptions:
        """The same, for targets that have engines.

        Errors: UsageError for a value that is not known, or that no target reads; BackendMissing where a target cannot
        be built here.
        """
        if self.precision is not None and self.precision not in {**PRECISIONS, **BITS}:
            raise UsageError(f"precision {self.precision!r} is not known; choose {', '.join((*PRECISIONS, *BITS))}")
        if self.ops not in OPS_CHOICES:
            raise UsageError(f"ops {self.ops!r} is neither plugin nor body; choose one")
        if "tensorrt" in targets:
            self.full.check(self.ops, self.precision)
        elif self.tensorrt is not None:
            raise UsageError(
                f"options of full TensorRT have no effect on the target {' and '.join(targets)}; leave them out, or "
                "build for --target tensorrt"
            )
        for flavour in (FLAVOURS[target] for target in targets):
            sms = self.sms_for(flavour, alone=len(targets) == 1)
            refuse_missing(flavour)
            if self.sms and not flavour.sms and sms != [*self.sms]:
                say(f"{flavour.title} builds for the GPU that is here, of SM {sms[0]}; --sm is for the other target")
        return self

    def sms_for(self, flavour: Flavour, *, alone: bool = False) -> list[int]:
        """What engines are built for; see ``checked_sms`` and ``own_sm``, which may refuse."""
        if flavour.sms:
            return checked_sms(self.sms)
        return [own_sm(self.sms, self.full, self.ops, alone=alone)]

    def lowering(self, spec: ExportSpec, flavour: Flavour = RTX) -> Lowering:
        """The passes that these options ask for; UsageError where the parser does not take the export's precision."""
        bits = BITS.get(self.precision or "")
        precision = "float16" if bits else PRECISIONS[self.precision] if self.precision else spec.dtype
        parser = self.full.parser if flavour is not RTX else "current"
        refuse_for_parser(parser, self.ops, self.precision or precision)
        return lowering_of(precision, self.ops, parser, bits)


def lowering_of(precision: FloatType, ops: str, parser: Parser, bits: Width | None = None) -> Lowering:
    """The passes for a precision, what serves the ops, a parser, and the bits of weights."""
    if ops == "body":
        return Lowering(precision, parser=parser, bits=bits)
    from plugins.registry import NODE_ATTRIBUTES, ops_with_kernels

    return Lowering(precision, frozenset(ops_with_kernels()), NODE_ATTRIBUTES, parser, bits=bits)
