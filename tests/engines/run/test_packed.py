"""Bundles packed for the CPU: files of their own, what quantising costs, and what of it is held at verify."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines import notes
from engines.bundles.build import build_bundle
from engines.bundles.bundle import open_bundle
from engines.bundles.jobs import split_precision
from engines.bundles.manifest import manifest_of
from engines.cascade import Cascade
from engines.evaluation.flops import costs_of
from engines.sampling import Options
from graphs import files
from graphs.errors import BadArtefact, UsageError
from graphs.spec import STAGES
from tests.conftest import Outcome
from tests.engines.bundle.conftest import edit_manifest
from tests.engines.bundle.test_open_bundle import flip
from tests.engines.run.conftest import TinyPair, question_of
from tests.hand_made import WEIGHTS

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def packed(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pair in every precision; not to be written to."""
    home = tmp_path_factory.mktemp("packed")
    for precision in ("fp32", "int8", "int4"):
        folders = [tiny_pair.exports[role] for role in ("small", "large")]
        build_bundle(folders, home / precision, precision=precision)
    return {path.name: path for path in home.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_packed_bundle_is_verified_and_opened(packed: dict[str, Path], precision: str, saccade_cli: Cli) -> None:
    manifest = manifest_of(packed[precision])
    names = {file.path for file in manifest.files}
    for member in ("small", "large"):
        assert {f"{member}/cpu/{stage}.onnx" for stage in STAGES} | {f"{member}/cpu/weights.safetensors"} <= names
        assert f"{member}/{WEIGHTS}" not in names, "no second copy where only the CPU is asked for"
        entry = manifest.members[member].targets["cpu"]  # type: ignore[index]
        assert (entry.precision, bool(entry.losses)) == (precision, precision != "fp32")
    told = saccade_cli("verify", packed[precision])
    assert told.code == 0, told.stderr
    assert told.stdout.count("agrees") == 12
    opened = Cascade.open(packed[precision], preload=True)
    assert opened.small is not None
    assert opened.small.opened == set(STAGES)


def test_what_is_measured_is_told_in_the_packed_precision(
    packed: dict[str, Path], tmp_path: Path, saccade_cli: Cli
) -> None:
    """A threshold of int8 scores is one of int8, and so is an evaluation."""
    bundle = shutil.copytree(packed["int8"], tmp_path / "pair.bundle")
    few = ("--questions", 8, "--max-new-tokens", 2, "--threads", 1)
    told = saccade_cli("calibrate", bundle, "glyphs", *few, "--max-loss", 0.4, "--confidence", 0.8)
    assert told.code == 0, told.stderr
    [found] = manifest_of(bundle).calibrations
    assert found.precision == {"small": "int8", "large": "int8"}
    promises = Cascade.open(bundle, threads=1).promises
    assert promises
    assert promises.that_holds(None, Options(2)) == found
    promises.precision = {"small": "int8", "large": "int4"}
    assert promises.that_holds(None, Options(2)) is None
    shown = saccade_cli("show", bundle).stdout
    assert "  on cpu: int8 weights, float32, " in shown
    told = saccade_cli("eval", bundle, "glyphs", *few, "-o", tmp_path / "out", "--json")
    assert json.loads(told.stdout)["bundles"][0]["precision"] == "int8"


def test_the_error_is_told_and_written(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli) -> None:
    told = saccade_cli("build", tiny_pair.exports["alone"], "-o", tmp_path / "b", "--precision", "int4", "--json")
    assert told.code == 0, told.stderr
    assert "alone in int4 on cpu, golden tensors: decoder: error at most" in told.stderr
    losses = json.loads(told.stdout)["members"]["alone"]["targets"]["cpu"]["losses"]
    worst = max(loss["max_error"] for loss in losses)
    assert 1e-4 < worst < 2
    assert {loss["stage"] for loss in losses} == set(STAGES)
    assert all(0 <= loss["top1"] <= 1 for loss in losses if loss["tensor"] == "logits")


def test_packed_fp32_answers_as_the_canonical_graphs(
    packed: dict[str, Path], tiny_bundle: Path, image_file: Path
) -> None:
    packed_one, mapped = (Cascade.open(path, threads=1) for path in (packed["fp32"], tiny_bundle))
    for seed in range(3):
        answers = [c.ask(image_file, question_of(seed), max_new_tokens=4, threshold=1) for c in (packed_one, mapped)]
        assert answers[0].tokens == answers[1].tokens
        assert all(map(np.array_equal, answers[0].kept, answers[1].kept))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_flops_are_those_of_the_canonical_graphs(packed: dict[str, Path], tiny_bundle: Path, precision: str) -> None:
    sizes = {"N": 2, "S": 80, "S_1": 30, "P_0": 7, "P_1": 5, "G": 9, "R": 3, "V": 64}
    for member in ("small", "large"):
        found, wanted = (costs_of(path, manifest_of(path), member) for path in (packed[precision], tiny_bundle))
        assert found
        assert wanted
        assert all(cost.uncounted == () for cost in found.values())
        counted = [{stage: cost.flops(sizes) for stage, cost in costs.items()} for costs in (found, wanted)]
        assert counted[0] == counted[1]


OPENED = """
import sys
sys.modules["torch"] = None
import saccade
saccade.Cascade.open(sys.argv[1], target="cpu", preload=True)
unused = {"onnx", "onnx_ir", "onnxscript", "sympy", "scipy", "openvino", "rich", "exporter", "glyphs", "plugins"}
print(*sorted(unused & set(sys.modules)))
"""


def test_opening_a_known_packed_bundle_parses_no_graph(
    packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(notes, "SETTLED", 0.0)
    open_bundle(packed["fp32"], target="cpu", check="used")
    command = [sys.executable, "-c", OPENED, str(packed["fp32"])]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert told.stdout.split() == []


def test_eight_bits_cost_less_than_four(packed: dict[str, Path]) -> None:
    def mean(precision: str) -> float:
        entry = manifest_of(packed[precision]).members["small"].targets["cpu"]
        found = [loss.mean_error for loss in entry.losses if loss.stage == "decoder"]
        return sum(found) / len(found)

    assert mean("int8") < mean("int4") / 3


def test_more_error_than_at_the_build_disagrees(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli) -> None:
    build_bundle([tiny_pair.exports["alone"]], tmp_path / "b", precision="int4")

    def forget(document: dict) -> None:
        for loss in document["members"]["alone"]["targets"]["cpu"]["losses"]:
            loss["max_error"] = 0.0

    edit_manifest(tmp_path / "b", forget)
    told = saccade_cli("verify", tmp_path / "b")
    assert told.code == 1
    assert "is above 0.01" in told.stderr


def test_a_packed_weight_is_hashed_before_it_is_used(tiny_pair: TinyPair, tmp_path: Path) -> None:
    build_bundle([tiny_pair.exports["alone"]], tmp_path / "b", precision="fp32")
    flip(tmp_path / "b" / "alone" / "cpu" / "weights.safetensors")
    with pytest.raises(BadArtefact, match=r"cpu/weights\.safetensors was changed"):
        open_bundle(tmp_path / "b", check="used")


def test_other_targets_keep_the_canonical_graphs(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Only where a second target asks for them do the weights lie there twice."""
    build_bundle([tiny_pair.exports["alone"]], tmp_path / "b", target=("cpu", "cuda"), precision="int8")
    manifest = manifest_of(tmp_path / "b")
    assert f"alone/{WEIGHTS}" in {file.path for file in manifest.files}
    targets = manifest.members["alone"].targets
    assert (targets["cuda"].spec, targets["cuda"].precision) == ("spec.json", "")
    assert targets["cpu"].spec == "cpu/spec.json"


@pytest.mark.parametrize(
    ("targets", "precision", "said"),
    [("cpu", "fp16", "choose one of cpu: fp32, int8, int4"), ("cuda", "int8", "a precision has no effect")],
)
def test_a_precision_that_cannot_be_had(
    tiny_pair: TinyPair, tmp_path: Path, targets: str, precision: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build_bundle([tiny_pair.exports["alone"]], tmp_path / "b", target=targets, precision=precision)


def test_whose_precision_it_is() -> None:
    assert split_precision(["cpu"], "int4") == ("int4", None)
    assert split_precision(["rtx"], "fp16") == (None, "fp16")
    assert split_precision(["cpu", "rtx"], "fp16") == (None, "fp16")
    assert split_precision(["cpu", "rtx"], "fp32") == ("fp32", "fp32")
    assert split_precision(["cpu", "cuda"], None) == (None, None)
    assert split_precision(["cpu", "rtx"], "int8") == ("int8", "int8")
    assert split_precision(["openvino", "tensorrt"], "int4") == ("int4", "int4")
    assert split_precision(["cuda", "rtx"], "int4") == (None, "int4")


def test_pieces_have_digests_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    data = bytes(range(200)) * 5 + b"rest"
    (tmp_path / "f").write_bytes(data)
    whole, pieces = files.digests_of(tmp_path / "f")
    assert whole == hashlib.sha256(data).hexdigest()
    assert pieces == tuple(files.sha256_of_piece(tmp_path / "f", i) for i in range(2))
    assert pieces == tuple(hashlib.sha256(part).hexdigest() for part in (data[:1000], b"rest"))
    (tmp_path / "g").write_bytes(data[:1000])
    assert files.digests_of(tmp_path / "g")[1] == ()


def test_a_piece_that_was_changed_is_noticed(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", 4096)
    build_bundle([tiny_pair.exports["alone"]], tmp_path / "b", precision="int4")
    weights = next(f for f in manifest_of(tmp_path / "b").files if f.path.endswith("cpu/weights.safetensors"))
    assert len(weights.pieces) == -(-weights.bytes // 4096)
    open_bundle(tmp_path / "b", check="used")
    flip(tmp_path / "b" / "alone" / "cpu" / "weights.safetensors")
    with pytest.raises(BadArtefact, match=r"weights\.safetensors was changed"):
        open_bundle(tmp_path / "b", check="used")
