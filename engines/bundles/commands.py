"""The verbs about artefacts: check, build, verify, pack, unpack, and what show tells of bundles, ops and machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engines.bundles.engine_options import engine_options, engine_options_from
from engines.options import target_option
from graphs.console import emit, emit_json, step

if TYPE_CHECKING:
    from engines.bundles.manifest import Manifest

folder_type = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.command()
@click.argument("folder", metavar="DIR", type=folder_type)
@json_option
def check(folder: Path, as_json: bool) -> None:
    """Run the graph rules over the export in DIR and replay its golden tensors on the CPU."""
    from engines.bundles.golden import refuse_disagreement, replay
    from engines.words import replays_in_words
    from graphs.errors import BadArtefact
    from graphs.rules import RULES, export_from_folder, findings_in

    with step("graph rules"):
        export = export_from_folder(folder)
        found = findings_in(export)
    replays = []
    if not found:
        with step("golden replay"):
            replays = list(replay(folder, export.spec))
    if as_json:
        emit_json(
            {
                "schema": "saccade.check/1",
                "folder": folder,
                "rules": len(RULES),
                "findings": [vars(finding) for finding in found],
                "replays": [replayed.document() for replayed in replays],
            }
        )
    else:
        _print([f"{finding}" for finding in found] or [f"{len(RULES)} graph rules hold", *replays_in_words(replays)])
    if found:
        raise BadArtefact(
            f"{folder} breaks {len(found)} graph rule(s), first {found[0].code}; export the checkpoint again"
        )
    refuse_disagreement(replays, str(folder))


@click.command()
@click.argument("folders", metavar="SMALL [LARGE]", type=folder_type, nargs=-1, required=True)
@click.option("-o", "--out", "out", type=folder_type, required=True, metavar="BUNDLE", help="The folder to write.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("cpu",),
    metavar="NAME",
    help="cpu, openvino, cuda, ort-tensorrt, ort-rtx, rtx or tensorrt; repeatable. [cpu]",
)
@click.option(
    "--threshold",
    type=float,
    metavar="S",
    help="Keep the small model's answer if its score is above this, in [0, 1]. [0.9, or the given bundle's]",
)
@click.option("--overwrite", is_flag=True, help="Replace an older bundle.")
@engine_options
@json_option
def build(
    folders: tuple[Path, ...],
    out: Path,
    targets: tuple[str, ...],
    threshold: float | None,
    overwrite: bool,
    as_json: bool,
    **of_engines: Any,
) -> None:
    """Turn a SMALL and a LARGE export (in any order), or one export alone, into a bundle for one target or several.

    An older bundle may stand in their place where it holds canonical graphs, as one for cpu without --precision does:
    say, on the device that engines are to be for. It brings its threshold, not its calibrations.
    """
    from engines.bundles.build import build_bundle
    from engines.bundles.jobs import split_precision
    from graphs.console import say

    packed, of_engines["precision"] = split_precision(targets, of_engines["precision"])
    options = engine_options_from(**of_engines)
    manifest = build_bundle(
        folders, out, target=targets, threshold=threshold, overwrite=overwrite, engines=options, precision=packed
    )
    for name, member in manifest.members.items():
        for target, entry in member.targets.items():
            for op, by in entry.ops.items() if entry.engines else ():
                how = "a plugin kernel" if by == "kernel" else "standard ONNX (its body)"
                say(f"{name} on {target}: {op} runs as {how}")
    if as_json:
        emit_json({**manifest.model_dump(mode="json", by_alias=True), "path": out})
    else:
        click.echo(out)


@click.command()
@click.argument("folder", metavar="EXPORT", type=folder_type)
@click.option("-o", "--out", "out", type=folder_type, required=True, metavar="DIR", help="The folder to write.")
@click.option("--precision", metavar="P", help="fp16, bf16 or fp32; int8 or int4 weights. [the export's]")
@click.option(
    "--ops",
    metavar="HOW",
    default="body",
    show_default=True,
    help="Custom ops as plugin nodes (plugin) or standard ONNX (body).",
)
@click.option("--parser", metavar="V", default="current", show_default=True, help="current, or 10.3 for JetPack 6.")
@click.option("--overwrite", is_flag=True, help="Replace an older folder.")
@json_option
def lower(
    folder: Path, out: Path, precision: str | None, ops: str, parser: Any, overwrite: bool, as_json: bool
) -> None:
    """Write the ONNX files that TensorRT parses for an EXPORT, for trtexec, polygraphy or a build elsewhere."""
    from engines.trt.member import lower_for_others

    lowered = lower_for_others(folder, out, precision, ops, parser, overwrite)
    if as_json:
        emit_json({"schema": "saccade.lowered/1", "path": out, "spec": lowered.model_dump(mode="json", by_alias=True)})
    else:
        click.echo(out)


@click.command()
@click.argument("bundle", type=folder_type)
@target_option
@json_option
def verify(bundle: Path, target: str | None, as_json: bool) -> None:
    """Replay a BUNDLE's golden tensors through its engines, after checking every file's digest."""
    from functools import partial

    from engines.bundles.bundle import open_bundle
    from engines.bundles.golden import refuse_disagreement, replay
    from engines.bundles.losses import replay_with_losses
    from engines.sessions.session import open_session
    from engines.words import replays_in_words

    with step("checking digests"):
        opened = open_bundle(bundle, target=target)
    replays = {}
    for name, member in opened.members.items():
        # As ``engines.model`` opens them, so that what is replayed is what runs.
        open_stage = partial(
            open_session, target=opened.target, engines=member.engines, in_place=True, dtype=member.spec.dtype
        )
        with step(f"golden replay of the {name} model"):
            losses = opened.manifest.members[name].targets[opened.target].losses  # type: ignore[index]
            replays[name] = list(
                replay_with_losses(member.folder, member.spec, losses, open_stage)
                if losses
                else replay(member.folder, member.spec, open_stage)
            )
    if as_json:
        models = {name: [replayed.document() for replayed in of_one] for name, of_one in replays.items()}
        emit_json({"schema": "saccade.verify/1", "bundle": bundle, "target": opened.target, "models": models})
    else:
        files = f"{len(opened.manifest.files)} files are as they were built"
        _print([files, *(line for name, of_one in replays.items() for line in replays_in_words(of_one, name))])
    for name, of_one in replays.items():
        refuse_disagreement(of_one, f"{bundle}, {name} model")


@click.command()
@click.argument("bundle", type=folder_type)
@click.option("-o", "--out", "out", type=folder_type, required=True, metavar="FILE", help="The file to write.")
@click.option("--overwrite", is_flag=True, help="Replace an older file.")
@json_option
def pack(bundle: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a BUNDLE as one file, every digest checked on the way."""
    from engines.bundles.pack import pack_bundle

    _packed(pack_bundle(bundle, out, overwrite=overwrite), out, "saccade.packed/1", as_json)


@click.command()
@click.argument("file", type=folder_type)
@click.option("-o", "--out", "out", type=folder_type, required=True, metavar="BUNDLE", help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace an older bundle.")
@json_option
def unpack(file: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Restore a bundle from a FILE that saccade pack wrote; every digest is checked before the folder appears."""
    from engines.bundles.pack import unpack_bundle

    _packed(unpack_bundle(file, out, overwrite=overwrite), out, "saccade.unpacked/1", as_json)


def _packed(manifest: Manifest, out: Path, schema: str, as_json: bool) -> None:
    if as_json:
        files = {"files": len(manifest.files), "content_bytes": sum(entry.bytes for entry in manifest.files)}
        emit_json({"schema": schema, "path": out, "manifest_sha256": manifest.sha256, **files})
    else:
        click.echo(out)


@click.command("bundle")
@click.argument("bundle", type=folder_type)
@json_option
def show_bundle(bundle: Path, as_json: bool) -> None:
    """Show what a BUNDLE holds: models, plans, and for each target its stages, how ops run, and estimated memory."""
    from engines.bundles.bundle import checked_manifest
    from engines.words import bundle_in_words

    manifest = checked_manifest(bundle, check="size")
    if as_json:
        emit_json({**manifest.model_dump(mode="json", by_alias=True), "path": bundle})
    else:
        _print(bundle_in_words(bundle, manifest))


@click.command("ops")
@json_option
def show_ops(as_json: bool) -> None:
    """List Saccade's custom ONNX ops, and for each target whether kernel or body runs them here, and why the body."""
    from engines.words import columns, op_documents, op_rows

    documents = op_documents()
    if as_json:
        emit_json({"schema": "saccade.ops/1", "ops": documents})
    else:
        _print(columns(op_rows(documents)))


@click.command("families")
@json_option
def show_families(as_json: bool) -> None:
    """List the model families that are supported, and those that are not, with the reason."""
    from engines.words import columns
    from graphs.families import KNOWN, REFUSED, documents

    if as_json:
        emit_json({"schema": "saccade.families/1", "families": documents()})
        return
    _print(columns([(f.name, f.architecture, f.example, f.image) for f in KNOWN]))
    _print([f"{f.name}: {f.note}" for f in KNOWN if f.note])
    _print([f"{f.name}: no score '{score}' ({why})" for f in KNOWN for score, why in f.refuses.items()])
    _print([f"not supported: {r.name} ({r.architecture}): {r.reason}" for r in REFUSED])


@click.command("policies")
@click.option("--layers", default=48, show_default=True, help="Layers of the example model.")
@json_option
def show_policies(layers: int, as_json: bool) -> None:
    """List the pruning policies and what each does in a model of each role."""
    from engines.words import policy_documents

    documents = policy_documents(layers)
    if as_json:
        emit_json({"schema": "saccade.policies/1", "layers": layers, "policies": documents})
        return
    for document in documents:
        roles: dict[str, Any] = document["roles"]
        click.echo(f"{document['policy']}: {document['meaning']}")
        if document["source"]:
            click.echo(f"  source: {document['source']}")
        _print([f"  {role}: {line}" for role, lines in roles.items() for line in lines])


@click.command("machine")
@json_option
def show_machine(as_json: bool) -> None:
    """Show what this machine can run and what is not installed."""
    from engines.sessions.machine import machine_document, machine_in_words

    emit(machine_document(), as_json, machine_in_words)


def _print(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
