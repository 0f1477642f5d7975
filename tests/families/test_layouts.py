"""Host-side layouts against transformers' own functions, for many shapes; torch on the test side only."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils
from transformers.image_processing_utils import select_best_resolution

from graphs.layouts import anyres, patches
from graphs.spec import VisualGrid

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
sides = st.integers(2, 30).map(lambda n: 2 * n)
shapes = st.lists(st.tuples(sides, sides), min_size=1, max_size=3)


def qwen_grid(**changes: int) -> VisualGrid:
    made = VisualGrid(image_height=0, image_width=0, rows=0, columns=0, kind="patches", patch=14, frames=2, merge=2)
    return made.model_copy(update=changes)


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_coordinates_are_those_of_get_vision_position_ids(found: list[tuple[int, int]]) -> None:
    thw = torch.tensor([(1, h, w) for h, w in found])
    got = np.concatenate([patches.patch_coordinates(shape, 2) for shape in found])
    np.testing.assert_array_equal(got, vision_utils.get_vision_position_ids(thw, 2).numpy())


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_windows_are_those_of_get_vision_window_index(found: list[tuple[int, int]]) -> None:
    thw = torch.tensor([(1, h, w) for h, w in found])
    index, bounds = vision_utils.get_vision_window_index(thw, 2, 112, 14)
    packed = (index[:, None] * 4 + torch.arange(4)).flatten().numpy()
    wanted = {frozenset(packed[a:b].tolist()) for a, b in pairwise(bounds)}
    feeds = patches.patch_feeds(found, qwen_grid(window=8))
    rows, place = feeds["window_rows"], feeds["window_place"]
    assert {frozenset(row[row >= 0].tolist()) for row in rows} == wanted
    np.testing.assert_array_equal(rows.flatten()[place], np.arange(len(place)))
    image_rows = feeds["image_rows"]
    assert [int((row >= 0).sum()) for row in image_rows] == [h * w for h, w in found]
    np.testing.assert_array_equal(image_rows.flatten()[feeds["image_place"]], np.arange(len(place)))


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_table_taps_are_those_of_the_interpolation_helper(found: list[tuple[int, int]]) -> None:
    thw = torch.tensor([(1, h, w) for h, w in found])
    rows, weights = vision_utils.get_vision_interpolation_indices_and_weights(thw, 48, "bilinear", True, 2)
    feeds = patches.patch_feeds(found, qwen_grid(position_side=48))
    np.testing.assert_array_equal(feeds["table_rows"], rows.numpy())
    np.testing.assert_array_equal(feeds["table_weights"], weights.numpy())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_best_resolution_is_that_of_transformers(height: int, width: int) -> None:
    assert anyres.best_resolution((height, width), PINPOINTS) == select_best_resolution((height, width), PINPOINTS)


class Packer:
    """The part of a model that pack_image_features reads."""

    def __init__(self, grid: VisualGrid, side: int) -> None:
        vision = type("Vision", (), {"image_size": grid.image_height, "patch_size": grid.image_height // side})
        pinpoints = [list(p) for p in grid.pinpoints]
        self.config = type("Config", (), {"vision_config": vision, "image_grid_pinpoints": pinpoints})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(20, 2500), st.integers(20, 2500)), min_size=1, max_size=2),
    st.sampled_from([0, 2, 9]),
)
def test_packing_is_that_of_pack_image_features(sizes: list[tuple[int, int]], most: int) -> None:
    """Each feature carries its own number, so that the gather is compared row by row."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    side = 6
    grid = VisualGrid(
        image_height=336, image_width=336, rows=side, columns=side, kind="anyres", pinpoints=PINPOINTS, max_tiles=most
    )
    counts = [anyres.tile_count(size, grid) for size in sizes]
    numbers = 1 + torch.arange(sum(counts) * side**2, dtype=torch.float32).reshape(-1, side**2, 1)
    newline, split = torch.zeros(1), torch.split(numbers, counts)
    image_sizes = torch.tensor(sizes)
    if most:
        packed, lengths = LlavaOnevisionModel.pack_image_features(
            Packer(grid, side), split, image_sizes, newline, f"anyres_max_{most}"
        )
    else:
        packed, lengths = LlavaNextModel.pack_image_features(Packer(grid, side), split, image_sizes, "default", newline)
    feeds, tokens = anyres.anyres_feeds(sizes, grid)
    assert tokens == lengths.tolist()
    rows = feeds["token_rows"].astype(np.float64)
    got = (rows * feeds["token_weights"]).sum(1) if most else rows
    np.testing.assert_allclose(got, torch.cat(packed)[:, 0].numpy(), atol=1e-3)


@pytest.mark.parametrize("side", [16, 26, 27, 32, 70])
def test_idefics_position_ids_are_those_of_its_embeddings(side: int) -> None:
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    from exporter.idefics3 import position_ids

    config = Idefics3VisionConfig(image_size=side * 2, patch_size=2, hidden_size=1, num_attention_heads=1)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(torch.arange(side**2).float()[:, None])
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        mask = torch.ones(1, side, side, dtype=torch.bool)
        wanted = embeddings(torch.zeros(1, 3, side * 2, side * 2), mask)[0, :, 0].long()
    assert position_ids(side).tolist() == wanted.tolist()
    assert math.isqrt(len(wanted)) == side


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5), st.tuples(sides, sides)), min_size=1, max_size=5))
def test_positions_are_those_of_get_rope_index(parts: list[int | tuple[int, int]]) -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    kinds = [p for i, p in enumerate(parts) if isinstance(p, int) or i == 0 or isinstance(parts[i - 1], int)]
    images = [p for p in kinds if not isinstance(p, int)]
    visual = np.concatenate(
        [np.zeros(p, bool) if isinstance(p, int) else np.ones(p[0] * p[1] // 4, bool) for p in kinds]
    )
    fake = type("Model", (), {})()
    fake.config = type("C", (), {"vision_config": type("V", (), {"spatial_merge_size": 2})})
    fake.get_vision_position_ids = lambda *a, **k: Qwen2VLModel.get_vision_position_ids(fake, *a, **k)
    thw = torch.tensor([(1, h, w) for h, w in images]) if images else None
    ids = torch.zeros(1, len(visual), dtype=torch.int64)
    wanted, delta = Qwen2VLModel.get_rope_index(fake, ids, torch.from_numpy(visual)[None].int(), thw)
    got = patches.axes_positions(visual, [(h // 2, w // 2) for h, w in images])
    np.testing.assert_array_equal(got, wanted.numpy())
    if isinstance(kinds[-1], int):
        assert got.max() + 1 == len(visual) + int(delta)
