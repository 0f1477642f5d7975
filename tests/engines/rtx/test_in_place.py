"""Caches that the CPU writes in place: the numbers of the concatenated ones, no past copied, views that stay.

Here because these exports' heads have widths that GroupQueryAttention takes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from engines.bundles.golden import replay
from engines.cache import SPARE_ROWS, Cache, cut
from engines.decoder import Chunk, Decoder, Step
from engines.sessions import host_buffers
from engines.sessions.host_buffers import HostBuffer, Piece, Shelf
from engines.sessions.session import open_session
from graphs.errors import OperationFailed
from graphs.lowering.host import mapped
from graphs.lowering.in_place import CacheInPlace, grouped, refusal
from graphs.plan import PrunePoint, PruningPlan
from graphs.spec import spec_from_folder
from tests.engines.rtx.conftest import Exports

ROLES = ("small", "large")


def decoder_of(folder: Path, in_place: bool) -> Decoder:
    spec = spec_from_folder(folder)
    session = open_session(folder / spec.stages["decoder"].file, threads=1, in_place=in_place)
    assert session.form == ("in-place" if in_place else "concat")
    return Decoder(session, spec)


def both(exports: Exports, role: str) -> tuple[Decoder, Decoder]:
    return decoder_of(exports[role], True), decoder_of(exports[role], False)


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and a chunk have attentions of their own in models of any size, a chunk's in pieces of three rows."""
    for name in ("SHARED", "SHARED_RECEIVED", "WIDE", "LONG"):
        monkeypatch.setattr(f"graphs.lowering.one_row.{name}", 0)
    for name, value in {"MAP": 0, "SHARED": 1, "CHUNKS": 1000, "PIECE": 3, "PIECE_OF_FEW": 3}.items():
        monkeypatch.setattr(f"graphs.lowering.many_rows.{name}", value)


def fed(decoder: Decoder, rows: int, seed: int, cache: Cache | None, visual: int = 0, **more: Any) -> Step:
    """Random rows, the first of them visual."""
    rng = np.random.default_rng(seed)
    embeds = rng.standard_normal((1, rows, decoder._spec.language.width), np.float32)
    priority = rng.random(rows, dtype=np.float32) if decoder._spec.plan.uses_priority else None
    return decoder.run(Chunk(embeds, np.arange(rows) < visual), cache, priority_S=priority, **more)


def rows_of(decoder: Decoder, cache: Cache) -> dict[str, np.ndarray]:
    """The filled rows of every buffer."""
    of = {
        f"past_{side}_{i}": j
        for j, layers in enumerate(decoder._spec.plan.segments(decoder._spec.language.layers))
        for i in layers
        for side in "kv"
    }
    return {name: decoder._session.to_host(x)[:, :, : cache.lengths[of[name]]] for name, x in cache.values.items()}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("role", ROLES)
def test_prefill_chunk_decode_growth_and_a_cut_are_those_of_the_concatenated_cache(
    exports: Exports, role: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Received attention is summed over the steps in the graph, and per step on the host."""
    if own:
        always(monkeypatch)
    mine, theirs = both(exports, role)
    got, want = (fed(d, 20, 0, None, visual=9, tail=3) for d in (mine, theirs))
    total = want.received
    for step in range(1, 9):
        np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)
        assert [k.tolist() for k in got.kept] == [k.tolist() for k in want.kept]
        assert got.cache.lengths == want.cache.lengths
        ours, plain = rows_of(mine, got.cache), rows_of(theirs, want.cache)
        assert all(np.abs(ours[name] - plain[name]).max() < 2e-5 for name in ours)
        if total is not None:
            received = mine._session.to_host(got.received)[0]
            np.testing.assert_allclose(received[: len(total)], total, atol=1e-5)
            assert not received[len(total) :].any()
        rows = {3: SPARE_ROWS, 6: 5}.get(step, 1)  # one chunk is more than there is room for
        caches = [got.cache, want.cache]
        if step == 5:
            cuts = zip((mine, theirs), caches, strict=True)
            caches = [cut(c, d._spec, c.next_position - 7, d._session.to_host) for d, c in cuts]
        got, want = fed(mine, rows, step, caches[0], so_far=got.received), fed(theirs, rows, step, caches[1])
        if total is not None and step != 5:
            total = np.pad(total, (0, len(want.received) - len(total))) + want.received
        elif total is not None:
            total = np.pad(total[: caches[1].lengths[0]], (0, rows)) + want.received


def test_a_step_copies_no_past_row(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, _ = both(exports, "large")
    step = fed(mine, 20, 0, None, visual=9)
    monkeypatch.setattr(mine._session, "buffers", lambda *_: pytest.fail("a buffer was made"))
    for seed in range(5):
        after = fed(mine, 1, seed, step.cache)
        assert all(after.cache.values[name] is buffer for name, buffer in step.cache.values.items())
        assert all(isinstance(buffer, HostBuffer) for buffer in after.cache.values.values())
        step = after


def test_a_view_that_another_one_would_write_over_moves_first(exports: Exports) -> None:
    mine, theirs = both(exports, "large")
    results = []
    for decoder in (mine, theirs):
        first = fed(decoder, 20, 0, None, visual=9).cache
        held = {name: rows.copy() for name, rows in rows_of(decoder, first).items()}
        longer = fed(decoder, 3, 1, first).cache
        other = fed(decoder, 4, 2, first).cache  # an older view, continued a second time
        shorter = cut(longer, decoder._spec, longer.next_position - 2, decoder._session.to_host)
        third = fed(decoder, 2, 3, shorter).cache  # the longer one is still held
        for name, rows in rows_of(decoder, first).items():
            np.testing.assert_array_equal(rows, held[name])
        results.append([rows_of(decoder, view) for view in (longer, other, third)])
        if decoder is mine:
            assert longer.room is first.room
            assert shorter.room is first.room
            assert other.room is not first.room
            assert third.room is not first.room
    for ours, plain in zip(*results, strict=True):
        assert all(np.abs(ours[name] - plain[name]).max() < 2e-5 for name in ours)


def test_a_cut_whose_longer_view_is_gone_is_continued_in_place(exports: Exports) -> None:
    mine, _ = both(exports, "small")
    step = fed(mine, 20, 0, None)
    room = step.cache.room
    cache = cut(step.cache, mine._spec, step.cache.next_position - 5, mine._session.to_host)
    del step
    assert fed(mine, 2, 1, cache).cache.room is room


def test_buffers_that_hold_no_numbers_are_left(exports: Exports) -> None:
    mine, _ = both(exports, "large")
    step = fed(mine, 20, 0, None, visual=9)
    bad = Chunk(np.full((1, 2, 64), np.nan, np.float32), np.zeros(2, bool))
    with pytest.raises(OperationFailed, match="not numbers"):
        mine.run(bad, step.cache, priority_S=np.zeros(2, np.float32))
    after = fed(mine, 1, 1, step.cache)
    assert after.cache.room is not step.cache.room
    assert np.isfinite(after.logits).all()


def pieces_of(cache: Cache) -> set[Piece]:
    return {buffer.piece for buffer in cache.values.values()}


def test_small_buffers_are_lent_again_when_nobody_holds_them(exports: Exports) -> None:
    mine, theirs = both(exports, "large")
    held = fed(mine, 20, 0, None, visual=9).cache
    pieces = pieces_of(held)
    assert len(pieces) == len(held.lengths)
    assert not pieces & pieces_of(fed(mine, 20, 1, None, visual=9).cache)
    bad = Chunk(np.full((1, 2, 64), np.nan, np.float32), np.zeros(2, bool))
    with pytest.raises(OperationFailed, match="not numbers"):  # the next borrower must not see what this leaves
        mine.run(bad, held, priority_S=np.zeros(2, np.float32))
    later = [cut(held, mine._spec, held.next_position - 3, mine._session.to_host)]
    del held
    assert not pieces & pieces_of(fed(mine, 25, 2, None, visual=9).cache)
    later.clear()
    lent = set()
    for rows in (23, 120, 24):  # the second is too long for them
        got, want = (fed(d, rows, rows, None, visual=9) for d in (mine, theirs))
        lent |= pieces_of(got.cache)
        for step in range(3):
            np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)
            got, want = fed(mine, 1, step, got.cache), fed(theirs, 1, step, want.cache)
    assert pieces <= lent


def test_few_and_small_pieces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffers, "KEPT_BYTES", 4000)
    shelf, like = Shelf(), np.zeros((1, 1, 0, 8), np.float32)
    lent = [shelf.lend(4, like, 20, 30) for _ in range(host_buffers.KEPT + 2)]
    pieces = [buffers[0].piece for buffers in lent]
    lent.clear()
    again = [shelf.lend(4, like, 20, 30) for _ in pieces]
    assert len({buffers[0].piece for buffers in again} & set(pieces)) == host_buffers.KEPT
    large = shelf.lend(4, like, 32, 32)
    piece = large[0].piece
    assert piece.whole.nbytes > 4000
    del large
    assert shelf.lend(4, like, 32, 32)[0].piece is not piece


@pytest.mark.parametrize("role", ROLES)
def test_steps_over_the_same_buffers_are_bound_once_and_each_keeps_its_results(
    exports: Exports, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = both(exports, role)
    made, real = list[int](), mine._session._session.io_binding
    monkeypatch.setattr(mine._session._session, "io_binding", lambda: (made.append(0), real())[1])
    steps = [fed(mine, 20, 0, None, visual=9, keep=0.5 if role == "large" else None)]
    received, logits = [], []
    for seed in range(6):
        steps.append(fed(mine, 1, seed, steps[-1].cache))
        logits.append(steps[-1].logits.copy())
        if role == "small":
            received.append(mine._session.to_host(steps[-1].received).copy())
    # A prefill that prunes returns more than a step does.
    assert len(made) == (2 if role == "large" else 1)
    for step, was in zip(steps[1:], logits, strict=True):
        np.testing.assert_array_equal(step.logits, was)
    for step, heard in zip(steps[1:], received, strict=False):
        np.testing.assert_array_equal(mine._session.to_host(step.received), heard)


@pytest.mark.parametrize("packed", [True, False])
def test_no_step_makes_received_attention_a_second_time(
    exports: Exports, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether heads were put together before or not, each ReceivedInCache stands where many rows are fed."""
    always(monkeypatch)
    model = ir.load(exports["small"] / "decoder.onnx")
    if packed:
        assert mapped(model)
    assert grouped(model)
    kinds = [node.op_type for node in model.graph]
    choices = [node for node in model.graph if node.op_type == "If"]
    assert not {"GroupQueryAttention", "ReceivedInCache"} & set(kinds)
    layers = spec_from_folder(exports["small"]).language.layers
    assert [len(node.outputs) for node in choices] == [4] * layers
    for node in choices:
        branches = [
            {n.op_type for n in node.attributes[f"{name}_branch"].as_graph().all_nodes()} for name in ("then", "else")
        ]
        assert not {"GroupQueryAttention", "ReceivedInCache"} & branches[0]
        assert {"GroupQueryAttention", "ReceivedInCache"} <= branches[1]


@pytest.mark.parametrize("role", ROLES)
def test_golden_tensors_agree_in_place(exports: Exports, role: str) -> None:
    open_in_place: Callable[[Path], Any] = lambda file: open_session(file, threads=1, in_place=True)  # noqa: E731
    replays = list(replay(exports[role], spec_from_folder(exports[role]), open_in_place))
    assert {r.case for r in replays if r.stage == "decoder"} == {"prefill", "chunk", "decode"}
    assert all(r.agrees for r in replays)


def test_what_cannot_be_in_place_is_left_or_refused(exports: Exports) -> None:
    preview = PruningPlan(name="p", points=(PrunePoint(layer=2, score="preview", keep=0.5),))
    assert "do not enter" in refusal(preview)
    assert refusal(spec_from_folder(exports["large"]).plan) == ""
    model = ir.load(exports["large"] / "decoder.onnx")
    past = next(value for value in model.graph.inputs if value.name == "past_k_1")
    past.shape = ir.Shape([1, 2, "P_1", 12])
    assert not grouped(model)
    past.shape = ir.Shape([1, 2, "T", 16])
    with pytest.raises(ir.passes.PassError, match="the length of past_k_1 is T"):
        CacheInPlace("grouped")(model)
    assert not grouped(ir.load(exports["large"] / "embed.onnx"))


def test_a_cache_of_another_type_or_with_another_reader_is_left(exports: Exports) -> None:
    model = ir.load(exports["large"] / "decoder.onnx")
    past = next(value for value in model.graph.inputs if value.name == "past_k_1")
    past.type = ir.TensorType(ir.DataType.FLOAT16)
    assert not grouped(model), "the operator's forms for the CPU are of fp32"
    past.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(model.graph[0], ir.node("Concat", [past, past], {"axis": 2}))
    assert not grouped(model), "a layer's keys are read before it runs"
    with pytest.raises(ir.passes.PassError, match="past_k_1 is read by more than its layer's attention"):
        CacheInPlace("grouped")(model)


def test_what_the_exporter_does_not_write_is_refused(exports: Exports) -> None:
    model = ir.load(exports["large"] / "decoder.onnx")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    with pytest.raises(ir.passes.PassError, match="is no causal attention on top of a cache"):
        CacheInPlace("grouped")(model)
    model = ir.load(exports["large"] / "decoder.onnx")
    past = next(value for value in model.graph.inputs if value.name == "past_k_0")
    size = ir.node("Shape", [past], {"start": 2, "end": 3})
    attention = next(node for node in model.graph if node.op_type == "Attention")
    behind = ir.node("Slice", [attention.outputs[0], size.outputs[0], model.graph.inputs[0]])
    model.graph.insert_before(attention, size)
    model.graph.insert_after(attention, behind)
    with pytest.raises(ir.passes.PassError, match="reads the length of a cache in a way that is not known"):
        CacheInPlace("grouped")(model)


def test_each_segments_buffer_has_a_length_of_its_own_unless_one_is_given(exports: Exports) -> None:
    lengths = {}
    for capacity in (None, 96):
        model = ir.load(exports["large"] / "decoder.onnx")
        segments = {v.name: str(v.shape[2]) for v in model.graph.inputs if v.shape and str(v.name).startswith("past_")}
        CacheInPlace("grouped", capacity)(model)
        lengths[capacity] = {v.name: str(v.shape[2]) for v in model.graph.inputs if v.shape and v.name in segments}
    assert set(segments.values()) == {"P_0", "P_1"}
    assert lengths[None] == {name: symbol.replace("P_", "C_") for name, symbol in segments.items()}
    assert lengths[96] == dict.fromkeys(segments, "96")
