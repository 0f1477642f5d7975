"""What a parser made of a lowered file, read back from the network: without a GPU this reading is the test.

Legend: T keys of an attention, of which P are cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graphs.errors import OperationFailed

Served = Literal["kernel", "body"]
GROWING = ("CONCATENATION", "KV_CACHE_UPDATE")  # kinds of layers


@dataclass(frozen=True)
class Attention:
    """One attention layer: its causality (NONE, for it is in the mask), its mask input, and where its keys come from.

    cache: the network's input whose rows are the first of the keys, '' where there is none (a tower). grown: the kind
    of layer that puts the chunk behind them, CONCATENATION or KV_CACHE_UPDATE. rows: how long that input is, −1 where
    it is dynamic, 0 where there is none.
    """

    node: str
    causal: str
    mask: str
    cache: str
    grown: str = ""
    rows: int = 0

    def document(self) -> dict[str, str | int]:
        """As JSON writes it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Reading:
    """served: node of ours → kernel or body. unused: inputs that no layer reads. layers: kind → how many."""

    served: dict[str, Served]
    attentions: tuple[Attention, ...]
    unused: tuple[str, ...]
    layers: dict[str, int]

    def document(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {**vars(self), "attentions": [a.document() for a in self.attentions], "unused": list(self.unused)}


def reading_from(document: dict[str, Any]) -> Reading:
    """A reading as another process wrote it."""
    attentions = tuple(Attention(**found) for found in document["attentions"])
    return Reading(document["served"], attentions, tuple(document["unused"]), document["layers"])


def reading_of(trt: Any, network: Any, ops: Mapping[str, str]) -> Reading:
    """Read a parsed network; ``ops`` are the file's nodes of our domain, name → op.

    OperationFailed for a node that no layer serves, and for an attention that is causal by a flag.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {output.name: layer for layer in layers for output in tensors_of(layer, outputs=True)}
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer.type.name] = counts.get(layer.type.name, 0) + 1
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # which 10.3 does not know
    attentions = tuple(_attention(trt, layer, makers) for layer in layers if kind is not None and layer.type == kind)
    for found in attentions:
        if found.causal != "NONE":
            raise OperationFailed(
                f"the parser made {found.node} causal ({found.causal}), which misreads a cache; report this with the "
                "file"
            )
    read = {tensor.name for layer in layers for tensor in tensors_of(layer)}
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    return Reading(
        served=_served(trt, layers, ops),
        attentions=attentions,
        unused=tuple(name for name in inputs if name not in read),
        layers=counts,
    )


def tensors_of(layer: Any, *, outputs: bool = False) -> Iterator[Any]:
    """A layer's inputs, or outputs, those that are there."""
    count, get = (layer.num_outputs, layer.get_output) if outputs else (layer.num_inputs, layer.get_input)
    for i in range(count):
        tensor = get(i)
        if tensor is not None:
            yield tensor


def _served(trt: Any, layers: list[Any], ops: Mapping[str, str]) -> dict[str, Served]:
    """The parser notes each layer's node as ``[ONNX Layer: inner | node (Function)]``; a plugin's has no function."""
    served: dict[str, Served] = {}
    for layer in layers:
        said = str(layer.metadata).removeprefix("[ONNX Layer: ").rstrip("]")
        *_, last = said.split(" | ")
        node = last.partition(" (")[0]
        if node in ops:
            served[node] = "kernel" if layer.type == trt.LayerType.PLUGIN_V3 else "body"
    if lost := sorted(set(ops) - set(served)):
        raise OperationFailed(f"the parser left {ops[lost[0]]} {lost[0]} to no layer; report this with the file")
    return served


def _attention(trt: Any, layer: Any, makers: dict[str, Any]) -> Attention:
    layer.__class__ = trt.IAttentionInputLayer
    attention = layer.attention
    mask = attention.mask
    keys = attention.get_input(1)
    # The parser scales the keys (by the root of the scale) before the layer.
    while keys is not None and keys.name in makers and makers[keys.name].type == trt.LayerType.ELEMENTWISE:
        keys = makers[keys.name].get_input(0)
    maker = makers.get(keys.name) if keys is not None else None
    grown = maker.type.name if maker is not None and maker.type.name in GROWING else ""
    first = maker.get_input(0) if maker is not None and grown else None
    cache = first if first is not None and first.is_network_input else None
    name, rows = (cache.name, int(cache.shape[2])) if cache is not None else ("", 0)
    kind = attention.causal_kind.name
    return Attention(attention.name, kind, mask.name if mask is not None else "", name, grown, rows)
