"""Plans at run time: the vision stage, host policies and draws through the cascade, held to plain references.

What the host chooses is written once more here from the formulas, whole matrices, in float64.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from engines.cascade import Cascade
from engines.guidance import random_guidance
from engines.model import Model
from engines.policies import cdpruner, divprune
from engines.stream import Stream
from engines.talk.messages import asked
from graphs.errors import UsageError
from graphs.plan import PrunePoint, PruningPlan, VisionPoint
from tests.policies.plain import PlainDecoder, share
from tests.policies.test_decoder_policies import all_text_mean, last_row_mean
from tests.policies.tower import PlainTower, best, received

QUESTION = "what digit is red ?"


def an_image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def cosine(a, b):
    return (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


def max_min(embeds, count):
    """DivPrune: every pair's distance at once, then greedily."""
    distance = 1 - cosine(embeds, embeds)
    np.fill_diagonal(distance, np.inf)
    chosen = [int(distance.min(1).argmax())]
    while len(chosen) < count:
        rest = [v for v in range(len(embeds)) if v not in chosen]
        chosen.append(max(rest, key=lambda v: (distance[v, chosen].min(), -v)))
    return sorted(chosen)


def dpp_map(embeds, text, count):
    """CDPruner: the subset grown by the largest determinant, computed as determinants."""
    score = cosine(embeds, text).mean(1)
    relevance = (score - score.min() + 1e-6) / (score.max() - score.min())
    kernel = relevance[:, None] * cosine(embeds, embeds) * relevance[None]
    chosen = []
    for _ in range(count):
        rest = [v for v in range(len(embeds)) if v not in chosen]
        chosen.append(max(rest, key=lambda v: np.linalg.slogdet(kernel[np.ix_([*chosen, v], [*chosen, v])])[1]))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 5, 8, 30])
def test_greedy_choices_are_their_formulas(seed, count):
    draw = np.random.default_rng(seed)
    embeds, text = draw.standard_normal((30, 40)), draw.standard_normal((6, 40))
    assert divprune.chosen(embeds.astype(np.float32), count).tolist() == max_min(embeds.astype(np.float32), count)
    wide = embeds.astype(np.float32).astype(np.float64)
    assert cdpruner.chosen(embeds.astype(np.float32), text, count).tolist() == dpp_map(wide, text, count)


def test_divprune_in_pieces(monkeypatch):
    embeds = np.random.default_rng(1).standard_normal((25, 6))
    whole = divprune.chosen(embeds, 7).tolist()
    monkeypatch.setattr(divprune, "PIECE", 4)
    assert divprune.chosen(embeds, 7).tolist() == whole


def test_equal_tokens_and_no_text_are_no_trouble():
    for count in (1, 3, 6):
        kept = cdpruner.chosen(np.ones((6, 4)), np.zeros((0, 4)), count)
        assert len(set(kept.tolist())) == count
        assert divprune.chosen(np.ones((6, 4)), count).tolist() == list(range(count))


@pytest.fixture(scope="session")
def tower(llava_model):
    return PlainTower(llava_model)


@pytest.fixture(scope="session")
def plain(llava_model):
    return PlainDecoder(llava_model.model.language_model, llava_model.lm_head, llava_model.config.text_config)


class Told:
    """A question as the plain reference knows it."""

    def __init__(self, model: Model, llava_model, image, tower) -> None:
        visual = model.processor.look(image)
        self.ids = model.processor.prompt((asked(QUESTION, image),), [visual])[0]
        pixels = torch.from_numpy(visual.feeds["pixel_values"][0])
        self.embeds = tower.embeds(pixels)
        self.visual_at = np.flatnonzero(self.ids == model.spec.tokens.image)
        self.look = llava_model.get_input_embeddings().double()
        self.text = self.look(torch.from_numpy(self.ids[self.visual_at[-1] + 1 :])).detach()
        self.eos = model.spec.tokens.eos

    def rows(self, kept):
        """Prompt rows that are there, their embeddings and which are visual."""
        rows = np.sort(np.concatenate([np.setdiff1d(np.arange(len(self.ids)), self.visual_at), self.visual_at[kept]]))
        is_visual = torch.from_numpy(np.isin(rows, self.visual_at))
        wide = self.look(torch.from_numpy(self.ids[rows])).detach().clone()
        wide[is_visual] = self.embeds[list(kept)]
        return rows, wide, is_visual

    def greedy(self, plain, kept, layer, score, count, steps):
        """Greedy tokens of the pruned decoder, the whole sequence again for each; what the prefill kept stays so."""
        rows, wide, is_visual = self.rows(kept)
        _, (forced,) = plain.run(wide, is_visual, {layer: (score, count)}, positions=rows)
        tokens = []
        while len(tokens) < steps and not (tokens and tokens[-1] in self.eos):
            longer = torch.cat([wide, self.look(torch.tensor(tokens, dtype=torch.int64)).detach()])
            more = torch.arange(len(wide), len(longer))
            positions = np.concatenate([rows, len(self.ids) + np.arange(len(tokens))])
            seen = torch.cat([is_visual, torch.zeros(len(tokens), dtype=torch.bool)])
            logits, _ = plain.run(
                longer, seen, {layer: (None, 0)}, positions=positions, forced=[torch.cat([forced, more])]
            )
            tokens.append(int(logits[-1].argmax()))
        original = rows[forced.numpy()][is_visual[forced].numpy()] - self.visual_at[0]
        return tokens, original.tolist()


@pytest.mark.parametrize("keep", [(0.75, 0.5), (0.5, 0.25), (0.25, 0.1)])
def test_star_through_the_cascade(exported, llava_model, tower, plain, keep):
    stages = exported("star")
    cascade = Cascade.from_exports(stages.folder)
    told = Told(cascade.large, llava_model, an_image(3), tower)
    answer = cascade.ask(an_image(3), QUESTION, keep=keep, max_new_tokens=6)
    at_vision = best(received(told.embeds), share(16, keep[0]))
    tokens, kept = told.greedy(plain, at_vision, 1, all_text_mean, share(16, keep[1]), 6)
    assert [k.tolist() for k in answer.kept] == [at_vision, kept]
    assert list(answer.tokens) == tokens
    assert answer.keep == keep
    assert answer.visual_tokens == 16
    assert answer.average_retention == pytest.approx((1 * keep[0] + 3 * keep[1]) / 4)


def with_plan(stages, plan):
    """The same graphs under a plan that only the host carries out."""
    return Model(stages.folder, stages.spec.model_copy(update={"plan": plan}))


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("score", ["divprune", "cdpruner", "random"])
def test_host_policies_before_fastv(exported, llava_model, tower, plain, score, keep):
    stages = exported("fastv")
    points = (PrunePoint(layer=2, score="attention", rows="last", keep=0.2),)
    plan = PruningPlan(name="x", vision=VisionPoint(score=score, keep=0.9, seed=5), points=points).validated(4)
    cascade = Cascade(None, with_plan(stages, plan))
    told = Told(cascade.large, llava_model, an_image(4), tower)
    answer = cascade.ask(an_image(4), QUESTION, keep=(keep, 0.2), max_new_tokens=4)
    count, embeds = share(16, keep), told.embeds.numpy()
    at_vision = {
        "divprune": lambda: max_min(embeds, count),
        "cdpruner": lambda: dpp_map(embeds, told.text.numpy(), count),
        "random": lambda: sorted(np.random.default_rng([5, 0]).permutation(16)[:count].tolist()),
    }[score]()
    tokens, kept = told.greedy(plain, at_vision, 2, last_row_mean, share(16, 0.2), 4)
    assert [k.tolist() for k in answer.kept] == [at_vision, kept]
    assert list(answer.tokens) == tokens


def test_random_is_seeded(exported, llava_model, tower, plain):
    stages = exported("random")
    kept = []
    for seed in (0, 0, 1):
        plan = PruningPlan(name="x", points=(PrunePoint(layer=0, score="random", keep=0.5, seed=seed),))
        answer = Cascade(None, with_plan(stages, plan)).ask(an_image(4), QUESTION, max_new_tokens=2)
        assert answer.kept[0].tolist() == best(random_guidance(16, seed), 8)
        kept.append(answer.kept[0].tolist())
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("beside_a_small_one", [False, True])
def test_guidance_that_is_given_wins_over_a_draw(exported, beside_a_small_one):
    plan = PruningPlan(name="x", points=(PrunePoint(layer=0, score="random", keep=0.5, seed=0),))
    small = exported("sgl", "small") if beside_a_small_one else None
    cascade = Cascade(Model(small.folder, small.spec) if small else None, with_plan(exported("random"), plan))
    guidance = -random_guidance(16, 0)
    answer = cascade.ask(an_image(4), QUESTION, guidance=guidance, max_new_tokens=1)
    assert answer.model == ("large" if small else "alone")
    assert answer.kept[0].tolist() == best(guidance, 8)


def test_a_count_is_a_count(exported):
    stages = exported("random")
    plan = PruningPlan(name="x", points=(PrunePoint(layer=0, score="random", count=5),))
    answer = Cascade(None, with_plan(stages, plan)).ask(an_image(4), QUESTION, max_new_tokens=1)
    assert len(answer.kept[0]) == 5
    assert answer.keep == (5 / 16,)


def test_a_count_per_image_is_one_for_each(exported):
    plan = """
schema = "saccade.plan/1"
name = "each"

[[point]]
where = 1
score = "attention"
rows = "text"
count = 5
per_image = true
"""
    cascade = Cascade.from_exports(exported(plan).folder)
    answer = cascade.ask([an_image(1), an_image(2)], QUESTION, max_new_tokens=1)
    assert len(answer.kept[0]) == 10
    assert answer.keep == (10 / 32,)
    assert answer.average_retention == pytest.approx((1 + 3 * 10 / 32) / 4)


def test_keeps_that_cannot_be(exported):
    cascade = Cascade.from_exports(exported("star").folder)
    with pytest.raises(UsageError, match="1 keep ratios were given, but plan star has 2 prune points"):
        cascade.ask(an_image(1), QUESTION, keep=0.5)
    with pytest.raises(UsageError, match="grow with depth"):
        cascade.ask(an_image(1), QUESTION, keep=(0.2, 0.5))
    tome = Cascade.from_exports(exported("tome").folder)
    with pytest.raises(UsageError, match="keep at least 6"):
        tome.ask(an_image(1), QUESTION, keep=0.05)


@pytest.mark.parametrize("keep", [(1.0, 1.0), (0.5, 0.25)])
def test_two_stages_over_several_turns(exported, keep):
    """Text alone first, so that the vision stage joins later; nothing pruned equals a fresh run on the whole talk."""
    cascade = Cascade.from_exports(exported("star").folder)
    talk = cascade.chat(keep=keep, max_new_tokens=3)
    turns = [("what ?", []), (QUESTION, [an_image(1)]), ("which digit ?", []), (QUESTION, [an_image(2), an_image(3)])]
    images = 0
    for question, shown in turns:
        before = talk.talk
        answer = talk.ask(question, shown)
        images += len(shown)
        assert answer.visual_tokens == 16 * images
        assert [len(k) for k in answer.kept] == ([share(16, k) * images for k in keep] if images else [])
        if keep == (1.0, 1.0):
            fresh = cascade.turn((*before, asked(question, shown)), max_new_tokens=3)
            assert Stream(cascade.parts(fresh, keep, 1.0)).finish().tokens == answer.tokens


def test_a_turn_answered_again_is_seen_again(exported):
    """With other shares, and with the same: what the first pass left in the memory does not count."""
    cascade = Cascade.from_exports(exported("star").folder)
    talk = (asked(QUESTION, [an_image(1)]),)
    turn = cascade.turn(talk, max_new_tokens=3)
    for keep in [(0.5, 0.25), (1.0, 1.0), (1.0, 1.0)]:
        again, fresh = (
            Stream(cascade.parts(one, keep, 1.0)).finish() for one in (turn, cascade.turn(talk, max_new_tokens=3))
        )
        assert again.cached_tokens == 0
        assert [kept.tolist() for kept in again.kept] == [kept.tolist() for kept in fresh.kept]
        assert again.tokens == fresh.tokens
