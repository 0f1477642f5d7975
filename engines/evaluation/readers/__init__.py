"""Questions from the files of published benchmarks as they are downloaded; ``FORMATS`` is the table.

A reader yields (where, line) pairs as ``engines.evaluation.data.data_from_items`` takes them. Prompts and metrics are
those of the field (lmms-eval, VLMEvalKit, LLaVA's evaluation), learnt from their task definitions and written anew.
Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.evaluation.data import PLACE, Data, How, data_from_items
from engines.evaluation.readers import (
    chartqa,
    docvqa,
    gqa,
    mmbench,
    mme,
    refcoco,
    seed_bench,
    textvqa,
    vqav2,
)
from engines.evaluation.readers.files import Files, Item
from graphs.errors import UsageError

WORD = f"{PLACE}\nAnswer the question using a single word or phrase."
LETTER = f"{PLACE}\nAnswer with the option's letter from the given choices directly."
BOX = f"Please provide the bounding box coordinate of the region this sentence describes: {PLACE}"


@dataclass(frozen=True)
class Format:
    """A benchmark. layout: its files, for help and messages. metric and prompt: what the field uses.

    images, annotations: whether the reader takes --images and --annotations; images without it lie beside DATA.
    """

    name: str
    layout: str
    source: str
    read: Callable[[Files], Iterable[Item]]
    metric: str
    prompt: str
    images: bool = True
    annotations: bool = False


TABLE = (
    Format(
        "vqav2",
        "DATA: v2_OpenEnded_…_questions.json, --annotations: v2_…_annotations.json, "
        "--images: the folder of COCO_val2014_000000262148.jpg and the like",
        "VQAv2, arXiv 1612.00837",
        vqav2.read,
        "vqa",
        WORD,
        annotations=True,
    ),
    Format(
        "gqa",
        "DATA: testdev_balanced_questions.json, --images: the folder of 2405722.jpg and the like",
        "GQA, arXiv 1902.09506",
        gqa.read,
        "gqa",
        WORD,
    ),
    Format(
        "textvqa",
        "DATA: TextVQA_0.5.1_val.json, --images: train_images",
        "TextVQA, arXiv 1904.08920",
        textvqa.read,
        "vqa",
        WORD,
    ),
    Format(
        "chartqa",
        "DATA: test_human.json or test_augmented.json, --images: png",
        "ChartQA, arXiv 2203.10244",
        chartqa.read,
        "relaxed",
        WORD,
    ),
    Format(
        "docvqa",
        "DATA: val_v1.0_withQT.json, --images: the folder that holds documents/",
        "DocVQA, arXiv 2007.00398",
        docvqa.read,
        "anls",
        WORD,
    ),
    Format(
        "seed",
        "DATA: SEED-Bench.json, --images: SEED-Bench-image; questions about videos are bad lines",
        "SEED-Bench, arXiv 2307.16125",
        seed_bench.read,
        "choice",
        LETTER,
    ),
    Format(
        "mmbench",
        "DATA: mmbench_dev_….tsv, images inside; each row counts by itself, which is not CircularEval",
        "MMBench, arXiv 2307.06281",
        mmbench.read,
        "choice",
        LETTER,
        images=False,
    ),
    Format(
        "mme",
        "DATA: the folder of categories, each with NAME.txt and its picture (or questions_answers_YN/ and images/)",
        "MME, arXiv 2306.13394",
        mme.read,
        "yesno",
        WORD,
        images=False,
    ),
    Format(
        "refcoco",
        "RefCOCO, RefCOCO+ and RefCOCOg; DATA: refcoco_val.jsonl and the like of Qwen-VL and InternVL (image, sent, "
        "bbox, width, height), --images: the folder that image is relative to",
        "RefCOCO, arXiv 1608.00272",
        refcoco.read,
        "iou",
        BOX,
    ),
)
FORMATS: Mapping[str, Format] = {made.name: made for made in TABLE}
REFUSED = {
    "mmvet": "MM-Vet is scored by a judge, a large language model that reads free text, and there is none here; choose "
    "a benchmark whose answers a formula scores",
}


def data_of_format(name: str, data: Path, images: Path | None, annotations: Path | None, how: How) -> Data:
    """Read a benchmark's files; UsageError for one that is not read, or for a file that its reader does not take."""
    if name in REFUSED:
        raise UsageError(REFUSED[name])
    chosen = FORMATS[name]
    for option, given, takes in (
        ("images", images, chosen.images),
        ("annotations", annotations, chosen.annotations),
    ):
        if given is not None and not takes:
            raise UsageError(f"--{option} has no effect with --format {name} ({chosen.layout}); leave it out")
    files = Files(data, images if images is not None else data.parent, annotations)
    return data_from_items(chosen.read(files), Path(), str(data), how)
