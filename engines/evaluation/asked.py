"""What `calibrate`, `eval` and `tune` are told about their questions: the options, and the reading they lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engines.options import stacked
from graphs.console import warn
from graphs.errors import UsageError

if TYPE_CHECKING:
    from engines.evaluation.data import Data

METRIC_NAMES = ("exact", "gqa", "contains", "vqa", "anls", "relaxed", "choice", "yesno", "iou")
# format → its metric; mmvet is refused with the reason
FORMAT_METRICS = {
    "vqav2": "vqa",
    "gqa": "gqa",
    "textvqa": "vqa",
    "chartqa": "relaxed",
    "docvqa": "anls",
    "seed": "choice",
    "mmbench": "choice",
    "mme": "yesno",
    "refcoco": "iou",
    "mmvet": "",
}
FORMATS_HELP = (
    "Formats, each a benchmark's files as they are downloaded: vqav2 (with --annotations), gqa, textvqa, chartqa, "
    "docvqa, seed, mmbench (a TSV), mme (a folder), refcoco (a JSONL file; RefCOCO+ and RefCOCOg too). Each asks and "
    "counts as its field does; `saccade show formats` says how. mmvet is refused: it needs a judge model."
)
BUILT_IN_QUESTIONS = 1000

# How DATA is read: the fields of ``Questions``.
data_options = stacked(
    click.option(
        "--format",
        type=click.Choice(tuple(FORMAT_METRICS)),
        help="Read DATA as this benchmark's files. [JSONL, one question per line]",
    ),
    click.option(
        "--images",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of the benchmark's images; needs --format. [the folder of DATA]",
    ),
    click.option(
        "--annotations",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File of answers, if separate from DATA (vqav2); needs --format.",
    ),
    click.option(
        "--prompt",
        metavar="TEXT",
        help="Prompt template; {question} marks where the question goes. [the format's]",
    ),
    click.option(
        "--metric",
        type=click.Choice(METRIC_NAMES),
        help="How an answer is scored, if DATA has answers. [the format's, else exact]",
    ),
    click.option(
        "--questions",
        type=click.IntRange(min=1),
        metavar="N",
        help="Ask only the first N questions. [all; 1000 of a built-in set]",
    ),
    click.option("--skip-bad", is_flag=True, help="Leave bad lines out and list them, instead of stopping."),
)


@dataclass(frozen=True)
class Questions:
    """What was said about the questions; see the options."""

    format: str | None = None
    images: Path | None = None
    annotations: Path | None = None
    prompt: str | None = None
    metric: str | None = None
    questions: int | None = None
    skip_bad: bool = False

    @property
    def worth(self) -> str:
        """The metric that holds where answers are known."""
        return self.metric or FORMAT_METRICS.get(self.format or "", "") or "exact"

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Questions:
        """Those among a verb's options, which are taken out of them."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def read(self, data: str, built_in: Mapping[str, str], *, scored: bool) -> Data:
        """Read DATA and warn of what is left out.

        data: a benchmark's files, one of the ``built_in`` sets (name → ``module:function(n)``), or JSONL. scored:
        whether answers must be there. Errors: UsageError where they must, or a metric is named, and there are none.
        """
        found = self._found(data, built_in)
        if not found.answered and scored:
            raise UsageError(f"{data} has no answers, so nothing can be said about accuracy; add them to every line")
        if not found.answered and self.metric:
            raise UsageError(
                f"--metric {self.metric} has no effect, because {data} has no answers; leave it out or add answers"
            )
        for line in found.bad:
            warn(f"left out: {line}")
        return found

    def _found(self, data: str, built_in: Mapping[str, str]) -> Data:
        from engines.evaluation.data import PLACE, How, data_from_file, data_from_records
        from engines.evaluation.readers import FORMATS, data_of_format

        if self.format:
            own = FORMATS[self.format].prompt if self.format in FORMATS else PLACE
            how = How(self.worth, self.questions, self.skip_bad, self.prompt or own)
            return data_of_format(self.format, Path(data), self.images, self.annotations, how)
        for option in ("images", "annotations"):
            if getattr(self, option) is not None:
                raise UsageError(f"--{option} has no effect without --format; leave it out or add --format")
        how = How(self.metric, self.questions, self.skip_bad, self.prompt or PLACE)
        if data not in built_in:
            return data_from_file(Path(data), how)
        module, _, name = built_in[data].partition(":")
        make: Callable[[int], Iterable[Mapping[str, Any]]] = getattr(import_module(module), name)
        return data_from_records(make(self.questions or BUILT_IN_QUESTIONS), data, how)


class Several(click.ParamType):
    """Values separated by commas; ``of`` reads each."""

    def __init__(self, of: click.ParamType, name: str) -> None:
        self.of, self.name = of, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Return the values."""
        return [self.of.convert(part.strip().replace(":", ","), param, ctx) for part in str(value).split(",")]


class Layers(click.ParamType):
    """The layers before which a plan prunes, one or several."""

    name = "K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the layers as numbers."""
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is neither a layer nor a list of layers; write for example 2 or 8:16:24", param, ctx)
