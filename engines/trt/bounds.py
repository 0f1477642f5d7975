"""How large each dynamic dimension may become, and the optimisation profiles that follow.

The decoder has two profiles over one set of weights: ``prefill`` (2 rows or more on any past) and ``decode``.
The decode profile keeps its rows dynamic, 1 to 2, for with a fixed 1 TensorRT-RTX 1.7 stores the weights twice.
The other stages have one profile. Symbols are those of ``graphs.spec``; "4*V" is a multiple.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphs.errors import OperationFailed, UsageError
from graphs.spec import ExportSpec, StageSpec

BODY_ROWS = 3840  # TensorRT's own TopK ends here, so a KeepTopK that is served by its body does
DEFAULT_PROMPT, DEFAULT_LENGTH, DEFAULT_GUIDE, DEFAULT_TAIL, DEFAULT_IMAGES = 2048, 4096, 512, 128, 8
ANSWER_ROWS = 1024  # a cache has these behind the longest chunk, unless told otherwise
STEP = 256  # defaults are multiples of it

Range = tuple[int, int, int]  # least, best served, largest
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile = dict[str, Shapes]  # input → its least, best served and largest shape


@dataclass(frozen=True)
class Room:
    """What the defaults of max_prompt and max_images are to hold at least: rows of a chunk, and tiles."""

    rows: int = 0
    tiles: int = 0


@dataclass(frozen=True)
class Bounds:
    """max_prompt: rows of one chunk. max_length: rows of a cache. max_tail: rows with logits (a scored answer).

    max_guide: rows that guide the pruning, which bounds the map of a flat body (heads · guide · length · 4 bytes).
    max_images: images, or tiles of images, that the vision stage sees at once. None: a default that the model allows.
    """

    max_prompt: int | None = None
    max_length: int | None = None
    max_guide: int | None = None
    max_tail: int | None = None
    max_images: int | None = None

    def fitted(self, spec: ExportSpec, most_rows: int | None, room: Room = Room()) -> Bounds:
        """The same with defaults filled in; UsageError for a bound that the model or an op cannot have.

        most_rows: the longest chunk that what serves the ranking ops takes, None where the plan has no prune point.
        The length of the caches does not depend on it. room: what the defaults make room for, as far as it goes.
        """
        positions = spec.language.max_positions
        most = min(positions, self.max_length or positions)
        wanted = self.max_prompt or min(max(DEFAULT_PROMPT, -(-room.rows // STEP) * STEP), most)
        prompt = self.max_prompt or min(wanted, most_rows or wanted)
        length = self.max_length or max(wanted, min(positions, max(DEFAULT_LENGTH, wanted + ANSWER_ROWS)))
        given = {
            "max-prompt": prompt,
            "max-length": length,
            "max-guide": self.max_guide or min(DEFAULT_GUIDE, prompt),
            "max-tail": self.max_tail or min(DEFAULT_TAIL, prompt),
            "max-images": self.max_images or max(DEFAULT_IMAGES, room.tiles),
        }
        for name, value in given.items():
            if value < (2 if name in ("max-prompt", "max-length") else 1):
                raise UsageError(f"--{name} is {value}, which is too small; give a larger one")
        if most_rows and prompt > most_rows:
            raise UsageError(
                f"--max-prompt is {prompt}, but pruning takes chunks of at most {most_rows} tokens; "
                f"give at most {most_rows}" + (", or build with --ops plugin" if most_rows == BODY_ROWS else "")
            )
        if max(prompt, length) > positions:
            raise UsageError(
                f"a bound of {max(prompt, length)} tokens is beyond the model's {positions} positions; "
                f"give at most {positions}"
            )
        if prompt > length:
            raise UsageError(
                f"--max-prompt is {prompt}, more than the {length} tokens of a cache; give at most {length}"
            )
        for name in ("max-guide", "max-tail"):
            if given[name] > prompt:
                raise UsageError(
                    f"--{name} is {given[name]}, more than the {prompt} tokens of a chunk; give at most {prompt}"
                )
        return Bounds(prompt, length, given["max-guide"], given["max-tail"], given["max-images"])

    def in_words(self) -> str:
        """One line for the talk."""
        return (
            f"chunks of up to {self.max_prompt} rows, caches of {self.max_length}, {self.max_guide} guide rows, "
            f"logits of {self.max_tail} rows, {self.max_images} images or tiles"
        )


def profiles_of(stage: str, spec: ExportSpec, bounds: Bounds) -> dict[str, Profile]:
    """Profile name → input → its least, best served and largest shape, in the order of the engine's profiles."""
    interface = spec.stages[stage]
    prompt, length, guide = bounds.max_prompt, bounds.max_length, bounds.max_guide
    tail, images = bounds.max_tail, bounds.max_images
    if not (prompt and length and guide and tail and images):
        raise OperationFailed("bounds were not fitted to the model; report this")
    typical = min(prompt, max(2, prompt // 2))
    if stage == "decoder":
        rows, past = (2, typical, prompt), (0, 0, length - 1)
        prefill = {"S": rows, "G": (1, min(32, guide), guide), "R": (1, 1, tail), "P": past}
        decode = {"S": (1, 1, 2), "G": (1, 1, 2), "R": (1, 1, 2), "P": (1, max(1, length // 2), length - 1)}
        behind = {"prefill": (1, max(1, typical // 2), prompt), "decode": (1, 1, 2)}
        return {
            name: _profile(interface, ranges | dict.fromkeys(("S_", "M_", "Q_"), behind[name]))
            for name, ranges in (("prefill", prefill), ("decode", decode))
        }
    if stage == "embed":
        return {"any": _profile(interface, {"S": (1, typical, prompt), "V": (1, typical, prompt)})}
    grid = spec.grid
    per_image = max(1, grid.tokens)
    patches = grid.merge**2 * prompt
    windows = grid.most_windows(patches, images)
    ranges = {
        "N": (1, 1, images),
        "I": (1, 1, images),
        "V": (1, typical, prompt),
        "K": (1, grid.merge**2 * typical, patches),
        "W": (1, max(1, windows // 4), windows),
    }
    # Of a pruned tower no more tokens stay, or are merged into, than there are.
    ranges |= {"K_v": (1, max(1, per_image // 2), prompt), "M": (1, max(1, per_image // 8), prompt)}
    return {"any": _profile(interface, ranges)}


def _profile(stage: StageSpec, ranges: dict[str, Range]) -> Profile:
    return {
        tensor.name: tuple(  # type: ignore[misc]
            tuple(_size(d, i, tensor.name, ranges) for d in tensor.shape) for i in range(3)
        )
        for tensor in stage.inputs
    }


def _size(dimension: int | str, which: int, name: str, ranges: dict[str, Range]) -> int:
    if isinstance(dimension, int):
        return dimension
    times, _, symbol = dimension.rpartition("*")
    of_points = symbol.partition("_")[0]  # of S_1, M_1, Q_1 one for all points; of P_0 one for all segments
    found = ranges.get(symbol) or ranges.get(f"{of_points}_") or ranges.get(of_points)
    if found is None:
        raise OperationFailed(f"input {name} has a dimension {dimension!r} that no bound is known for; report this")
    return int(times or 1) * found[which]
