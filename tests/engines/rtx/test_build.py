"""rtx bundles of the pair, built without a GPU; what the manifest says was read back from the parsed networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from engines.bundles.build import build_bundle
from engines.bundles.bundle import checked_manifest, open_bundle
from engines.bundles.manifest import EngineFile, Manifest, manifest_of
from engines.cascade import Cascade
from engines.trt import engine as builder
from engines.trt.bounds import BODY_ROWS, Bounds, Room, profiles_of
from engines.trt.engine import engine_from_onnx
from engines.trt.member import _most_rows, build_member
from engines.trt.options import EngineOptions
from engines.trt.reading import reading_from
from graphs.errors import BackendMissing, BadArtefact, OperationFailed, UsageError
from graphs.files import sha256_of
from graphs.ops import DOMAIN, OPS
from graphs.spec import ExportSpec, spec_from_folder
from tests.conftest import Outcome
from tests.engines.rtx import stand_in
from tests.engines.rtx.conftest import Exports, Lower

pytest.importorskip("tensorrt_rtx")
TARGETS = {"plugin": ("rtx",), "body": ("rtx", "cpu")}
BOUNDS = Bounds(max_prompt=128, max_length=192, max_tail=8, max_images=2)


@pytest.fixture(scope="session")
def bundles(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp16 with plugins, for rtx alone; fp32 with bodies, for cpu too."""
    home = tmp_path_factory.mktemp("rtx-bundles")
    for ops, precision in (("plugin", "fp16"), ("body", "fp32")):
        options = EngineOptions((89,), precision, ops, BOUNDS)
        build_bundle([exports["small"], exports["large"]], home / ops, target=TARGETS[ops], engines=options)
    return {ops: home / ops for ops in ("plugin", "body")}


@pytest.mark.parametrize(("ops", "by", "dtype"), [("plugin", "kernel", "float16"), ("body", "body", "float32")])
def test_the_manifest_says_what_serves_and_for_what(bundles: dict[str, Path], ops: str, by: str, dtype: str) -> None:
    manifest = manifest_of(bundles[ops])
    assert manifest.targets == TARGETS[ops]
    assert manifest.tools["tensorrt-rtx"] == "1.7.1.116"
    small, large = (manifest.members[role].targets["rtx"] for role in ("small", "large"))
    assert small.ops == {"ReceivedInCache": by}
    assert large.ops == {"CompactRows": by, "KeepTopK": by}
    for role, member in (("small", small), ("large", large)):
        assert set(member.engines) == {"vision", "embed", "decoder"}
        for stage, entry in member.engines.items():
            assert (entry.tensorrt, entry.sms, entry.precision) == ("1.7.1.116", (89,), dtype)
            assert list(entry.profiles) == (["prefill", "decode"] if stage == "decoder" else ["any"])
            file = bundles[ops] / role / entry.file
            assert file.stat().st_size == entry.bytes > entry.weight_bytes
        assert set(member.engines["decoder"].served.values()) == {by}
        shapes = {t.name: t.shape for t in member.stages["decoder"].inputs}
        assert shapes["past_k_0"][2] == BOUNDS.max_length
        assert shapes["length_0"] == (1,)
        types = {t.name: t.dtype for t in member.stages["decoder"].inputs}
        assert types["past_k_0"] == types["inputs_embeds"] == dtype
    assert len(small.engines["decoder"].served) == manifest.members["small"].language.layers


def test_nothing_but_engines_and_what_the_host_needs_is_in_the_bundle(bundles: dict[str, Path]) -> None:
    manifest = checked_manifest(bundles["plugin"])
    names = {entry.path for entry in manifest.files if "/processor/" not in entry.path}
    per_member = {"golden.safetensors", "rtx/spec.json", *(f"rtx/{s}.engine" for s in ("decoder", "embed", "vision"))}
    assert names == {f"{role}/{name}" for role in ("small", "large") for name in per_member}


def test_it_is_refused_before_anything_is_deserialised(
    bundles: dict[str, Path], saccade_cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    alone, beside_cpu = bundles["plugin"], (bundles["body"], "--target", "rtx")
    question = ("what ?", "--image", image)
    for arguments in (("verify", alone), ("run", alone, *question), ("run", *beside_cpu, *question)):
        outcome = saccade_cli(*arguments)
        assert outcome.code == 4
        assert "target rtx cannot be run here" in outcome.stderr
        assert "GPUs of SM 8.9" in outcome.stderr
    assert saccade_cli("show", alone).code == 0


def test_beside_rtx_the_cpu_is_chosen_here_and_named(
    exports: Exports, bundles: dict[str, Path], saccade_cli: Callable[..., Outcome]
) -> None:
    if open_bundle(bundles["body"]).target == "rtx":
        pytest.skip("this machine runs rtx")
    outcome = saccade_cli("verify", bundles["body"])
    assert outcome.code == 0
    assert "runs on target cpu (not rtx: " in outcome.stderr
    assert "large decoder/prefill" in outcome.stdout
    manifest = manifest_of(bundles["body"])
    for role, member in manifest.members.items():
        rtx, cpu = member.targets["rtx"], member.targets["cpu"]
        assert (rtx.spec, cpu.spec) == ("rtx/spec.json", "spec.json")
        assert cpu.stages == spec_from_folder(exports[role]).stages
        assert rtx.footprint.rows == BOUNDS.max_length
        assert rtx.footprint.weight_bytes == sum(engine.bytes for engine in rtx.engines.values())
    shown = saccade_cli("show", bundles["body"]).stdout
    assert "on rtx: memory, estimated" in shown
    assert "SM 8.9" in shown


def test_every_session_of_a_bundle_knows_its_engines_digest(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.trt.running.reasons", lambda engines=(): [])
    monkeypatch.setattr("engines.bundles.footprint.free_bytes", lambda target: None)
    shutil.copytree(bundles["plugin"], tmp_path / "b")
    cascade = Cascade.open(tmp_path / "b", target="rtx")
    for name, model in (("small", cascade.small), ("large", cascade.large)):
        assert model
        plugins = {"vision": "none", "embed": "none", "decoder": "python"}
        files = {stage: tmp_path / "b" / name / "rtx" / f"{stage}.engine" for stage in plugins}
        assert model._engines == {f: EngineFile(sha256_of(f), plugins[s], False) for s, f in files.items()}  # type: ignore[arg-type]
        (files["decoder"]).write_bytes(b"another engine")
        monkeypatch.setattr("plugins.trt.load", lambda module: stand_in)
        monkeypatch.setattr("plugins.registry.register", lambda trt, sms=(): ())
        monkeypatch.setattr("engines.trt.device.cuda_runtime", stand_in.Cuda)
        with pytest.raises(BadArtefact, match="changed after the bundle was opened"):
            model.session("decoder")


@pytest.mark.parametrize("role", ["small", "large"])
def test_what_the_parser_made_is_read_back(lower: Lower, tmp_path: Path, role: str) -> None:
    for precision, plugins in (("bfloat16", False), ("float16", True)):
        capacity = 128 if plugins else None
        lowered = lower(role, precision, plugins, capacity=capacity)
        answer = engine_from_onnx(
            lowered.file("decoder"),
            tmp_path / "none.engine",
            sms=[89],
            profiles={},
            ops=lowered.ops["decoder"],
            plugins="python" if plugins else "none",
            parse_only=True,
        )
        reading = reading_from(answer["reading"])
        assert reading.served == dict.fromkeys(lowered.ops["decoder"], "kernel" if plugins else "body")
        assert reading.unused == ()
        segments = lowered.spec.plan.segments(lowered.spec.language.layers)
        grown = "KV_CACHE_UPDATE" if capacity else "CONCATENATION"
        rest = ("NONE", grown, capacity or -1)
        wanted = [(f"visible_{j}", f"past_k_{i}", *rest) for j, segment in enumerate(segments) for i in segment]
        assert [(a.mask, a.cache, a.causal, a.grown, a.rows) for a in reading.attentions] == wanted
        assert "RECURRENCE" not in reading.layers, "a Loop behind an attention ends the compiler"


@pytest.mark.parametrize("precision", ["FLOAT16", "FLOAT"])
def test_a_tower_as_deep_and_as_long_as_published_ones_builds(tmp_path: Path, precision: str) -> None:
    """Qwen2-VL has 32 blocks; over bounds of more than 256 rows their Loops ended the compiler."""
    kind, nodes = getattr(onnx.TensorProto, precision), []
    for i in range(32):
        q, out = f"x_{i}" if i else "q", "out" if i == 31 else f"x_{i + 1}"
        nodes.append(
            onnx.helper.make_node("BlockAttention", [q, "k", "v", "real"], [out], f"a_{i}", domain=DOMAIN, scale=0.1)
        )
    tensors = [onnx.helper.make_tensor_value_info(n, kind, ["B", 4, "K", 80]) for n in ("q", "k", "v", "out")]
    real = onnx.helper.make_tensor_value_info("real", onnx.TensorProto.BOOL, ["B", "K"])
    graph = onnx.helper.make_graph(nodes, "tower", [*tensors[:3], real], tensors[3:])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    body = [OPS["BlockAttention"].flat_function]
    onnx.save(onnx.helper.make_model(graph, functions=body, opset_imports=opsets, ir_version=11), tmp_path / "t.onnx")
    shapes = {n: tuple((b, 4, k, 80) for b, k in ((1, 4), (1, 5632), (8, 11264))) for n in ("q", "k", "v")}
    answer = engine_from_onnx(
        tmp_path / "t.onnx",
        tmp_path / "t.engine",
        sms=[89],
        profiles={"any": {**shapes, "real": ((1, 4), (1, 5632), (8, 11264))}},
        ops={node.name: "BlockAttention" for node in nodes},
    )
    assert answer["bytes"] > 0


def test_profiles_follow_the_bounds(exports: Exports) -> None:
    spec = spec_from_folder(exports["large"])
    bounds = Bounds().fitted(spec, BODY_ROWS)
    assert (bounds.max_prompt, bounds.max_length) == (256, 256), "the tiny model has no more positions"
    decoder = profiles_of("decoder", spec, bounds)
    assert decoder["prefill"]["inputs_embeds"] == ((1, 2, 64), (1, 128, 64), (1, 256, 64))
    assert decoder["decode"]["inputs_embeds"] == ((1, 1, 64), (1, 1, 64), (1, 2, 64))
    assert decoder["prefill"]["past_k_0"][0][2] == 0
    assert decoder["decode"]["past_v_2"][2][2] == 255
    assert decoder["decode"]["past_k_0"] == ((1, 2, 1, 16), (1, 2, 128, 16), (1, 2, 255, 16))
    assert decoder["prefill"]["keep_0"] == ((1,), (64,), (256,))
    assert decoder["decode"]["keep_0"] == ((1,), (1,), (2,))
    assert decoder["prefill"]["tail"] == ((1,), (1,), (128,))
    assert profiles_of("vision", spec, bounds)["any"]["pixel_values"] == (
        (1, 3, 32, 32),
        (1, 3, 32, 32),
        (8, 3, 32, 32),
    )


def test_a_chunk_unasked_is_no_longer_than_the_cache(exports: Exports) -> None:
    spec = spec_from_folder(exports["large"])
    long = spec.model_copy(update={"language": spec.language.model_copy(update={"max_positions": 9999})})
    for length, prompt in ((1024, 1024), (2500, 2500), (5000, 2816)):
        bounds = Bounds(max_length=length).fitted(long, None, Room(2764, 0))
        assert (bounds.max_prompt, bounds.max_length) == (prompt, length)


def roomy(exports: Exports) -> ExportSpec:
    """Of a model with positions enough for the defaults."""
    spec = spec_from_folder(exports["large"])
    return spec.model_copy(update={"language": spec.language.model_copy(update={"max_positions": 32768})})


def test_defaults_make_room_for_what_is_shown_and_an_answer_behind_it(exports: Exports) -> None:
    spec = roomy(exports)
    assert Bounds().fitted(spec, None) == Bounds(2048, 4096, 512, 128, 8)
    assert Bounds().fitted(spec, None, Room(3300, 13)) == Bounds(3328, 4352, 512, 128, 13)
    assert Bounds().fitted(spec, 1024, Room(3300, 3)) == Bounds(1024, 4352, 512, 128, 8)
    assert Bounds(max_prompt=64).fitted(spec, None) == Bounds(64, 4096, 64, 64, 8)


def test_bounds_may_be_as_large_as_the_model_the_ranking_and_the_chunk(exports: Exports) -> None:
    exact = Bounds(max_prompt=2, max_length=32768, max_guide=2, max_tail=2, max_images=1)
    assert exact.fitted(roomy(exports), BODY_ROWS) == exact
    ranked = Bounds(BODY_ROWS, 32768, BODY_ROWS, BODY_ROWS, 1)
    assert ranked.fitted(roomy(exports), BODY_ROWS) == ranked
    with pytest.raises(UsageError, match="--ops plugin"):
        Bounds(max_prompt=BODY_ROWS + 1).fitted(roomy(exports), BODY_ROWS)
    with pytest.raises(UsageError, match=r"give at most 100$"):
        Bounds(max_prompt=101).fitted(roomy(exports), 100)


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        (Bounds(max_length=1), "is 1, which is too small"),
        (Bounds(max_length=257), "a bound of 257 tokens is beyond the model's 256 positions"),
        (Bounds(max_prompt=16, max_guide=17), "--max-guide is 17, more than the 16 tokens"),
        (Bounds(max_prompt=1), "too small"),
        (Bounds(max_prompt=4000), "chunks of at most 3840"),
        (Bounds(max_prompt=300), "beyond the model's 256 positions"),
        (Bounds(max_prompt=16, max_tail=17), "more than the 16 tokens"),
        (Bounds(max_images=-1), "too small"),
        (Bounds(max_prompt=100, max_length=90), "more than the 90 tokens of a cache"),
    ],
)
def test_a_bound_that_cannot_be_had_is_refused(exports: Exports, bounds: Bounds, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        bounds.fitted(spec_from_folder(exports["large"]), BODY_ROWS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give its compute capability"),
        (["--sm", 75], "not built for SM 75"),
        (["--sm", 89, "--precision", "int3"], "'int3' is not known"),
        (["--sm", 89, "--ops", "both"], "neither plugin nor body"),
    ],
)
def test_a_wrong_option_leaves_nothing(
    exports: Exports, saccade_cli: Callable[..., Outcome], tmp_path: Path, options: list[object], sentence: str
) -> None:
    outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--target", "rtx", *options)
    assert outcome.code == 2
    assert sentence in outcome.stderr
    assert not any(tmp_path.iterdir())


def test_options_of_engines_are_refused_where_they_would_do_nothing(
    exports: Exports, saccade_cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--precision", "fp16")
    assert (outcome.code, "is not one that these targets have" in outcome.stderr) == (2, True)


def test_a_build_that_memory_cannot_hold_is_refused_before_it_starts(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "free_memory", lambda: 300 << 20)
    with pytest.raises(OperationFailed, match=r"takes about 0\.6 GB .* 0\.3 GB are free"):
        build_bundle(list(exports.values()), tmp_path / "b", target="rtx", engines=EngineOptions((89,)))
    assert not any(tmp_path.iterdir())


def test_heads_that_the_compiler_fails_on_are_refused(exports: Exports, tmp_path: Path) -> None:
    spec = spec_from_folder(exports["small"])
    odd = spec.model_copy(update={"language": spec.language.model_copy(update={"head_dim": 12})})
    with pytest.raises(UsageError, match=r"heads are 12 wide, .* only for multiples of 8; build with --precision fp32"):
        build_member("small", exports["small"], odd, tmp_path / "m", EngineOptions((89,), "fp16"))
    assert not any(tmp_path.iterdir())


def test_the_death_of_the_builder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    asked = {"sms": [89], "profiles": {}, "ops": {}}
    with pytest.raises(OperationFailed, match=r"TensorRT-RTX failed .* on broken\.onnx"):
        engine_from_onnx(tmp_path / "broken.onnx", tmp_path / "e", **asked)  # type: ignore[arg-type]
    monkeypatch.setattr(builder, "WORKER", ["-c", "import os; os.abort()"])
    with pytest.raises(OperationFailed, match="was ended by signal 6"):
        engine_from_onnx(tmp_path / "broken.onnx", tmp_path / "e", **asked)  # type: ignore[arg-type]


def test_a_missing_library_is_exit_code_4(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphs.versions.installed_version", lambda name: None)
    with pytest.raises(BackendMissing, match=r"saccade\[rtx\]"):
        engine_from_onnx(tmp_path / "a.onnx", tmp_path / "e", sms=[89], profiles={}, ops={})


def test_a_cpu_bundle_has_no_engines(exports: Exports, tmp_path: Path) -> None:
    manifest: Manifest = build_bundle(list(exports.values()), tmp_path / "b", target="cpu")
    assert [member.targets["cpu"].engines for member in manifest.members.values()] == [{}, {}]


@pytest.mark.parametrize(
    ("decoder", "vision", "most"),
    [([], [], None), ([], ["KeepTopK"], None), ([], ["KeepPerImage"], BODY_ROWS), (["KeepTopK"], [], BODY_ROWS)],
)
def test_what_ranks_in_the_vision_stage_bounds_the_chunk_too(
    decoder: list[str], vision: list[str], most: int | None
) -> None:
    ops = {"decoder": dict(enumerate(decoder)), "vision": dict(enumerate(vision)), "embed": {}}
    assert _most_rows(SimpleNamespace(ops=ops), "body") == most  # type: ignore[arg-type]
