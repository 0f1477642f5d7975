"""Drives an export's three graphs in ONNX Runtime by its spec alone, as any host would.

Legend: S rows of a chunk, V visual rows, N images, G guide rows, R logit rows, P_j cached rows of segment j.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file

from graphs.spec import past_names, present_names, spec_from_folder

Arrays = dict[str, np.ndarray]


def session_of(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Exported:
    """An export folder with its sessions, opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, spec_from_folder(folder)
        self.float = np.dtype(self.spec.dtype)

    @cached_property
    def sessions(self) -> dict[str, ort.InferenceSession]:
        return {name: session_of(self.folder / stage.file) for name, stage in self.spec.stages.items()}

    @cached_property
    def golden(self) -> Arrays:
        return load_file(self.folder / "golden.safetensors")

    def run(self, stage: str, feed: Arrays) -> Arrays:
        """One run; the feed must be exactly what spec.json says, in names and dtypes."""
        table = self.spec.stages[stage]
        assert [t.name for t in table.inputs] == [i.name for i in self.sessions[stage].get_inputs()]
        assert set(feed) == {t.name for t in table.inputs}
        for t in table.inputs:
            assert feed[t.name].dtype == t.dtype, t.name
        return dict(zip((t.name for t in table.outputs), self.sessions[stage].run(None, feed), strict=True))

    def see(self, pixels: np.ndarray) -> np.ndarray:
        """[N,3,H,W] → [V,D]."""
        return self.run("vision", {"pixel_values": pixels})["visual_embeds"]

    def merge(self, ids: np.ndarray, visual: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids [1,S] → embeddings [1,S,D] and is_visual [1,S]; without images a dummy row is fed."""
        if visual is None:
            visual = np.zeros((1, self.spec.language.width), self.float)
        out = self.run("embed", {"input_ids": ids, "visual_embeds": visual})
        return out["inputs_embeds"], out["is_visual"]


class Conversation:
    """One cache on top of which chunks run; the row at place i of the conversation has position i."""

    def __init__(self, model: Exported) -> None:
        self.model, self.length = model, 0
        language = model.spec.language
        shape = (1, language.kv_heads, 0, language.head_dim)
        self.past = {n: np.zeros(shape, model.float) for i in range(language.layers) for n in past_names(i)}

    def feed(
        self,
        embeds: np.ndarray,
        is_visual: np.ndarray | None = None,
        *,
        keep: tuple[int, ...] | None = None,
        guide: int = 1,
        tail: int | None = None,
        priority: np.ndarray | None = None,
    ) -> Arrays:
        """Run a chunk [1,S,D]; ``keep`` are row counts behind each prune point (all rows unless given)."""
        rows = embeds.shape[1]
        counts = keep or (rows,) * len(self.model.spec.plan.points)
        carriers = {
            "guide": guide,
            "tail": rows if tail is None else tail,
            **{f"keep_{i}": n for i, n in enumerate(counts)},
        }
        ready = {
            "inputs_embeds": embeds,
            "position_ids": np.arange(self.length, self.length + rows, dtype=np.int64)[None],
            "is_visual": np.zeros((1, rows), bool) if is_visual is None else is_visual,
            "priority": np.zeros((1, rows), np.float32) if priority is None else priority,
            **{name: np.full(count, -1, np.int32) for name, count in carriers.items()},
            **self.past,
        }
        wanted = [t.name for t in self.model.spec.stages["decoder"].inputs]
        out = self.model.run("decoder", {name: ready[name] for name in wanted})
        for i in range(self.model.spec.language.layers):
            self.past |= {p: out[q] for p, q in zip(past_names(i), present_names(i), strict=True)}
        self.length += rows
        return out

    def greedy(self, first: Arrays, most: int) -> list[int]:
        """Greedy tokens after a chunk, the end token included."""
        tokens = [int(first["logits"][0, -1].argmax())]
        while len(tokens) < most and tokens[-1] not in self.model.spec.tokens.eos:
            embeds, _ = self.model.merge(np.array([tokens[-1:]], np.int64))
            tokens.append(int(self.feed(embeds, tail=1)["logits"][0, -1].argmax()))
        return tokens
