"""Estimated memory: the parts against formulas written here, and what is said when memory is short."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx.parser
import pytest

from engines.bundles import footprint as footprint_module
from engines.bundles.bundle import open_bundle
from engines.bundles.footprint import free_bytes, live_bytes, refuse_what_cannot_fit
from engines.bundles.manifest import EngineEntry, manifest_of
from engines.sessions.host_memory import free_memory
from engines.trt.bounds import Bounds, profiles_of
from graphs.errors import OperationFailed
from graphs.rules.rule import Export, Stage, export_from_folder
from tests.conftest import Outcome

# y is a graph's output and w a weight with its transpose: neither is counted.
CHAIN = """<ir_version: 11, opset_import: ["" : 23]>
chain (float[1,S,8] x) => (float[1,S,16] y) <float[16,8] w = {%s}> {
  a = Relu (x)
  b = Neg (a)
  c = Add (a, b)
  wt = Transpose <perm: ints = [1, 0]> (w)
  d = MatMul (c, wt)
  e = Cast <to: int = 7> (d)
  f = Cast <to: int = 1> (e)
  y = Neg (f)
}"""
ATTENTION = """<ir_version: 11, opset_import: ["" : 23]>
attend (float[1,S,8] q, float[1,S,4] k, float[1,S,4] v, float[1,1,P_0,4] pk, float[1,1,P_0,4] pv)
  => (float[1,S,8] y, float[1,1,T,4] ok, float[1,1,T,4] ov) {
  q2 = Neg (q)
  y, ok, ov = Attention <is_causal: int = 1, q_num_heads: int = 2, kv_num_heads: int = 1> (q2, k, v, , pk, pv)
}"""


def stage(text: str) -> Stage:
    return Stage("decoder", onnx.parser.parse_model(text), None, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("rows", [10, 2])  # of two, the weight's transpose would be the most
def test_what_lives_at_once(rows: int, width: int) -> None:
    model = stage(CHAIN % ", ".join(["0.5"] * 128))
    at_add = 3 * rows * 8 * width  # a, b and c
    at_cast = rows * 16 * (width + 8)  # d and its integers
    assert live_bytes(model, {"S": rows, "T": rows}, width) == max(at_add, at_cast)


def test_an_attention_takes_its_map() -> None:
    rows, keys = 6, 20
    sizes = {"S": rows, "T": keys, "P": keys - rows}
    assert live_bytes(stage(ATTENTION), sizes, 4) == 4 * (rows * 8 + 2 * rows * keys)


def test_an_attention_with_its_heads_apart_and_no_past_takes_the_map_of_its_own_keys() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
    look (float[1,3,S,8] q, float[1,3,V,8] k) => (float[1,3,S,8] y) {
      y = Attention (q, k, k)
    }"""
    assert live_bytes(stage(text), {"S": 6, "V": 5, "T": 20}, 2) == 3 * 6 * 5 * 2


@pytest.mark.parametrize(("guides", "at_once"), [(10, 10), (64, 64), (200, 64)])
def test_received_attention_takes_the_map_of_the_guide_rows_that_are_walked_at_once(guides: int, at_once: int) -> None:
    text = """<ir_version: 11, opset_import: ["" : 23, "saccade" : 1]>
    receive (float[1,3,S,8] q, float[1,3,T,8] k, int32[G] guide) => (float[1,T] y) {
      y = saccade.AttentionReceived (q, k, guide)
    }"""
    sizes = {"S": 300, "T": 320, "G": guides}
    assert live_bytes(stage(text), sizes, 2) == 3 * at_once * 320 * 4


@pytest.mark.parametrize(
    ("dimension", "wanted"),
    [
        ("S", 6),
        ("S_1", 6),
        ("P_0 + S", 20),
        ("4*V", 24),
        ("S - 1", 5),
        ("T - P_0", 6),
        ("T - 2*S", 8),
        ("-1*S + T", 14),
        ("2*N + 3", 7),
        ("(S//2)", 6),
        ("unheard", 20),
    ],
)
def test_a_dimension_at_its_bound(dimension: str, wanted: int) -> None:
    sizes = {"S": 6, "P": 14, "T": 20, "V": 6, "N": 2}
    assert footprint_module._size(dimension, sizes) == wanted


def test_the_parts_of_a_bundle(pair: Path) -> None:
    for member in manifest_of(pair).members.values():
        entry = member.targets["cpu"]
        found = entry.footprint
        rows = Bounds().fitted(open_bundle(pair).members["small"].spec, None).max_length
        assert found.rows == rows == 64, "the model has no more positions"
        layers, heads, width = 2, 1, 4
        assert found.cache_bytes == 2 * (2 * layers * heads * width * rows * 4)
        assert found.weight_bytes == int(footprint_module.ON_A_CPU["float32"] * entry.weight_bytes)
        assert set(found.activation_bytes) == {"vision", "embed", "decoder"}
        assert found.activation_bytes["decoder"] >= 2 * 64 * 64 * 4, "at least one attention's map"
        assert found.total == found.weight_bytes + found.cache_bytes + sum(found.activation_bytes.values())


def test_openvino_holds_the_caches_of_fp16_in_fp32(exports: dict[str, Path]) -> None:
    export = export_from_folder(exports["small"])

    def of(target: str, dtype: str) -> int:
        return footprint_module.footprint_of(export, target, dtype, 1000, {}).cache_bytes

    wide = of("openvino", "float32")
    assert (of("openvino", "float16"), of("openvino", "bfloat16"), of("cpu", "float16")) == (wide, wide // 2, wide // 2)


def test_openvino_makes_fp16_weights_wide_and_packs_them(exports: dict[str, Path]) -> None:
    export = export_from_folder(exports["small"])
    held = {
        target: footprint_module.footprint_of(export, target, "float16", 1000, {}).weight_bytes
        for target in ("cpu", "openvino", "cuda")
    }
    assert held == {"cpu": 2200, "openvino": 4000, "cuda": 1000}


def engines_of(export: Export, bounds: Bounds) -> dict[str, EngineEntry]:
    """What a manifest tells of engines of these bounds."""
    return {
        name: EngineEntry(
            file=f"{name}.engine",
            target="rtx",
            tensorrt="1.7",
            sms=(89,),
            precision="float16",
            profiles=profiles_of(name, export.spec, bounds),
            served={},
            bytes=100 + i,
            weight_bytes=7,
        )
        for i, name in enumerate(("vision", "embed", "decoder"))
    }


@pytest.mark.parametrize("in_place", [False, True])
def test_the_bounds_of_engines_are_read_back_from_their_profiles(exports: dict[str, Path], in_place: bool) -> None:
    export = export_from_folder(exports["small"])
    bounds = Bounds(max_prompt=40, max_length=60, max_guide=20, max_tail=10, max_images=3)
    engines = engines_of(export, bounds)
    if in_place:  # a buffer of all rows, in every profile, and how many of them are filled
        for profile in engines["decoder"].profiles.values():
            for name, shapes in profile.items():
                if name.startswith("past_"):
                    profile[name] = ((*shapes[0][:2], 60, shapes[0][3]),) * 3
            profile["length_0"] = ((1,), (1,), (1,))
    assert footprint_module._bounds_of(engines) == bounds
    found = footprint_module.footprint_of(export, "rtx", "float16", 1000, engines)
    assert (found.rows, found.images, found.weight_bytes) == (60, 3, 100 + 101 + 102)


def test_a_cpu_computes_fp16_in_fp32(exports: dict[str, Path]) -> None:
    export = export_from_folder(exports["small"])
    half, full = (
        footprint_module.footprint_of(export, "cpu", dtype, 1000, {}).activation_bytes
        for dtype in ("float16", "float32")
    )
    assert half == full


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


ALL = 8000 * 1024
V2, V1 = "0::/pod/mine\n", "3:cpu:/elsewhere\n4:hugetlb,memory:/docker/1\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "limits", "wanted"),
    [
        (V2, {}, ALL),
        (V2, {"pod/mine/memory.max": "max", "pod/mine/memory.current": "5"}, ALL),
        (V2, {"pod/mine/memory.max": "5000", "pod/mine/memory.current": "3000"}, 2000),
        (V2, {"pod/memory.max": "5000", "pod/memory.current": "3000"}, 2000),
        (V2, {"memory.max": "5000", "memory.current": "7000"}, 0),
        (V2, {"memory.max": "90000000000", "memory.current": "7"}, ALL),
        (
            V2,
            {"memory.max": "50", "memory.current": "45", "memory.stat": "anon 5\nactive_file 10\ninactive_file 7\n"},
            22,
        ),
        (V1, {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "4000"}, 1000),
        (
            V1,
            {
                "memory/docker/1/memory.limit_in_bytes": "5000",
                "memory/docker/1/memory.usage_in_bytes": "4900",
                "memory/docker/1/memory.stat": "inactive_file 1\ntotal_inactive_file 70\n",
            },
            170,
        ),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "4000"}, ALL),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, cgroup: str, limits: dict[str, str], wanted: int
) -> None:
    files = {f"sys/fs/cgroup/{name}": f"{text.strip()}\n" for name, text in limits.items()}
    assert free_memory(system(tmp_path, {"proc/self/cgroup": cgroup, **files})) == wanted


def test_a_system_that_does_not_say_what_is_free(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert free_memory(system(tmp_path, {})) == ALL
    assert free_memory(system(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\n"})) is None


def test_show_calls_it_an_estimate(pair: Path, saccade_cli: Callable[..., Outcome]) -> None:
    told = saccade_cli("show", pair)
    [line] = [line for line in told.stdout.splitlines() if "memory, estimated" in line][:1]
    assert all(part in line for part in ("on cpu", "weights", "caches of 64 rows", "activations of vision"))


def test_memory_that_is_short(pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = open_bundle(pair)
    entries = [m.targets["cpu"] for m in bundle.manifest.members.values()]
    weights, whole = sum(e.weight_bytes for e in entries), sum(e.footprint.total for e in entries)

    def with_free(free: int | None) -> str:
        monkeypatch.setattr(footprint_module, "free_bytes", lambda target: free)
        refuse_what_cannot_fit(bundle)
        return capsys.readouterr().err

    with pytest.raises(OperationFailed, match=r"its weights alone take .* of host memory, and .* are free"):
        with_free(weights - 1)
    assert "warning: " in with_free(weights)
    assert "caches of 64 rows" in with_free(whole - 1)
    assert with_free(whole) == ""
    assert "host memory is free cannot be determined" in with_free(None)


def test_a_bundle_that_cannot_fit_ends_a_run(
    pair: Path, monkeypatch: pytest.MonkeyPatch, saccade_cli: Callable[..., Outcome]
) -> None:
    monkeypatch.setattr(footprint_module, "free_bytes", lambda target: 10)
    told = saccade_cli("run", pair, "what ?")
    assert (told.code, "cannot be opened on target cpu" in told.stderr) == (1, True)


def test_free_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's answer, or None where it has none; the stand-in is cuda-python's cudaMemGetInfo."""

    def no_driver() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    attribute = SimpleNamespace(cudaDevAttrIntegrated="integrated")
    for answer, integrated, wanted in (
        (lambda: (0, 5, 9), 0, 5),
        (lambda: (0, 5, 9), 1, 7_000),
        (lambda: (35, None, None), None, None),
        (lambda: (35, None, None), 1, None),
        (no_driver, None, None),
    ):
        runtime = SimpleNamespace(
            cudaMemGetInfo=answer,
            cudaDeviceAttr=attribute,
            cudaDeviceGetAttribute=lambda which, device, found=integrated: (0, found),
        )
        monkeypatch.setattr(footprint_module, "free_memory", lambda: 7_000)
        monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
        assert free_bytes("rtx") == wanted
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert free_bytes("rtx") is None
    assert (free_bytes("cpu") or 0) > 0
