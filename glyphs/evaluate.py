"""Exact answers of the shipped pair on held-out questions: `python -m glyphs.evaluate [n] [name ...]`.

The last line is JSON. Plain transformers: the checkpoint's own processor and chat template, greedy `generate`, float32.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from glyphs.checkpoint import PAIR, SHAPES
from glyphs.data import KINDS, Question, held_out_questions


def prompt_from_question(processor, question: str) -> str:
    """The text the model was trained on: system words, image, question, and the cue to answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.inference_mode()
def answers(folder: Path, questions: list[Question], batch: int = 100) -> list[str]:
    """The model's answer to each question."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    said = []
    for i in range(0, len(questions), batch):
        part = questions[i : i + batch]
        prompts = [prompt_from_question(processor, q.question) for q in part]
        inputs = processor(images=[q.image for q in part], text=prompts, padding=True, return_tensors="pt")
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(tokens, skip_special_tokens=True)
    return said


def exact_share(questions: list[Question], said: list[str]) -> dict[str, float]:
    """Share of answers that equal the expected string, over all questions and by kind."""
    right = [q.answer == a for q, a in zip(questions, said, strict=True)]
    by_kind = {kind: [r for q, r in zip(questions, right, strict=False) if q.kind == kind] for kind in KINDS}
    return {"all": sum(right) / len(right)} | {kind: round(sum(r) / len(r), 4) for kind, r in by_kind.items() if r}


def main(arguments: list[str]) -> None:
    """Prints a line per model to stderr and the whole as JSON."""
    n = int(arguments[0]) if arguments else 1000
    questions = held_out_questions(n)
    scores = {name: exact_share(questions, answers(PAIR / name, questions)) for name in arguments[1:] or SHAPES}
    for name, score in scores.items():
        print(name, " ".join(f"{kind}: {share:.3f}" for kind, share in score.items()), file=sys.stderr)
    print(json.dumps({"questions": n, "exact": scores}))


if __name__ == "__main__":
    main(sys.argv[1:])
