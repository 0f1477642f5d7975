"""README's and docs' tables are those of the committed results; what a peer's folder is made of.

M inner width, N outputs, R rows.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from benchmarks import figures
from benchmarks.peers import ortgenai, table
from benchmarks.peers.__main__ import ready
from benchmarks.peers.process import PEER_PACKAGES, Pythons
from benchmarks.peers.runtimes import RUNTIMES
from benchmarks.peers.systems import MADE, QUESTIONS, SYSTEMS


def test_the_page_is_that_of_the_results() -> None:
    shown = [table.result(machine, f"peers-{shape}") for machine in table.machines() for shape in table.SHAPES]
    assert any(shown), "no results of benchmarks.peers are committed"
    assert table.PAGE.read_text("utf-8") == table.page(), "run: python -m benchmarks.peers.table"


def test_readme_shows_them() -> None:
    readme = (table.ROOT / "README.md").read_text("utf-8")
    assert table.BEGIN in readme
    assert readme == table.readme_with(table.block()), "run: python -m benchmarks.peers.table"


@pytest.mark.parametrize(
    ("cpu", "flags", "folder"),
    [
        ("AMD EPYC", ["avx512_bf16"], "amd-epyc"),
        ("Intel(R) Xeon(R) Processor", ["avx512_bf16", "amx_bf16"], "intel-xeon-amx"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", ["avx2"], "intel-core-i7-8650u"),
    ],
)
def test_a_machines_results_are_a_folder(
    cpu: str, flags: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the cache's figures alone is no part of the page; one of whole questions alone is."""
    for module in (figures, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    told = {"model name": cpu, "flags": " ".join(["fpu", *flags])}
    monkeypatch.setattr(figures, "told", told.get)
    figures.keep("cache", {"cpu": cpu})
    assert table.machines() == []
    path = figures.keep("questions", {"conditions": {"cpu": figures.cpu(), "instructions": figures.instructions()}})
    assert path == tmp_path / folder / "questions.json"
    assert table.machines() == [folder]
    assert sorted(file.name for file in path.parent.iterdir()) == ["cache.json", "questions.json"]


def test_every_system_can_be_made_and_opened() -> None:
    for system in (*SYSTEMS.values(), *QUESTIONS):
        assert system.made in MADE
        assert system.runtime in RUNTIMES
    assert set(table.README_ROWS) <= set(SYSTEMS)


def test_a_peer_without_its_python_is_skipped_with_the_option_to_give(tmp_path: Path) -> None:
    chosen, skipped = ready("onnxruntime genai", Pythons(), tmp_path, "qwen2_5_vl")
    assert not chosen
    assert set(skipped.values()) == {"no --ort-genai-python was given"}
    assert len(skipped) == 2


def test_versions_are_those_of_the_python_that_was_given() -> None:
    have = {d.metadata["Name"] for d in metadata.distributions()}
    wanted = {name: metadata.version(name) for name in PEER_PACKAGES["peers"] if name in have}
    assert Pythons(peers=Path(sys.executable)).versions() == wanted
    document = {"conditions": dict.fromkeys(("cpu", "threads", "cores", "note", "date_utc", "python"), "")}
    document["conditions"] |= {"rounds": 1, "asks_a_round": 1, "onnxruntime": "1", "torch": "2", "transformers": "3"}
    assert table.conditions_of(document).endswith("onnxruntime 1, torch 2, transformers 3.")
    document["conditions"]["peers"] = {"onnxruntime-genai": "4"}
    assert table.conditions_of(document).endswith("transformers 3, onnxruntime-genai 4.")
    document["conditions"]["peers"] = {"openvino": "5", "openvino-genai": "6"}
    document["conditions"] |= {"runtime": {"onnxruntime": "7", "openvino": "8"}, "commit": "abc+"}
    told = table.conditions_of(document)
    assert "; commit abc+; Python " in told
    assert told.endswith(
        "onnxruntime 7, torch 2, transformers 3, openvino 8 (saccade's), 5 (peers'), openvino-genai 6."
    )


def test_seconds_of_a_build_alone_are_called_so() -> None:
    """Older results left out an export that was there; of a peer, or of both commands, nothing is said."""
    name, peer = "saccade cpu fp32", "openvino genai f32"
    told = [
        table.made_of({"name": n, "made_in_s": s}) for n, s in ((name, [9]), (name, [9, 2]), (peer, [9]), (name, None))
    ]
    assert told == ["9, build alone", "11", "9", ""]


def test_the_commit_is_told_and_a_tree_that_differs_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"rev-parse": "abc", "status": ""}
    monkeypatch.setattr(figures, "git", lambda verb, *_: said[verb])
    assert figures.commit() == "abc"
    said["status"] = " M engines/model.py"
    assert figures.commit() == "abc+"
    said["rev-parse"] = ""
    assert figures.commit() == ""


def test_genai_is_told_of_the_tower_and_the_checkpoints_images(tmp_path: Path) -> None:
    tokens = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9}
    vision = {"spatial_merge_size": 2, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision, **tokens}))
    images = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "rescale_factor": 0.5}
    images |= {"image_mean": [1, 2, 3], "image_std": [4, 5, 6], "size": {"shortest_edge": 10, "longest_edge": 90}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    written = {"model": {"type": "qwen2_5_vl", "decoder": {"session_options": {"log_id": "x"}}}, "search": {"top_k": 1}}
    found = ortgenai.settings(tmp_path, written)
    assert found["search"] == {"top_k": 1}
    assert found["model"].items() >= {"type": "qwen2_5_vl", **tokens}.items()
    assert found["model"]["vision"]["filename"] == "vision/model.onnx"
    assert found["model"]["embedding"]["session_options"] == {"log_id": "x"}
    steps = [step["operation"] for step in ortgenai.preparation(tmp_path)["processor"]["transforms"]]
    attrs = {step["type"]: step["attrs"] for step in steps}
    assert attrs["Resize"].items() >= {"min_pixels": 10, "max_pixels": 90, "merge_size": 2}.items()
    assert attrs["Normalize"].items() >= {"mean": [1, 2, 3], "std": [4, 5, 6]}.items()


def test_four_bits_are_those_of_rounded_blocks(tmp_path: Path) -> None:
    """Against rounding in numpy: per 128 of M, the value farthest from 0 becomes -8; activations are int8."""
    import onnx
    import onnxruntime as ort

    weight_MN = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)
    given_RM = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])
        for name, width in (("x", 256), ("y", 16))
    )
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(weight_MN, "w")])
    path = tmp_path / "model.onnx"
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.save(model, path)
    ortgenai.quantise(path, ("MatMul",))
    (found_RN,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": given_RM})
    blocks = weight_MN.reshape(2, 128, 16)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], axis=1) / -8
    rounded_MN = (np.clip(np.rint(blocks / scale), -8, 7) * scale).reshape(256, 16)
    np.testing.assert_allclose(found_RN, given_RM @ rounded_MN, atol=0.6)
    assert np.abs(found_RN - given_RM @ weight_MN).max() > 5 * np.abs(found_RN - given_RM @ rounded_MN).max()
