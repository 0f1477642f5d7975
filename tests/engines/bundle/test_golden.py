"""Golden replay: agreement, a disagreement that is named, and golden files that cannot be used."""

from types import MappingProxyType

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.bundles.golden import cases_of, refuse_disagreement, replay
from engines.sessions.ort_session import OrtSession
from graphs.errors import BadArtefact, OperationFailed
from graphs.spec import GOLDEN_FILE, spec_from_folder
from tests.hand_made import edit_spec

INTEGERS = ("int32", "int64", "bool")


def edit_golden(folder, change, schema="saccade.golden/1"):
    tensors = load_file(folder / GOLDEN_FILE)
    change(tensors)
    save_file(tensors, folder / GOLDEN_FILE, metadata={"schema": schema})


@pytest.mark.parametrize("role", ["small", "large", "alone", "unpruned"])
def test_every_case_agrees(exports, role):
    folder = exports[role]
    replays = list(replay(folder, spec_from_folder(folder)))
    assert [(r.stage, r.case) for r in replays] == [
        ("vision", "one"),
        ("vision", "two"),
        ("embed", "one"),
        ("decoder", "chunk"),
        ("decoder", "decode"),
        ("decoder", "prefill"),
    ]
    assert all(r.agrees and r.max_error < 1e-6 for r in replays)
    pruned = role in ("large", "alone")
    assert {r.overlap for r in replays if r.stage == "decoder"} == ({1.0} if pruned else {None})
    refuse_disagreement(replays, role)


@pytest.mark.parametrize(("dtype", "allowed"), [("float16", 2e-2), ("bfloat16", 1e-1)])
def test_stages_in_another_float_type_are_held_to_its_tolerance(exports, monkeypatch, dtype, allowed):
    """Of golden tensors in fp32, as engines of an fp32 export have them."""
    folder, made = exports["small"], []

    class Narrow(OrtSession):
        def run(self, feeds, host=(), device=(), in_place=MappingProxyType({})):
            assert {value.dtype.name for value in feeds.values() if value.dtype.name not in INTEGERS} <= {dtype}
            wide = {name: v.astype(np.float32) if v.dtype.name == dtype else v for name, v in feeds.items()}
            made.append(dtype)
            got = super().run(wide, host, device, in_place)
            return {name: v.astype(dtype) if v.dtype == np.float32 else v for name, v in got.items()}

    def typed(tensors):
        return tuple(t.model_copy(update={"dtype": dtype}) if t.dtype == "float32" else t for t in tensors)

    spec = spec_from_folder(folder)
    stages = {
        name: stage.model_copy(update={"inputs": typed(stage.inputs), "outputs": typed(stage.outputs)})
        for name, stage in spec.stages.items()
    }
    narrow = spec.model_copy(update={"stages": stages, "dtype": dtype})
    replays = list(replay(folder, narrow, Narrow))
    assert made
    refuse_disagreement(replays, "narrow")
    assert {t.tolerance for r in replays for t in r.tensors if t.error is not None} == {allowed}


def other_number(tensors):
    tensors["decoder/prefill/out/logits"] = tensors["decoder/prefill/out/logits"] + np.float32(1)


def other_rows(tensors):
    kept = tensors["decoder/prefill/out/kept_0"]
    tensors["decoder/prefill/out/kept_0"] = np.where(kept == kept.max(), kept - 1, kept)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_number, r"decoder/prefill disagrees in 1 of \d+ tensors, first logits: error .* above 0.0001"),
        (other_rows, r"first kept_0: 1 of 5 kept rows are others; numbers behind"),
    ],
)
def test_a_disagreement_names_stage_case_tensor_and_error(copy_of, change, says):
    folder = copy_of("large")
    edit_golden(folder, change)
    replays = list(replay(folder, spec_from_folder(folder)))
    with pytest.raises(OperationFailed, match=says):
        refuse_disagreement(replays, "large")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("embed/one/in/input_ids"), "inputs of embed/one and of spec.json differ in input_ids"),
        (lambda t: t.update({"vision/one/out/more": np.zeros(1)}), "outputs of vision/one .* differ in more"),
        (lambda t: t.update({"vision/one": np.zeros(1)}), "key 'vision/one'"),
        (lambda t: t.update({"ears/one/in/a": np.zeros(1)}), "key 'ears/one/in/a'"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("embed")], "has no case for embed"),
    ],
)
def test_golden_files_that_do_not_fit(copy_of, change, says):
    folder = copy_of("small")
    edit_golden(folder, change)
    with pytest.raises(BadArtefact, match=says):
        cases_of(folder, spec_from_folder(folder))


def test_golden_files_that_cannot_be_read(copy_of):
    folder = copy_of("small")
    spec = spec_from_folder(folder)
    edit_golden(folder, lambda t: None, schema="saccade.golden/2")
    with pytest.raises(BadArtefact, match=r"schema is 'saccade\.golden/2'"):
        cases_of(folder, spec)
    path = folder / GOLDEN_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadArtefact, match="is truncated"):
        cases_of(folder, spec)
    path.unlink()
    with pytest.raises(BadArtefact, match="is missing; export the checkpoint again"):
        cases_of(folder, spec)


def test_a_runtime_that_gives_nan_is_named(copy_of):
    folder = copy_of("small")
    edit_golden(folder, lambda t: t["vision/one/in/pixel_values"].fill(np.nan))
    edit_spec(folder, lambda s: s)
    first = next(iter(replay(folder, spec_from_folder(folder))))
    assert "NaN" in first.tensors[0].problem
