"""What open_bundle refuses, and in which words; a good bundle opens."""

import os
import shutil

import pytest

from engines.bundles.bundle import checked_manifest, open_bundle
from graphs.errors import BadArtefact, UsageError
from graphs.files import sha256_of
from tests.engines.bundle.conftest import edit_manifest
from tests.hand_made import WEIGHTS, edit_model


def relist(bundle, path):
    """Write a file's present size and digest into the manifest: a change by someone who knows the format."""

    def change(document):
        entry = next((e for e in document["files"] if e["path"] == path), None)
        if entry is None:
            entry = {"path": path}
            document["files"].append(entry)
        entry |= {"bytes": (bundle / path).stat().st_size, "sha256": sha256_of(bundle / path)}

    edit_manifest(bundle, change)


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def set_location(model, location):
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location


def test_a_good_bundle_opens(pair):
    opened = open_bundle(pair, target="cpu")
    assert list(opened.members) == ["small", "large"]
    assert opened.members["small"].spec.role == "small"
    assert opened.members["large"].folder == pair / "large"
    assert (opened.threshold, opened.target) == (0.9, "cpu")
    assert checked_manifest(pair, check="size") == opened.manifest


def weight_changed(bundle):
    flip(bundle / "large" / WEIGHTS)


def graph_changed(bundle):
    flip(bundle / "small" / "vision.onnx")


def golden_truncated(bundle):
    path = bundle / "small" / "golden.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def weights_grown(bundle):
    with (bundle / "small" / WEIGHTS).open("ab") as f:
        f.write(b"\0")


def stage_missing(bundle):
    (bundle / "large" / "decoder.onnx").unlink()


def file_added(bundle):
    (bundle / "large" / "extra.so").touch()


def threshold_edited(bundle):
    edit_manifest(bundle, lambda d: d.update(threshold=0.1), sign=False)


def manifest_missing(bundle):
    (bundle / "manifest.json").unlink()


def manifest_truncated(bundle):
    path = bundle / "manifest.json"
    path.write_text(path.read_text()[:300])


def manifest_no_utf8(bundle):
    (bundle / "manifest.json").write_bytes(b"\xff\xfe{}")


def manifest_nested_without_end(bundle):
    (bundle / "manifest.json").write_text("[" * 100_000)


def manifest_of_another_tool(bundle):
    (bundle / "manifest.json").write_text('{"name": "app"}')


def manifest_newer(bundle):
    edit_manifest(bundle, lambda d: d.update(schema="saccade.bundle/2", created_by="saccade 9.1", extra=1))


def manifest_numbered_by_another_digit(bundle):
    edit_manifest(bundle, lambda d: d.update(schema="saccade.bundle/²"))


def manifest_numbered_endlessly(bundle):
    edit_manifest(bundle, lambda d: d.update(schema="saccade.bundle/" + "9" * 5000))


def file_listed_with_nul(bundle):
    edit_manifest(bundle, lambda d: d["files"][0].update(path="small/\0"))


def file_listed_without_a_name(bundle):
    edit_manifest(bundle, lambda d: d["files"][0].update(path=""))


def file_listed_too_long(bundle):
    edit_manifest(bundle, lambda d: d["files"][0].update(path="x" * 5000))


def unknown_key(bundle):
    edit_manifest(bundle, lambda d: d.update(extra=1))


def threshold_impossible(bundle):
    edit_manifest(bundle, lambda d: d.update(threshold=7))


def member_missing(bundle):
    edit_manifest(bundle, lambda d: d["members"].pop("small"))


def target_that_no_member_has(bundle):
    edit_manifest(bundle, lambda d: d["targets"].append("rtx"))


def file_listed_outside(bundle):
    shutil.copytree(bundle / "small", bundle.parent / "elsewhere")
    edit_manifest(bundle, lambda d: d["files"][0].update(path="../elsewhere/spec.json"))


def file_listed_absolutely(bundle):
    edit_manifest(bundle, lambda d: d["files"][0].update(path="/etc/passwd"))


def member_outside(bundle):
    shutil.copytree(bundle / "small", bundle.parent / "elsewhere")
    edit_manifest(bundle, lambda d: d["members"]["small"].update(folder="../elsewhere"))


def weights_are_a_link(bundle):
    path = bundle / "large" / WEIGHTS
    path.rename(bundle.parent / "w")
    path.symlink_to(bundle.parent / "w")


def folder_is_a_link(bundle):
    (bundle / "large").rename(bundle.parent / "large")
    (bundle / "large").symlink_to(bundle.parent / "large")


def graph_reads_outside(bundle):
    shutil.copyfile(bundle / "small" / WEIGHTS, bundle.parent / "w.safetensors")
    edit_model(bundle / "small", "vision", lambda m: set_location(m, "../../w.safetensors"))
    relist(bundle, "small/vision.onnx")


def graph_reads_the_neighbour(bundle):
    edit_model(bundle / "small", "vision", lambda m: set_location(m, f"../large/{WEIGHTS}"))
    relist(bundle, "small/vision.onnx")


def stage_file_outside(bundle):
    path = bundle / "small" / "spec.json"
    path.write_text(path.read_text().replace('"vision.onnx"', '"../../vision.onnx"'))
    relist(bundle, "small/spec.json")


BROKEN = {
    weight_changed: r"large/model.safetensors was changed after the build",
    graph_changed: r"small/vision.onnx was changed after the build",
    golden_truncated: r"small/golden.safetensors was truncated: it has \d+ bytes",
    weights_grown: r"small/model.safetensors was changed: it has \d+ bytes",
    stage_missing: r"large/decoder.onnx is missing",
    file_added: r"large/extra.so is not in the manifest",
    threshold_edited: r"manifest.json was changed after it was written",
    manifest_missing: r"is not a bundle: manifest.json is missing",
    manifest_truncated: r"is not JSON, so it is damaged or truncated",
    manifest_no_utf8: r"is not JSON",
    manifest_nested_without_end: r"is not JSON",
    manifest_of_another_tool: r"is not a manifest of a bundle",
    manifest_newer: r"bundle format 2, written by saccade 9.1, and this saccade reads up to 1; upgrade",
    manifest_numbered_by_another_digit: r"is not a manifest of a bundle \(schema 'saccade.bundle/²'",
    manifest_numbered_endlessly: r"is not a manifest of a bundle \(schema 'saccade.bundle/9{25}', wanted",
    file_listed_with_nul: r"leaves the bundle",
    file_listed_without_a_name: r"leaves the bundle",
    file_listed_too_long: r"x' is too long for a file name",
    unknown_key: r"extra: Extra inputs are not permitted",
    threshold_impossible: r"threshold: Input should be less than or equal to 1",
    target_that_no_member_has: r"does not have the bundle's targets",
    member_missing: r"holds large, not a pair or one",
    file_listed_outside: r"'\.\./elsewhere/spec.json' leaves the bundle",
    file_listed_absolutely: r"'/etc/passwd' leaves the bundle",
    member_outside: r"model small is recorded at '\.\./elsewhere', outside the bundle",
    weights_are_a_link: r"large/model.safetensors' leaves the bundle or is a symbolic link",
    folder_is_a_link: r"leaves the bundle or is a symbolic link",
    graph_reads_outside: r"vision.onnx reads '../../w.safetensors', not a file of the bundle",
    graph_reads_the_neighbour: r"not a file of the bundle",
    stage_file_outside: r"outside the folder",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_bundle_is_refused(bundle, breaks):
    breaks(bundle)
    with pytest.raises(BadArtefact, match=BROKEN[breaks]) as e:
        open_bundle(bundle)
    assert e.value.exit_code == 3
    assert "saccade build" in str(e.value) or "do not use it" in str(e.value)


def test_only_the_weights_are_trusted_by_size(bundle):
    weight_changed(bundle)
    checked_manifest(bundle, check="size")
    graph_changed(bundle)
    with pytest.raises(BadArtefact, match=r"vision\.onnx"):
        checked_manifest(bundle, check="size")


def test_another_target_is_refused(pair):
    with pytest.raises(UsageError, match="built for target cpu, not rtx"):
        open_bundle(pair, target="rtx")


def test_no_bundle_at_all(tmp_path):
    with pytest.raises(BadArtefact, match="does not exist"):
        open_bundle(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BadArtefact, match="is a file"):
        open_bundle(tmp_path / "file")


def test_a_folder_that_cannot_be_read(bundle):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (bundle / "small" / "spec.json").chmod(0)
    with pytest.raises(BadArtefact, match="cannot be read"):
        open_bundle(bundle)
