"""G3xx: the file's inputs and outputs are those spec.json promises, and each input does something."""

from __future__ import annotations

from typing import Any

from graphs.ops import DOMAIN
from graphs.rules.rule import Report, Stage, label, nodes_of, stage_rule
from graphs.spec import TensorSpec, past_names

AGAIN = "export the checkpoint again"
LENGTH_READERS = {"Shape", "Size"}


@stage_rule("G301", "unused input", "remove the input from spec.json and graph, or find the pass that cut it off")
def unused_input(stage: Stage) -> Report:
    """Every graph input is read by a node; only a shape carrier may be unread."""
    carriers = {t.name for t in stage.interface.inputs if t.carrier}
    used = {name for node in nodes_of(stage.model.graph) for name in node.input}
    used |= {output.name for output in stage.model.graph.output}
    for given in stage.model.graph.input:
        if given.name not in used and given.name not in carriers:
            yield f"input {given.name}", "no node reads it"


@stage_rule("G302", "interface differs", AGAIN)
def interface_differs(stage: Stage) -> Report:
    """Names, order, dtypes, ranks and fixed dimensions are those of spec.json; caches are of its language model."""
    yield from _caches_differ(stage)
    graph = stage.model.graph
    constants = {t.name for t in graph.initializer}
    for kind, promised, found in (
        ("inputs", stage.interface.inputs, [i for i in graph.input if i.name not in constants]),
        ("outputs", stage.interface.outputs, list(graph.output)),
    ):
        names, wanted = [f.name for f in found], [p.name for p in promised]
        if names != wanted:
            yield kind, _names_differ(names, wanted)
            continue
        for want, have in zip(promised, found, strict=True):
            if problem := _tensor_differs(want, have):
                yield f"{kind[:-1]} {want.name}", problem


def _caches_differ(stage: Stage) -> Report:
    if not stage.is_decoder:
        return
    language = stage.spec.language
    wanted = {name for layer in range(language.layers) for name in past_names(layer)}
    pasts = {t.name: t.shape for t in stage.interface.inputs if t.name.startswith("past_")}
    if set(pasts) != wanted:
        yield (
            "inputs",
            f"they are caches of {len(pasts) / 2:g} layers, in spec.json the language model has {language.layers}",
        )
    for name, shape in pasts.items():
        if (shape[1:2], shape[3:]) != ((language.kv_heads,), (language.head_dim,)):
            told = f"kv_heads {language.kv_heads} and head_dim {language.head_dim}"
            yield f"input {name}", f"its shape is {list(shape)}, the language model of spec.json has {told}"
            return


def _names_differ(names: list[str], wanted: list[str]) -> str:
    missing, extra = [n for n in wanted if n not in names], [n for n in names if n not in wanted]
    if missing or extra:
        return f"spec.json also has {missing or 'nothing'}, the file also has {extra or 'nothing'}"
    place = next(i for i, (a, b) in enumerate(zip(names, wanted, strict=True)) if a != b)
    return f"number {place} is {names[place]}, in spec.json {wanted[place]}"


def _tensor_differs(want: TensorSpec, have: Any) -> str | None:
    import onnx

    tensor = have.type.tensor_type
    kinds = {t: onnx.helper.tensor_dtype_to_np_dtype(t).name for t in (1, 6, 7, 9, 10)} | {16: "bfloat16"}
    if (dtype := kinds.get(tensor.elem_type, str(tensor.elem_type))) != want.dtype:
        return f"it is {dtype}, in spec.json {want.dtype}"
    if not tensor.HasField("shape"):
        return "it has no shape in the file"
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    fixed = [d if isinstance(d, int) else None for d in shape]
    if fixed != [d if isinstance(d, int) else None for d in want.shape]:
        return f"its shape is {shape}, in spec.json {list(want.shape)}"
    return None


@stage_rule("G303", "carrier's values read", "read only the carrier's length; its values are undefined")
def carrier_values_read(stage: Stage) -> Report:
    """A shape carrier goes into Shape or into an op of ours, never where its values matter."""
    carriers = {t.name for t in stage.interface.inputs if t.carrier}
    for node in nodes_of(stage.model.graph):
        if node.domain == DOMAIN or node.op_type in LENGTH_READERS:
            continue
        for name in sorted(carriers.intersection(node.input)):
            yield label(node), f"it reads the values of {name}"
