"""Trains the pair, both at once on one core each: `python -m glyphs.train`; or one of them: `... large`.

Another seed goes elsewhere: `python -m glyphs.train small --seed 2 --to DIR` writes DIR/small.

Stages: the tower alone learns what each patch shows; then the decoder learns to answer, through every
4th layer first where the plan says so, through all layers at the end. A layer that joins later starts
as the identity. Killing it is safe: the same command goes on where the last checkpoint was, with the
same result, since every batch is a function of (seed, step).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from glyphs import packed
from glyphs.checkpoint import PAIR, PREFIX, SUFFIX, VISUAL_TOKENS, config_from_name, new_tokenizer, save_checkpoint
from glyphs.data import KINDS, NAMES, held_out_questions
from glyphs.plan import PLANS, Plan
from glyphs.tower_start import start_local
from glyphs.train_data import batch_of, pack, shown_cells, training_batch

RUN = Path(tempfile.gettempdir()) / "glyphs_run"
# Without this glibc gives every large tensor back at once, and a fifth of the time goes to page faults.
MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Trainer:
    """Model, cell head, optimiser, step, and whether it is enough (done); `save` and `restore` carry all of it."""

    def __init__(self, plan: Plan, run: Path = RUN):
        self.plan, self.file = plan, run / f"{plan.name}.pt"
        torch.manual_seed(plan.seed)
        self.model = LlavaForConditionalGeneration(config_from_name(plan.name)).train()
        self.model.set_attn_implementation(packed.ATTENTION)
        self.head = packed.CellHead(self.model.config.text_config.hidden_size)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        start_local(self.model.model.vision_tower)
        self.silence_late_layers()
        decoder = {id(p) for m in (self.model.model.language_model, self.model.lm_head) for p in m.parameters()}
        groups = [[p for p in self.parameters if (id(p) in decoder) is inside] for inside in (True, False)]
        self.optimiser = torch.optim.AdamW(
            [{"params": group} for group in groups], betas=(0.9, 0.98), weight_decay=0.05
        )
        self.step, self.seconds, self.done = 0, 0.0, False
        self.tokenizer = new_tokenizer()
        words = [*map(str, range(10)), *NAMES]
        self.keywords = {self.tokenizer.convert_tokens_to_ids(word): i for i, word in enumerate(words)}
        self.prefix_ids = torch.tensor(self.tokenizer(PREFIX.replace("<image>", "<image>" * VISUAL_TOKENS)).input_ids)

    @torch.no_grad()
    def silence_late_layers(self) -> None:
        """Layers absent from an earlier stage add zero to the residual stream until trained; they start out choosy."""
        stride = max([s.stride for s in self.plan.stages] + [1])
        for i, layer in enumerate(self.model.model.language_model.layers):
            if i % stride:
                torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
                layer.self_attn.q_proj.weight.mul_(4), layer.self_attn.k_proj.weight.mul_(4)
                torch.nn.init.zeros_(layer.mlp.down_proj.weight)

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of the question up to where the answer begins, and of the answer with its end token."""
        ids = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        return ids(question + SUFFIX), [*ids(answer), self.tokenizer.eos_token_id]

    def train_step(self) -> tuple[float, float]:
        """One update; returns the losses of the cells and of the answers."""
        stage, rate = self.plan.at(self.step)
        rng = np.random.Generator(np.random.PCG64([self.plan.seed, self.step]))
        batch = training_batch(rng, stage.images, self.encode, self.keywords, questions=stage.stride > 0)
        with torch.autocast("cpu", torch.bfloat16):
            visual = packed.visual_tokens(self.model, packed.pixels_from_images(batch.pixels))
            self.head.spread = stage.stride > 0
            cells = self.head.loss(visual, batch)
            loss = answers = cells
            if stage.stride:
                looks: list[torch.Tensor] | None = [] if stage.look else None
                shown = None
                if rng.random() < stage.spare:
                    shown = torch.from_numpy(shown_cells(rng, batch.cell_digit))
                hidden = packed.packed_hidden(self.model, visual, self.prefix_ids, batch, stage.stride, looks, shown)
                answers, hints = packed.answer_losses(self.model, hidden, batch)
                loss = answers + 0.5 * hints + 0.5 * cells + 0.3 * sum(looks or [])
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group, share in zip(self.optimiser.param_groups, (1.0, stage.sight), strict=True):
            group["lr"] = rate * share
        self.optimiser.step()
        self.step += 1
        return cells.item(), answers.item() if stage.stride else float("nan")

    @torch.no_grad()
    def accuracy(self, n: int, seed: int = 7) -> dict[str, float]:
        """Share of exact answers on held-out questions, overall and per kind, at the current stage's depth."""
        stride = max(self.plan.at(min(self.step, self.plan.steps) - 1)[0].stride, 1)
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        questions = held_out_questions(n, seed)
        for i in range(0, n, 100):
            part = questions[i : i + 100]
            rows = [pack([self.encode(q.question, q.answer)], self.keywords, 16) for q in part]
            batch = batch_of(np.stack([np.asarray(q.image) for q in part]), rows, cells=None)
            visual = packed.visual_tokens(self.model, packed.pixels_from_images(batch.pixels))
            exact = packed.exact_answers(
                self.model, packed.packed_hidden(self.model, visual, self.prefix_ids, batch, stride), batch
            )
            for q, ok in zip(part, exact, strict=False):
                right[q.kind].append(ok)
        return {"all": sum(map(sum, right.values())) / n} | {kind: float(np.mean(r)) for kind, r in right.items()}

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = dict(model=self.model.state_dict(), head=self.head.state_dict(), optimiser=self.optimiser.state_dict())
        state |= dict(step=self.step, seconds=self.seconds, done=self.done, torch_rng=torch.get_rng_state())
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def restore(self) -> bool:
        if not self.file.exists():
            return False
        state = torch.load(self.file, weights_only=True)
        for name in ("model", "head", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.done = state["step"], state["seconds"], state.get("done", False)
        torch.set_rng_state(state["torch_rng"])
        return True


def train(plan: Plan, run: Path = RUN, folder: Path = PAIR) -> None:
    """Trains to the plan's end or until enough, then writes the checkpoint folder."""
    torch.set_num_threads(1)
    trainer = Trainer(plan, run)
    if trainer.restore():
        print(f"{plan.name}: going on at step {trainer.step}", flush=True)
    mark = saved = shown = time.monotonic()
    cells, answers = [], []
    while trainer.step < plan.steps and not trainer.done:
        c, a = trainer.train_step()
        cells.append(c)
        answers.append(a)
        now = time.monotonic()
        trainer.seconds, mark = trainer.seconds + now - mark, now
        if trainer.step % 100 == 0:
            means = float(np.mean(cells)), float(np.mean(answers))
            print(progress(trainer, *means, (now - shown) / len(cells)), flush=True)
            cells, answers, shown = [], [], now
        if trainer.step in plan.ends or (
            plan.at(trainer.step - 1)[0].stride and trainer.step % plan.validate_every == 0
        ):
            scores = trainer.accuracy(plan.validate_on)
            print(
                f"{plan.name} step {trainer.step} held-out " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()),
                flush=True,
            )
            trainer.done = scores["all"] >= plan.enough
        if now - saved > 60:  # behind the validation, so that a run which goes on does not miss this step's
            trainer.save()
            saved = now
    trainer.save()
    images = sum(plan.at(step)[0].images for step in range(trainer.step))
    save_checkpoint(trainer.model.eval(), folder / plan.name)
    record = dict(model=plan.name, steps=trainer.step, images=images, minutes=round(trainer.seconds / 60, 1))
    (folder / plan.name / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)


def progress(trainer: Trainer, cells: float, answers: float, seconds: float) -> str:
    """One line of the log: losses, time spent, and the time this stage still needs at `seconds` a step."""
    plan, step = trainer.plan, trainer.step
    stage, rate = plan.at(step - 1)
    left = min(end for end in plan.ends if end >= step) - step
    return (
        f"{plan.name} step {step}/{plan.steps} stride {stage.stride} rate {rate:.1e} cells {cells:.3f} "
        f"answers {answers:.3f}  {trainer.seconds / 60:.1f} min, stage ends in {left * seconds / 60:.1f} min"
    )


def main(arguments: list[str]) -> None:
    """One worker process per model; with `--here` this process is the only model's."""
    parser = argparse.ArgumentParser(prog="python -m glyphs.train", description="Train the pair, or one of it.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="large or small; both where none is named")
    parser.add_argument("--seed", type=int, help="instead of the plan's; needs --to")
    parser.add_argument("--to", type=Path, default=PAIR, metavar="DIR", help="where the checkpoint folders are written")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    names = given.names or list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"no model {unknown[0]!r}; the names are {' and '.join(PLANS)}")
    if given.seed is not None and given.to == PAIR:
        parser.error("a seed of your own would overwrite the shipped pair; say where to with --to DIR")
    if given.here:
        (name,) = names
        plan = PLANS[name] if given.seed is None else replace(PLANS[name], seed=given.seed)
        train(plan, run_folder(plan), given.to)
        return
    start = time.monotonic()
    rest = ["--here", "--to", str(given.to), *([] if given.seed is None else ["--seed", str(given.seed)])]
    command = [sys.executable, "-m", "glyphs.train", *rest]
    workers = [subprocess.Popen([*command, name], env=os.environ | MEMORY) for name in names]
    failed = [name for name, worker in zip(names, workers, strict=True) if worker.wait()]
    print(f"total {(time.monotonic() - start) / 60:.1f} min" + (f", failed: {failed}" if failed else ""))
    sys.exit(bool(failed))


def run_folder(plan: Plan) -> Path:
    """Where a plan's last checkpoint is kept while it trains; another seed's has its own."""
    return RUN if plan.seed == PLANS[plan.name].seed else RUN / f"seed-{plan.seed}"


if __name__ == "__main__":
    main(sys.argv[1:])
