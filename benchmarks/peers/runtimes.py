"""One class per runtime: open a model, answer a question about a fresh image, say what each part took.

Each runs in a process of its own, some of them in another Python, so nothing but numpy and Pillow is imported above.
An answer is {"vision_ms", "prefill_ms", "decode_ms", "tokens", "text"}: prefill is everything from the visual tokens to
the first token, decode what the other tokens took together. Image preparation is left out where the runtime allows
(OpenVINO GenAI counts it into its embeddings).
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Measured = dict[str, Any]


class Runtime(Protocol):
    """What the worker needs."""

    def ask(self, image: np.ndarray, question: str, tokens: int, *, whole: bool = False) -> Measured:
        """Answer greedily. image: uint8 [H, W, 3]. whole: to the answer's own end; else ``tokens`` tokens if it can."""


class Saccade:
    """Our bundle. threshold: where the small model's answer stands; None for the bundle's, calibrated where it is."""

    def __init__(self, folder: Path, threads: int, target: str, threshold: float | None = None) -> None:
        # As the front door's verbs do: transformers would import it, and an installation that only runs has none.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        import saccade

        # The whole prompt is what is measured; sessions are opened only, as the peers' are.
        self._cascade = saccade.Cascade.open(folder, target=target, threads=threads, reuses_beginnings=False)
        self._cascade.preload(runs=False)
        self._threshold = threshold

    def ask(self, image: np.ndarray, question: str, tokens: int, *, whole: bool = False) -> Measured:
        """See ``Runtime``; an answer ends where the model ends it, so a token's time is that of those it wrote."""
        from PIL import Image

        answer = self._cascade.ask(Image.fromarray(image), question, threshold=self._threshold, max_new_tokens=tokens)
        ms = answer.milliseconds
        part = {stage: sum(t for name, t in ms.items() if name.endswith(f"_{stage}")) for stage in STAGES}
        return {
            "vision_ms": part["vision"],
            "prefill_ms": part["prefill"] + part["embed"],
            "decode_ms": part["decode"],
            "tokens": len(answer.tokens),
            "text": answer.text,
            "exited": bool(answer.exited),
        }


STAGES = ("vision", "embed", "prefill", "decode")


class Transformers:
    """Hugging Face transformers, eager with sdpa, stage by stage through forward hooks."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self._spent: list[tuple[str, float]] = []
        model: Any = self._model.model
        self._watch("vision", getattr(model, "visual", None) or model.vision_tower)
        self._watch("language", model.language_model)

    def _watch(self, name: str, module: Any) -> None:
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: self._spent.append((name, time.perf_counter() - started.pop())))

    def ask(self, image: np.ndarray, question: str, tokens: int, *, whole: bool = False) -> Measured:
        """See ``Runtime``; prefill and decode are what is left of the whole beside the tower."""
        from PIL import Image

        torch = self._torch
        inputs = self._inputs(Image.fromarray(image), question)
        self._spent.clear()
        marks: list[float] = []

        def note(_: Any, scores: Any) -> Any:
            marks.append(time.perf_counter())
            return scores

        with torch.inference_mode():
            start = time.perf_counter()
            ids = self._model.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=0 if whole else tokens,
                do_sample=False,
                logits_processor=[note],
            )
        vision = sum(seconds for name, seconds in self._spent if name == "vision")
        return {
            "vision_ms": 1e3 * vision,
            "prefill_ms": 1e3 * (marks[0] - start - vision),
            "decode_ms": 1e3 * (marks[-1] - marks[0]),
            "tokens": int(ids.shape[1] - inputs["input_ids"].shape[1]),
            "text": self._tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(),
            "exited": False,
        }

    def _inputs(self, image: Any, question: str) -> dict[str, Any]:
        config = self._model.config
        pixels = self._images(images=[image], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if "image_grid_thw" in pixels:
            count = int(pixels["image_grid_thw"].prod()) // self._images.merge_size**2
        else:
            count = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        token = self._tokenizer.convert_ids_to_tokens(config.image_token_id)
        encoded = self._tokenizer(text.replace(token, token * count), return_tensors="pt", add_special_tokens=False)
        pixels["pixel_values"] = pixels["pixel_values"].to(self._model.dtype)
        extra = {}
        if "image_grid_thw" in pixels:
            extra["mm_token_type_ids"] = (encoded["input_ids"] == config.image_token_id).long()
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **pixels, **extra}


class OpenVinoGenAI:
    """OpenVINO GenAI's VLMPipeline. precision: its hint, None for its own choice; pruning: percent, 0 for none."""

    def __init__(self, folder: Path, threads: int, precision: str | None = None, pruning: int = 0) -> None:
        import openvino_genai

        hints = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
        self._pipe = openvino_genai.VLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads, **hints)
        self._pruning, self._prunes = pruning, not pruning

    def ask(self, image: np.ndarray, question: str, tokens: int, *, whole: bool = False) -> Measured:
        """See ``Runtime``; its "vision" metric leaves the merger out, so the embeddings' preparation is taken.

        Raises RuntimeError where it was to prune and feeds the model as many tokens at any ratio: it does not say so.
        """
        done = self._generated(image, question, tokens, whole, self._pruning)
        metrics = done.perf_metrics
        if not self._prunes:
            fed = metrics.get_num_input_tokens()
            nearly_all = self._generated(image, question, 1, whole, 99).perf_metrics.get_num_input_tokens()
            if fed == nearly_all:
                raise RuntimeError(f"OpenVINO GenAI was to prune {self._pruning} % and fed this model all {fed} tokens")
            self._prunes = True
        vision, first = metrics.get_prepare_embeddings_duration().mean, metrics.get_ttft().mean
        count = metrics.get_num_generated_tokens()
        return {
            "vision_ms": vision,
            "prefill_ms": first - vision,
            "decode_ms": metrics.get_tpot().mean * max(0, count - 1),
            "tokens": count,
            "text": done.texts[0].strip(),
            "exited": False,
        }

    def _generated(self, image: np.ndarray, question: str, tokens: int, whole: bool, pruning: int) -> Any:
        import openvino

        config = self._pipe.get_generation_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, not whole, False
        config.pruning_ratio = pruning
        return self._pipe.generate(question, images=[openvino.Tensor(image[None])], generation_config=config)


class OnnxRuntimeGenAI:
    """ONNX Runtime GenAI: the decoder of its builder behind mobius' tower and embedding (``ortgenai.py``)."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": dict.fromkeys(("vision", "embedding", "decoder"), session)}))
        self._model = onnxruntime_genai.Model(config)
        self._processor = self._model.create_multimodal_processor()
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)

    def ask(self, image: np.ndarray, question: str, tokens: int, *, whole: bool = False) -> Measured:
        """See ``Runtime``; it has no metrics, so the tower ends where its log says that the features are there."""
        inputs = self._inputs(image, question)
        length = inputs["input_ids"].shape()[1]
        search = self._genai.GeneratorParams(self._model)
        least = 0 if whole else length + tokens
        search.set_search_options(do_sample=False, max_length=length + tokens, min_length=least)
        features: list[float] = []

        def note(text: str) -> None:
            if "image_features" in text:
                features.append(time.perf_counter())

        self._genai.set_log_options(enabled=True, model_output_shapes=True)
        self._genai.set_log_callback(note)
        try:
            start = time.perf_counter()
            generator = self._genai.Generator(self._model, search)
            generator.set_inputs(inputs)  # runs the tower and the prefill
            generator.generate_next_token()
            first = time.perf_counter()
            self._quiet()  # a step shall not wait for Python to read its log
            begun = time.perf_counter()
            while not generator.is_done():
                generator.generate_next_token()
            done = time.perf_counter()
        finally:
            self._quiet()
        ids = generator.get_sequence(0)[length:]
        return {
            "vision_ms": 1e3 * (features[0] - start),
            "prefill_ms": 1e3 * (first - features[0]),
            "decode_ms": 1e3 * (done - begun),
            "tokens": len(ids),
            "text": self._tokenizer.decode(ids).strip(),
            "exited": False,
        }

    def _quiet(self) -> None:
        self._genai.set_log_options(enabled=False, model_output_shapes=False)
        self._genai.set_log_callback(None)

    def _inputs(self, image: np.ndarray, question: str) -> Any:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = json.dumps([{"role": "user", "content": content}])
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self._processor(text, images=self._genai.Images.open_bytes(file.getvalue()))


RUNTIMES: dict[str, type] = {
    "saccade": Saccade,
    "transformers": Transformers,
    "openvino-genai": OpenVinoGenAI,
    "onnxruntime-genai": OnnxRuntimeGenAI,
}
