"""An export's stages run in ONNX Runtime by the contract alone, without engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from graphs.spec import past_names, present_names, spec_from_folder


class Stages:
    """The sessions of an export folder; feeds and results are numpy arrays by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, spec_from_folder(folder)
        self._open: dict[str, ort.InferenceSession] = {}

    def __call__(self, stage: str, **feed: np.ndarray) -> dict[str, np.ndarray]:
        if stage not in self._open:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            self._open[stage] = ort.InferenceSession(self.folder / self.spec.stages[stage].file, options)
        names = [t.name for t in self.spec.stages[stage].outputs]
        return dict(zip(names, self._open[stage].run(names, feed), strict=True))

    def decode(
        self,
        embeds,
        is_visual,
        keep,
        *,
        past=None,
        start=0,
        positions=None,
        priority=None,
        guide=None,
        tail=None,
        image=None,
        **more,
    ):
        """One decoder run. Returns outputs, kept rows composed into the chunk's.

        keep: S_i behind each prune point, or the places of the rows that stay; image: of each row, −1 for text;
        more: lengths of other carriers.
        """
        spec, rows = self.spec, embeds.shape[1]
        plan, language = spec.plan, spec.language
        empty = np.zeros((1, language.kv_heads, 0, language.head_dim), np.float32)
        text_after = rows - 1 - int(np.flatnonzero(is_visual).max()) if is_visual.any() else rows
        wanted = {"last": 1, "text": text_after, "raters": text_after, None: 0}[plan.attention_rows]
        feed = {
            "inputs_embeds": embeds.astype(np.float32),
            "position_ids": (np.arange(start, start + rows) if positions is None else positions)[None],
            "is_visual": is_visual[None],
            "guide": np.zeros(wanted if is_visual.any() else rows, np.int32),
            "tail": np.zeros(rows if tail is None else tail, np.int32),
            "priority": np.zeros((1, rows), np.float32) if priority is None else priority[None].astype(np.float32),
            **{f"keep_{i}": np.zeros(n, np.int32) for i, n in enumerate(keep) if np.ndim(n) == 0},
            **{f"pick_{i}": n for i, n in enumerate(keep) if np.ndim(n)},
            **{name: np.zeros(n, np.int32) for name, n in more.items()},
        }
        if image is not None:
            feed["image_index"] = image[None]
        if keep:
            feed["tail"] = np.zeros(
                min(len(feed["tail"]), np.size(keep[-1]) if np.ndim(keep[-1]) else keep[-1]), np.int32
            )
        for i in range(language.layers):
            for past_name, present in zip(past_names(i), present_names(i), strict=True):
                feed[past_name] = empty if past is None else past[present]
        out = self("decoder", **{t.name: feed[t.name] for t in spec.stages["decoder"].inputs})
        reached, kept = np.arange(rows), []
        for i in range(len(plan.points)):
            reached = reached[out[f"kept_{i}"][0]]
            kept.append(reached)
        return out, kept
