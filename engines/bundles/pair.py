"""Whether exports can be one bundle: roles, grids, tokenizers and plans that fit each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.errors import BadArtefact, UsageError
from graphs.files import unreadable
from graphs.spec import PROCESSOR_FOLDER, TEMPLATE_FILE, TEMPLATE_HOLDERS, ExportSpec

ROLE_AGAIN = "export it again with --role"


@dataclass(frozen=True)
class Source:
    """An export folder that goes into a bundle."""

    folder: Path
    spec: ExportSpec


def members_from_sources(sources: list[Source]) -> dict[str, Source]:
    """Small and large, or alone, from one or two exports in any order; UsageError where they do not fit."""
    if len(sources) == 1:
        _check_alone(sources[0])
        return {"alone": sources[0]}
    if len(sources) != 2:
        raise UsageError(f"a bundle holds one model or a pair, got {len(sources)} exports; give one or two folders")
    by_role = {source.spec.role: source for source in sources}
    if set(by_role) != {"small", "large"}:
        said = " and ".join(f"{s.folder} is {s.spec.role}" for s in sources)
        raise UsageError(f"a pair is one small and one large export, but {said}; {ROLE_AGAIN} small or large")
    small, large = by_role["small"], by_role["large"]
    _check_plans(small, large)
    _check_grids(small, large)
    _check_tokenizers(small, large)
    return {"small": small, "large": large}


def prunes_nothing(spec: ExportSpec) -> bool:
    """Whether every visual token reaches the last layer by default."""
    return not spec.plan.prunes


def refuse_unasked(source: Source) -> None:
    """A plan that prunes nothing is fine where it is called none; otherwise nobody asked for it."""
    spec = source.spec
    if spec.role != "small" and spec.plan.name != "none" and not spec.plan.allow_nothing and prunes_nothing(spec):
        raise UsageError(
            f"{source.folder}: plan {spec.plan.name} prunes nothing; export it with a prune point that keeps less than "
            "all, or with --policy none if that is wanted"
        )


def _check_alone(source: Source) -> None:
    refuse_unasked(source)
    if source.spec.plan.needs_guidance:
        raise UsageError(
            f"{source.folder} is pruned by the guidance of a small model; give that export too, or export this one "
            "with --role alone"
        )


def _check_plans(small: Source, large: Source) -> None:
    refuse_unasked(large)
    if large.spec.plan.needs_guidance and small.spec.plan.guidance is None:
        raise UsageError(
            f"{large.folder} needs guidance and {small.folder} gives none (plan {small.spec.plan.name}); "
            "export the small model with --policy sgl --role small"
        )


def _check_grids(small: Source, large: Source) -> None:
    a, b = small.spec.grid, large.spec.grid
    if (a.rows, a.columns) != (b.rows, b.columns):
        raise UsageError(
            f"the pair cuts an image into unequal grids of visual tokens: {small.folder} into {a.rows}×{a.columns}, "
            f"{large.folder} into {b.rows}×{b.columns}; guidance goes by index, so choose models with the same grid"
        )
    if differs := [name for name in type(a).model_fields if getattr(a, name) != getattr(b, name)]:
        raise UsageError(
            f"the pair makes unequal grids of visual tokens: {', '.join(differs)} of {small.folder} and {large.folder} "
            "differ; guidance goes by index, so choose models with the same grid"
        )
    if a.kind == "fixed":
        return
    made_small, made_large = (image_settings(source) for source in (small, large))
    if made_small != made_large:  # as they are written; what one leaves out may be what the other says
        made_small, made_large = (loaded_settings(source) for source in (small, large))
    if made_small != made_large:
        keys = sorted(made_small.keys() | made_large.keys(), key=str)
        name = next(k for k in keys if made_small.get(k) != made_large.get(k))
        raise UsageError(
            f"the pair cuts images differently: {name} is {made_small.get(name, 'absent')} in {small.folder}, "
            f"{made_large.get(name, 'absent')} in {large.folder}; guidance goes by index, so choose models "
            "with the same grid"
        )


# What the image processor's settings say that does not move a visual token.
NO_MATTER = {
    "image_processor_type",
    "processor_class",
    "image_mean",
    "image_std",
    "feature_extractor_type",
    "video_sampling",
}


def image_settings(source: Source) -> dict[str, Any]:
    """The image processor's settings that decide how an image is cut."""
    folder = source.folder / PROCESSOR_FOLDER
    path = folder / "preprocessor_config.json"
    document = _json_of(path if path.is_file() else folder / "processor_config.json")
    return _that_matter(document.get("image_processor", document) if isinstance(document, dict) else {})


def loaded_settings(source: Source) -> dict[str, Any]:
    """The same with every default, as transformers loads it."""
    from engines.processing import Processor

    return _that_matter(Processor(source.folder, source.spec).image_processor.to_dict())


def _that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NO_MATTER}


def _check_tokenizers(small: Source, large: Source) -> None:
    """Vocabulary, special tokens and chat template are those of one tokenizer."""
    parts_small, parts_large = (tokenizer_parts(source) for source in (small, large))
    for part, value in parts_small.items():
        if value != parts_large[part]:
            raise UsageError(
                f"the pair has unequal tokenizers: {part} of {small.folder} and {large.folder} differ"
                f"{_example(value, parts_large[part])}; choose two models with the same tokenizer"
            )


def tokenizer_parts(source: Source) -> dict[str, Any]:
    """What makes a tokenizer, by name; BadArtefact where the processor folder is broken."""
    folder = source.folder / PROCESSOR_FOLDER
    document = _json_of(folder / "tokenizer.json")
    tokenizer = document if isinstance(document, dict) else {}
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    whole = isinstance(added, list) and all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in added)
    if not isinstance(model, dict) or not whole:
        raise BadArtefact(f"{folder / 'tokenizer.json'} holds no tokenizer; export the checkpoint again")
    tokens = source.spec.tokens
    return {
        "the vocabulary": model.get("vocab"),
        "the merges": model.get("merges"),
        "the added tokens": {t.get("content"): t.get("id") for t in added},
        "the splitting of text": (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")),
        "the image token": (tokens.image, tokens.image_text),
        "the end tokens": sorted(tokens.eos),
        "the chat template": chat_template(folder),
    }


def chat_template(folder: Path) -> Any:
    """The template of a processor folder, wherever this version of the file format keeps it."""
    plain = folder / TEMPLATE_FILE
    if plain.is_file():
        return _text_of(plain)
    for name in TEMPLATE_HOLDERS:
        if (folder / name).is_file():
            document = _json_of(folder / name)
            if isinstance(document, dict) and document.get("chat_template"):
                return document["chat_template"]
    return None


def _example(a: Any, b: Any) -> str:
    """The first entry in which two tables differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return ""
    key = min((k for k in a.keys() | b.keys() if a.get(k) != b.get(k)), key=str)
    return f" ({key!r} is {a.get(key, 'absent')} in one and {b.get(key, 'absent')} in the other)"


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as e:
        raise unreadable(path, e, "export the checkpoint again") from None
    except UnicodeDecodeError:
        raise BadArtefact(f"{path} is not UTF-8 text; export the checkpoint again") from None


def _json_of(path: Path) -> Any:
    text = _text_of(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadArtefact(f"{path} is not JSON; export the checkpoint again") from None
