"""Graph rules: what every export must hold, each with a code; ``check`` prints them, ``build`` insists on them."""

from __future__ import annotations

from pathlib import Path

from graphs.errors import BadArtefact
from graphs.rules import attention, functions, interface, plan, weights
from graphs.rules.rule import Export, Finding, Rule, Stage, export_from_folder

RULES: tuple[Rule, ...] = (
    functions.op_without_body,
    functions.ambiguous_function_name,
    functions.body_of_another_version,
    functions.foreign_op,
    attention.causal_without_past,
    attention.attention_map,
    attention.logits_of_all_rows,
    interface.unused_input,
    interface.interface_differs,
    interface.carrier_values_read,
    weights.path_escapes,
    weights.outside_its_file,
    weights.weight_files_differ,
    weights.weight_in_the_graph,
    weights.weight_stored_twice,
    weights.not_finite,
    plan.prune_points_differ,
    plan.score_differs,
    plan.guidance_differs,
    plan.vision_prune_point_differs,
    functions.unsupported_version,
    functions.invalid_onnx,
)

__all__ = ["RULES", "Export", "Finding", "Rule", "Stage", "export_from_folder", "findings_in", "refuse_findings"]


def findings_in(export: Export) -> list[Finding]:
    """Every finding of every rule, in the rules' order."""
    return [finding for rule in RULES for finding in rule.findings(export)]


def refuse_findings(folder: Path) -> Export:
    """Read an export and run the rules; BadArtefact with the first finding where there is one."""
    export = export_from_folder(folder)
    found = findings_in(export)
    if found:
        more = f" ({len(found) - 1} more: saccade check {folder})" if len(found) > 1 else ""
        raise BadArtefact(f"{folder} breaks graph rule {found[0]}{more}")
    return export
