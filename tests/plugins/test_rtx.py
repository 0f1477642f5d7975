"""TensorRT-RTX, without a GPU: the kernels serve the nodes that ask for them, the bodies all others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from plugins import registry
from plugins.cubins import SMS
from plugins.table import KERNELS
from plugins.trt import process_environment

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="tensorrt-rtx is not installed")


def built(served_by: str, folder: Path) -> dict[str, Any]:
    environment = process_environment(folder, os.environ | {"TRITON_CACHE_DIR": str(folder / "triton")})
    command = [sys.executable, "-W", "ignore", "-m", "tests.plugins.rtx_build", served_by]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_node_with_the_attributes_is_served_by_its_kernel(tmp_path):
    got = built("plugin", tmp_path)
    assert tuple(got["registered"]) == registry.ops_with_kernels()
    assert set(got["layers"].values()) == {"PLUGIN_V3"}
    assert got["plugins"] == 7
    assert got["engine_bytes"] > 0
    assert {tuple(found) for found in got["cubins"]} == {(kernel, sm) for kernel in KERNELS for sm in (89, 120)}


def test_a_node_without_them_is_served_by_its_body(tmp_path):
    got = built("body", tmp_path)
    assert "PLUGIN_V3" not in got["layers"].values()
    assert all(got["layers"][output] for output in ("kept", "compact", "flags"))
    assert got["plugins"] == 0
    assert got["engine_bytes"] > 0
    assert got["cubins"] == []


def test_the_service_is_told_per_op_and_builder():
    assert registry.service("KeepTopK", "tensorrt_rtx") == ("kernel", "")
    assert registry.service("MergePairs", "tensorrt_rtx") == ("body", "no kernel is written for it")
    for op in registry.ops_with_kernels():
        assert registry.service(op, None) == ("body", "it runs the graphs, which take no plugins")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda module: None if module in {"triton", "cuda"} else module)
    assert registry.service("KeepTopK", "tensorrt_rtx") == ("body", "triton and cuda-python not installed here")


def test_a_tensorrt_too_old_for_plugins_is_told(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda module: module)
    monkeypatch.setattr(registry, "installed_version", lambda name: "10.3.0")
    why = "tensorrt 10.3.0 takes no plugins of ours, 10.16 and newer do"
    assert registry.service("KeepTopK", "tensorrt") == ("body", why)
    assert registry.service("KeepTopK", "tensorrt_rtx") == ("kernel", "")


def test_the_link_is_made_where_it_is_asked_for(tmp_path):
    path = process_environment(tmp_path, {"LD_LIBRARY_PATH": "elsewhere", "A": "b"})
    assert path == {"LD_LIBRARY_PATH": f"{tmp_path}{os.pathsep}elsewhere", "A": "b"}
    assert (tmp_path / "libtensorrt_rtx.so").resolve().is_file()
    assert process_environment(tmp_path, {}) == {"LD_LIBRARY_PATH": str(tmp_path)}


def test_the_sms_of_the_targets_are_among_those_compiled_for():
    assert {80, 86, 89, 120} <= set(SMS)
