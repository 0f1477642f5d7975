"""Budgets per image, and merging of the dropped, inside the decoder: two families, against plain float64 torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from engines.budgets import cuts_of
from engines.cascade import Cascade
from engines.model import Model
from exporter.export import export_checkpoint
from graphs.plan_file import plan_from_toml
from graphs.rules import export_from_folder, findings_in
from tests.families.cases import pictures
from tests.policies.onnx_run import Stages
from tests.policies.plain import PlainDecoder, chosen, share
from tests.policies.test_decoder_policies import all_text_mean, raters_mean
from tests.policies.test_packed_ops import recycled
from tests.tiny import tiny_llava
from tests.tiny_families import tiny_internvl

HEAD = 'schema = "saccade.plan/1"\nname = "x"\n'
POINT = '[[point]]\nwhere = {}\nscore = "attention"\nrows = "{}"\nkeep = {}\n{}\n'
EACH = HEAD + POINT.format(1, "text", 0.5, "per_image = true") + POINT.format(2, "text", 0.25, "per_image = true")
MERGING = HEAD + POINT.format(1, "raters", 0.5, "merge = 0.4") + POINT.format(2, "raters", 0.3, "merge = 0.2")
MAKERS = {"llava": tiny_llava, "internvl": tiny_internvl}
TALK = "t aaaaaaaaaaaa tt bbb t cccccccc tttttt".replace(" ", "")
IMAGE = np.array(["abc".find(row) if row in "abc" else -1 for row in TALK])
LAYERS, PROMPT = (1, 2), len(TALK)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MAKERS)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"budgets_{request.param}")
    checkpoint = MAKERS[request.param](folder / "checkpoint")
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64).eval()
    found = {"plain": PlainDecoder(hf.model.language_model, hf.lm_head, hf.config.get_text_config())}
    for name, plan in (("each", EACH), ("merging", MERGING)):
        export_checkpoint(checkpoint, folder / name, plan=plan_from_toml(plan), role="alone")
        found[name] = Stages(folder / name)
    return SimpleNamespace(**found)


def a_talk(stages, seed):
    width = stages.spec.language.width
    embeds = np.random.default_rng(seed).standard_normal((1, len(TALK), width)).astype(np.float32)
    return embeds, torch.from_numpy(embeds[0]), torch.from_numpy(IMAGE >= 0)


def same(got, wanted):
    got, wanted = np.asarray(got), wanted.numpy()
    return np.abs(got - wanted[-len(got) :]).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("ratios", [(0.75, 0.5), (0.5, 0.25), (0.1, 0.05)])
def test_each_image_keeps_its_own_best(family, ratios):
    stages, originals = family.each, [12, 3, 8]
    embeds, wide, seen = a_talk(stages, seed=int(100 * ratios[0]))

    def best_of_each(ratio):
        def cut(score, rows):
            stays = ~rows.visual
            for i, n in enumerate(originals):
                own = torch.from_numpy(i == IMAGE)[rows.alive]
                stays |= chosen(score, own, share(n, ratio)) & own
            return stays, rows.hidden

        return cut

    wanted, kept = family.plain.run(
        wide, seen, {i: (all_text_mean, best_of_each(r)) for i, r in zip(LAYERS, ratios, strict=True)}
    )
    cuts = cuts_of(stages.spec.plan, int((IMAGE < 0).sum()), originals, originals, ratios)
    picks = [cut.feeds[f"pick_{i}"] for i, cut in enumerate(cuts)]
    out, got = stages.decode(embeds, IMAGE >= 0, picks, image=IMAGE)
    assert [g.tolist() for g in got] == [k.tolist() for k in kept]
    for rows, ratio in zip(got, ratios, strict=True):
        assert [int((IMAGE[rows] == i).sum()) for i in range(3)] == [share(n, ratio) for n in originals]
    assert same(out["logits"][0], wanted)

    more = np.random.default_rng(9).standard_normal((1, 1, embeds.shape[2])).astype(np.float32)
    (step, _) = stages.decode(
        more, np.zeros(1, bool), [np.zeros(1, np.int64)] * 2, past=out, start=len(TALK), image=np.array([-1])
    )
    forced = [torch.cat([k, torch.tensor([len(TALK)])]) for k in kept]
    longer = torch.cat([wide, torch.from_numpy(more[0])])
    then, _ = family.plain.run(
        longer, torch.cat([seen, torch.tensor([False])]), dict.fromkeys(LAYERS, (None, 0)), forced=forced
    )
    assert same(step["logits"][0], then)


def test_several_images_of_one_question_keep_their_shares(family):
    stages = family.each
    cascade = Cascade(None, Model(stages.folder, stages.spec, threads=1))
    answer = cascade.ask(pictures([(64, 64), (24, 40)]), "which digit is red ?", keep=(0.5, 0.25), max_new_tokens=2)
    counts = cascade.large.processor.look(*pictures([(64, 64), (24, 40)])).tokens
    whose = np.repeat(np.arange(2), counts)
    assert answer.visual_tokens == sum(counts)
    for kept, ratio in zip(answer.kept, (0.5, 0.25), strict=True):
        assert [int((whose[kept] == i).sum()) for i in range(2)] == [share(n, ratio) for n in counts]


class Recycling:
    """A cut by SparseVLM's words; asked again about a longer sequence it puts the same rows there."""

    def __init__(self, kept, merged, pool, prompt=PROMPT):
        self.kept, self.merged, self.pool, self.prompt, self.rows = kept, merged, pool, prompt, None

    def __call__(self, score, rows):
        if self.rows is None:
            text = int((~rows.visual).sum())
            values, where, clear = recycled(
                rows.hidden.numpy(), score.numpy(), rows.visual.numpy(), text + self.kept, self.merged, self.pool
            )
            assert clear > 1e-6
            self.rows = torch.from_numpy(values), where
        values, where = self.rows
        hidden = rows.hidden.clone()
        hidden[where] = values
        stays = torch.zeros(len(hidden), dtype=torch.bool)
        stays[where] = True
        stays |= rows.alive >= self.prompt
        return stays, hidden


def raters_of_the_prompt(rows):
    """The second time nothing is scored."""
    return raters_mean(rows) if len(rows.embeds) == len(TALK) else None


@pytest.mark.parametrize("ratios", [(0.75, 0.6), (0.5, 0.3), (0.2, 0.1)])
def test_the_best_of_the_dropped_are_clustered(family, ratios):
    stages = family.merging
    embeds, wide, seen = a_talk(stages, seed=int(100 * ratios[0]))
    text, visual = int((IMAGE < 0).sum()), int((IMAGE >= 0).sum())
    cuts = cuts_of(stages.spec.plan, text, [visual], [visual], ratios)
    lengths = {name: len(value) for cut in cuts for name, value in cut.feeds.items()}
    by = {
        layer: (raters_of_the_prompt, Recycling(cut.rows - text, lengths[f"merge_{i}"], lengths[f"recycle_{i}"]))
        for i, (layer, cut) in enumerate(zip(LAYERS, cuts, strict=True))
    }
    assert all(lengths[f"recycle_{i}"] >= lengths[f"merge_{i}"] >= 1 for i in range(2))
    wanted, kept = family.plain.run(wide, seen, by)
    keep = [lengths.pop(f"keep_{i}") for i in range(2)]
    out, got = stages.decode(embeds, IMAGE >= 0, keep, **lengths)
    assert [g.tolist() for g in got] == [k.tolist() for k in kept]
    assert [len(g) - text for g in got] == [share(visual, r) for r in ratios]
    assert same(out["logits"][0], wanted)

    more = np.random.default_rng(9).standard_normal((1, 1, embeds.shape[2])).astype(np.float32)
    ones = dict.fromkeys(lengths, 1)
    (step, _) = stages.decode(more, np.zeros(1, bool), [1, 1], past=out, start=len(TALK), **ones)
    longer = torch.cat([wide, torch.from_numpy(more[0])])
    then, _ = family.plain.run(longer, torch.cat([seen, torch.tensor([False])]), by)
    assert same(step["logits"][0], then)


def test_keeping_all_merges_nothing(family):
    stages = family.merging
    embeds, wide, seen = a_talk(stages, seed=5)
    visual = int((IMAGE >= 0).sum())
    cuts = cuts_of(stages.spec.plan, len(TALK) - visual, [visual], [visual], (1, 1))
    lengths = {name: len(value) for cut in cuts for name, value in cut.feeds.items()}
    out, got = stages.decode(embeds, IMAGE >= 0, [lengths.pop(f"keep_{i}") for i in range(2)], **lengths)
    assert [g.tolist() for g in got] == [list(range(len(TALK)))] * 2
    assert same(out["logits"][0], family.plain.run(wide, seen, {})[0])


def test_graph_rules_hold_and_golden_tensors_replay(family):
    from engines.bundles.golden import replay

    for stages in (family.each, family.merging):
        assert not findings_in(export_from_folder(stages.folder))
        assert all(r.agrees for r in replay(stages.folder, stages.spec))
