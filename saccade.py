"""The front door: every verb of the command line and every name of the Python API, loaded on first use.

Nothing heavy is imported here. ``VERBS`` and ``PUBLIC`` say where a thing lives; the rooms hold
the things themselves. stdout is the result, stderr the talk; the exit codes are those of
``graphs.errors``: 0 done, 1 the operation failed, 2 usage, 3 the artefact is bad, 4 this machine
lacks the backend (and 130 for an interrupt).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click

# built-in questions → the function of their number that makes them, as mappings with the keys of a JSONL line
QUESTIONS = {"glyphs": "glyphs.data:held_out_records"}
EVAL_QUESTIONS = {"glyphs": "glyphs.data:eval_records"}  # others than a threshold is calibrated on


class Verb(NamedTuple):
    """A verb of the command line.

    place: where its click command lives. line: what stands in ``saccade --help``. torch: whether it uses torch in its
    own process; every other verb is spared the import. questions: the built-in sets that it may be asked by name.
    """

    place: str
    line: str
    torch: bool = False
    questions: Mapping[str, str] = {}


VERBS = {
    "export": Verb("exporter.commands:export", "Turn a checkpoint into ONNX stages under a pruning plan.", torch=True),
    "check": Verb("engines.bundles.commands:check", "Run the graph rules and replay the golden tensors on the CPU."),
    "build": Verb("engines.bundles.commands:build", "Turn one or two exports into a bundle for a target."),
    "lower": Verb("engines.bundles.commands:lower", "Write the ONNX files that TensorRT parses for an export."),
    "verify": Verb("engines.bundles.commands:verify", "Replay a bundle's golden tensors through its engines."),
    "calibrate": Verb(
        "engines.calibration.commands:calibrate",
        "Find an exit threshold with a guaranteed bound on the loss.",
        questions=QUESTIONS,
    ),
    "pack": Verb("engines.bundles.commands:pack", "Write a bundle as one file, every digest checked."),
    "unpack": Verb("engines.bundles.commands:unpack", "Restore a bundle from one file, every digest checked."),
    "eval": Verb(
        "engines.evaluation.commands:evaluate",
        "Ask every question under every setting, and score each setting.",
        questions=EVAL_QUESTIONS,
    ),
    "tune": Verb(
        "engines.tuning.commands:tune",
        "Find where and how much to prune for the least time within a loss.",
        questions=QUESTIONS,
    ),
    "run": Verb("engines.commands:run", "Ask a bundle a question about an image."),
    "chat": Verb("engines.commands:chat", "Talk with a bundle over several turns."),
    "show": Verb(f"{__name__}:show", "Show a bundle, kept tokens, families, policies, formats, ops or this machine."),
    "demo": Verb("glyphs.demo:demo_command", "Export, build and run the shipped pair of small models.", torch=True),
}

# what comes behind ``show``
SHOWS = {
    "kept": Verb("engines.commands:show_kept", "Draw what the large model keeps of an image, and the guidance."),
    "bundle": Verb("engines.bundles.commands:show_bundle", "Show what a bundle holds (also: saccade show BUNDLE)."),
    "families": Verb("engines.bundles.commands:show_families", "List the model families, supported and not."),
    "policies": Verb("engines.bundles.commands:show_policies", "List the pruning policies."),
    "formats": Verb("engines.evaluation.commands:show_formats", "List the benchmarks that `eval --format` reads."),
    "ops": Verb("engines.bundles.commands:show_ops", "List Saccade's custom ONNX ops."),
    "machine": Verb("engines.bundles.commands:show_machine", "Show what this machine can run."),
}

# public name → where it lives
PUBLIC = {
    "Cascade": "engines.cascade:Cascade",
    "export": "exporter.export:export_checkpoint",
    "build": "engines.bundles.build:build_bundle",
    "show_kept_tokens": "engines.picture:show_kept_tokens",
    "Reference": "exporter.reference:Reference",
    "SaccadeError": "graphs.errors:SaccadeError",
}

__all__ = ["Cascade", "Reference", "SaccadeError", "build", "export", "main", "show_kept_tokens"]  # noqa: F822 (resolved by __getattr__)


def __getattr__(name: str) -> Any:
    """Resolve a public name, or ``__version__``, on first use (PEP 562)."""
    if name == "__version__":
        return _version()
    if name not in PUBLIC:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    value = _load(PUBLIC[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, resolved or not."""
    return sorted({*globals(), *PUBLIC, "__version__"})


class LazyGroup(click.Group):
    """A group whose commands stand in a table and are imported when one of them is called.

    title: what its help calls them. otherwise: the command that a word which is none of them is an argument of; None:
    such a word is refused.
    """

    def __init__(
        self, *args: Any, table: Mapping[str, Verb], title: str, otherwise: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._table, self._title, self._otherwise = table, title, otherwise

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the room that holds a command."""
        if cmd_name not in self._table:
            return None
        command = _load(self._table[cmd_name].place)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown verb with the verbs that look like it, or read it as an argument of ``otherwise``."""
        if args and args[0] not in self._table and not args[0].startswith("-"):
            if self._otherwise is None:
                raise click.UsageError(f"no verb {args[0]!r}; {_near(args[0], self._table)}", ctx)
            args = [self._otherwise, *args]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing a single room."""
        with formatter.section(self._title):
            formatter.write_dl([(name, verb.line) for name, verb in self._table.items()])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("saccade")
    except PackageNotFoundError:
        return "0+source"


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _near(word: str, table: Mapping[str, Verb]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, table)
    return f"did you mean {_either(near)}?" if near else f"the verbs are {', '.join(table)}"


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"saccade {_version()}")
        ctx.exit()


@click.group(cls=LazyGroup, table=VERBS, title="Verbs", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """A small vision-language model looks at everything and says where to look; a large one looks there only.

    Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 the operation
    failed, 2 usage, 3 the artefact is bad, 4 this machine lacks the backend.
    """
    ctx.obj = VERBS[str(ctx.invoked_subcommand)].questions


@click.group(cls=LazyGroup, table=SHOWS, title="What to show", otherwise="bundle")
def show() -> None:
    """Show a bundle, kept tokens, families, policies, formats, ops or this machine."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; every failure becomes one sentence on stderr."""
    from graphs.errors import SaccadeError

    try:
        result = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="saccade",
            standalone_mode=False,
        )
        return result if isinstance(result, int) else 0
    except SaccadeError as error:
        return _say(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", 130)
    except ModuleNotFoundError as error:
        return _module_missing(error)
    except OSError as error:
        return _system_refused(error)
    except Exception as error:  # the last net: a user sees a sentence, a developer asks for the trace
        return _unexpected(error)


def main() -> None:
    """Entry point of the console script; a verb that uses no torch is spared its import, wherever it is installed.

    transformers imports torch (two seconds, 0.3 GB) to read a processor wherever it finds it, and uses nothing of it.
    """
    for name in ("stdin", "stdout", "stderr"):  # closed ones, as a daemon's
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123
    verb = VERBS.get(next(iter(sys.argv[1:]), ""))
    if verb and not verb.torch:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what Python itself writes for "is not here"
    sys.exit(run())


def _say(sentence: str, code: int) -> int:
    if os.environ.get("SACCADE_TRACEBACK"):
        import traceback

        traceback.print_exc()
    click.echo(f"saccade: {sentence}", err=True)
    return code


def _module_missing(error: ModuleNotFoundError) -> int:
    from graphs.errors import SaccadeError
    from graphs.versions import missing

    if (error.name or "").partition(".")[0] in {"engines", "exporter", "glyphs", "graphs", "plugins"}:
        return _unexpected(error)
    try:
        raise missing(error.name or str(error)) from error
    except SaccadeError as refused:
        return _say(str(refused), refused.exit_code)


def _system_refused(error: OSError) -> int:
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return _say(f"the disk is full{where}; make room and run the same command again", 1)
    return _say(f"the system refused: {error.strerror or error}{where}", 1)


def _unexpected(error: Exception) -> int:
    detail = " ".join(str(error).split())[:300]
    return _say(
        f"unexpected {type(error).__name__}: {detail} (SACCADE_TRACEBACK=1 shows where)".replace(":  (", " ("),
        1,
    )


if __name__ == "__main__":
    main()
