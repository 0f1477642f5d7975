"""The exporter's verb."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from graphs.policies import POLICIES


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write; must be empty or absent unless --overwrite. Required unless --in-place.",
)
@click.option(
    "--policy",
    default="sgl",
    show_default=True,
    help=f"Named pruning plan: {', '.join(POLICIES)}; join several with +.",
)
@click.option("--plan", type=click.Path(path_type=Path), metavar="FILE", help="A plan of your own (TOML) instead.")
@click.option(
    "--role",
    type=click.Choice(["small", "large", "alone"]),
    default="large",
    show_default=True,
    help="small: guides another model; large: is guided by one; alone: is pruned by its own attention.",
)
@click.option(
    "--layer-fraction",
    type=float,
    metavar="F",
    help="Prune before layer int(L·f) of L decoder layers, f in [0, 1). [the policy's; sgl: 0.05]",
)
@click.option(
    "--keep",
    type=float,
    metavar="R",
    help="Default share of visual tokens kept, in (0, 1]; each question may choose another. [the policy's; sgl: 0.05]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    help="Type of weights and activations. [float16 if all weights are stored in it, else float32]",
)
@click.option("--in-place", is_flag=True, help="Write the graphs into CHECKPOINT itself; no weight is copied.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("--json", "as_json", is_flag=True, help="Print the spec as one JSON document.")
def export(
    checkpoint: Path,
    out: Path | None,
    policy: str,
    plan: Path | None,
    role: Any,
    layer_fraction: float | None,
    keep: float | None,
    dtype: Any,
    in_place: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn the Hugging Face CHECKPOINT (a local folder) into ONNX stages under a pruning plan."""
    from graphs.versions import require

    given = click.get_current_context().get_parameter_source("policy") is not ParameterSource.DEFAULT
    if plan and given:
        raise click.UsageError("--plan replaces --policy; leave one of them out")
    if plan and (layer_fraction is not None or keep is not None):
        raise click.UsageError(
            "--plan itself says where to prune and how much to keep; leave --layer-fraction and --keep out"
        )
    require("torch", "transformers")
    from exporter.export import export_checkpoint
    from graphs.console import emit_json

    spec = export_checkpoint(
        checkpoint,
        out,
        policy=policy,
        plan=plan,
        role=role,
        dtype=dtype,
        in_place=in_place,
        overwrite=overwrite,
        fraction=layer_fraction,
        keep=keep,
    )
    if as_json:
        emit_json(spec.model_dump(mode="json", by_alias=True))
    else:
        click.echo(out or checkpoint)
