"""The verbs over artefacts: result on stdout, talk on stderr, one JSON document, the exit code."""

import json

import pytest

from engines.targets import TARGETS
from graphs.ops import OPS
from graphs.policies import POLICIES
from graphs.rules import RULES
from graphs.weights import safetensors_file
from tests.engines.bundle.test_open_bundle import flip
from tests.hand_made import WEIGHTS, edit_model


def document(done):
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_check(saccade_cli, exports):
    done = saccade_cli("check", exports["large"])
    assert done.code == 0
    assert f"{len(RULES)} graph rules hold" in done.stdout
    assert "decoder/prefill" in done.stdout
    assert "golden replay" in done.stderr
    found = document(saccade_cli("check", exports["large"], "--json"))
    assert found["schema"] == "saccade.check/1"
    assert found["findings"] == []
    assert all(r["agrees"] for r in found["replays"])


def test_check_says_what_is_bad(saccade_cli, copy_of):
    folder = copy_of("small")
    edit_model(folder, "decoder", lambda m: m.ClearField("functions"))
    done = saccade_cli("check", folder)
    assert done.code == 3
    assert done.stdout.startswith("G101 op without body: decoder.onnx: saccade::AttentionReceived")
    assert "saccade: " in done.stderr.splitlines()[-1]
    done = saccade_cli("check", folder, "--json")
    assert done.code == 3
    assert document(done)["findings"][0]["code"] == "G101"


def test_check_of_changed_numbers(saccade_cli, copy_of):
    folder = copy_of("small")
    flip(folder / WEIGHTS, safetensors_file(folder / WEIGHTS).tensors["head"].offset + 3)
    done = saccade_cli("check", folder, "--json")
    assert done.code == 1
    assert "golden replay of" in done.stderr
    assert not all(r["agrees"] for r in document(done)["replays"])


def test_check_of_no_export(saccade_cli, tmp_path):
    done = saccade_cli("check", tmp_path)
    assert (done.code, done.stdout) == (3, "")
    assert "spec.json is missing" in done.stderr


def test_build_verify_show(saccade_cli, exports, tmp_path):
    out = tmp_path / "b"
    done = saccade_cli("build", exports["small"], exports["large"], "-o", out, "--threshold", "0.7")
    assert (done.code, done.stdout) == (0, f"{out}\n")
    assert "KeepTopK" not in done.stderr  # every op of graphs runs as its body
    done = saccade_cli("verify", out)
    assert done.code == 0
    assert "large decoder/prefill" in done.stdout
    verified = document(saccade_cli("verify", out, "--json"))
    assert set(verified["models"]) == {"small", "large"}
    done = saccade_cli("show", out)
    assert done.code == 0
    assert "exit threshold 0.7" in done.stdout
    assert "before layer 1 of 2 keeps 5%" in done.stdout
    assert "present_k_0" in done.stdout
    shown = document(saccade_cli("show", "bundle", out, "--json"))
    assert shown["schema"] == "saccade.bundle/1"
    done = saccade_cli("build", exports["alone"], "-o", out, "--overwrite", "--json")
    assert list(document(done)["members"]) == ["alone"]


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_a_tampered_bundle_ends_in_one_sentence(saccade_cli, bundle, verb):
    flip(bundle / "large" / "decoder.onnx")
    done = saccade_cli(verb, bundle)
    assert (done.code, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith("saccade: ")
    assert "was changed after the build" in done.stderr


def test_usage_errors(saccade_cli, exports, tmp_path):
    done = saccade_cli("build", exports["small"], exports["small"], "-o", tmp_path / "b")
    assert (done.code, done.stdout) == (2, "")
    assert saccade_cli("build", "-o", tmp_path / "b").code == 2
    assert saccade_cli("build", exports["alone"]).code == 2


def test_show_lists(saccade_cli):
    ops = document(saccade_cli("show", "ops", "--json"))["ops"]
    assert {o["op"] for o in ops} == {f"saccade::{name}" for name in OPS}
    assert all(o["meaning"] for o in ops)
    policies = document(saccade_cli("show", "policies", "--json"))["policies"]
    assert {p["policy"] for p in policies} == set(POLICIES)
    assert "average retention 8.96%" in saccade_cli("show", "policies").stdout
    assert "KeepTopK" in saccade_cli("show", "ops").stdout
    [topk] = [op for op in ops if op["op"] == "saccade::KeepTopK"]
    assert (topk["cpu"], topk["why_body"]["cpu"]) == ("body", "it runs the graphs, which take no plugins")
    for op in ops:
        bodies = {target for target in TARGETS if op[target] == "body"}
        assert bodies == set(op["why_body"]) >= {name for name in TARGETS if TARGETS[name].runs == "graphs"}
    [pairs] = [op for op in ops if op["op"] == "saccade::MergePairs"]
    assert pairs["why_body"]["rtx"] == "no kernel is written for it"


def test_show_machine(saccade_cli):
    found = document(saccade_cli("show", "machine", "--json"))
    assert found["runtimes"]["cpu"]["state"].startswith("ready")
    assert found["cores"] >= 1
    assert "target cpu: ready" in saccade_cli("show", "machine").stdout
