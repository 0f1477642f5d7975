"""spec.json: what is written is read back, and what is not ours is refused in one sentence."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from graphs.errors import BadArtefact
from graphs.policies import plan_of_policy
from graphs.spec import (
    SPEC_FILE,
    STAGES,
    ExportSpec,
    LanguageModel,
    StageSpec,
    TensorSpec,
    Tokens,
    VisualGrid,
    WeightFile,
    spec_from_folder,
)

roles = st.sampled_from(["small", "large", "alone"])


def spec_of(role="large", policy="sgl", layers=6, rows=3, columns=5, eos=(2,), pad=None):
    tensor = TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, 24, 40))
    return ExportSpec(
        family="llava",
        architecture="LlavaForConditionalGeneration",
        role=role,
        dtype="float16",
        plan=plan_of_policy(policy, role, layers),
        language=LanguageModel(layers=layers, width=8, heads=2, kv_heads=1, head_dim=4, vocab=16, max_positions=64),
        grid=VisualGrid(image_height=24, image_width=40, rows=rows, columns=columns),
        tokens=Tokens(image=4, image_text="<image>", eos=eos, pad=pad),
        stages={name: StageSpec(file=f"{name}.onnx", inputs=(tensor,), outputs=()) for name in STAGES},
        weights=(WeightFile(name="model.safetensors", bytes=12),),
        weights_are="copy",
        tools={"torch": "2.13.0"},
    )


@given(
    roles,
    st.sampled_from(["none", "sgl"]),
    st.integers(2, 90),
    st.integers(1, 99),
    st.lists(st.integers(0, 9), min_size=1).map(tuple),
    st.none() | st.integers(0, 9),
)
def test_what_is_written_is_read_back(tmp_path_factory, role, policy, layers, rows, eos, pad):
    spec = spec_of(role, policy, layers, rows=rows, eos=eos, pad=pad)
    folder = tmp_path_factory.mktemp("export")
    (folder / SPEC_FILE).write_text(spec.dumps(), "utf-8")
    assert spec_from_folder(folder) == spec
    document = json.loads(spec.dumps())
    assert document["schema"] == "saccade.spec/1"
    assert spec.grid.tokens == rows * 5


def refusal(folder, text):
    if text is not None:
        (folder / SPEC_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadArtefact) as refused:
        spec_from_folder(folder)
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    assert re.search("export", message.rsplit(";", maxsplit=1)[-1])  # the next step
    assert refused.value.exit_code == 3
    return message


def changed(**entries):
    document = json.loads(spec_of().dumps())
    document |= entries
    return json.dumps({k: v for k, v in document.items() if v is not ...})


def test_no_spec(tmp_path):
    assert "spec.json is missing" in refusal(tmp_path, None)
    assert "spec.json is missing" in refusal(tmp_path / "nowhere", None)
    (tmp_path / SPEC_FILE).mkdir()
    assert "cannot be read" in refusal(tmp_path, None)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", b"\xff\xfe{}", '{"schema": "saccade.spec/1"', "[" * 100_000], ids=range(8)
)
def test_what_is_no_json_object(tmp_path, text):
    refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"schema": "saccade.spec/2"}, "saccade.spec/1"),
        ({"schema": "saccade.spec/2", "aim": "moon", "plan": ...}, "saccade.spec/1"),
        ({"schema": 1}, "saccade.spec/1"),
        ({"schema": ...}, "schema"),
        ({"aim": "moon"}, "aim"),
        ({"language": ...}, "language"),
        ({"dtype": "float8"}, "dtype"),
        ({"grid": {"rows": 2}}, "grid"),
        ({"tokens": {"image": "four", "image_text": "", "eos": []}}, "tokens.image"),
        ({"weights_are": "elsewhere"}, "weights_are"),
        ({"plan": {"name": "x", "points": [{"layer": 1, "score": "priority", "keep": 2}]}}, "plan.points.0.keep"),
    ],
)
def test_what_is_not_ours_is_named(tmp_path, entries, says):
    assert says in refusal(tmp_path, changed(**entries))


LANGUAGE = json.loads(spec_of().dumps())["language"]
GRID = json.loads(spec_of().dumps())["grid"]
STAGE = {"file": "decoder.onnx", "inputs": [], "outputs": []}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"stages": {}}, "stages are none, but must be vision, embed, decoder"),
        ({"stages": {"decoder": STAGE}}, "stages are decoder, but must be"),
        ({"stages": dict.fromkeys((*STAGES, "other"), STAGE)}, "other, but must be"),
        *(({"language": LANGUAGE | {name: 0}}, f"language.{name}") for name in LANGUAGE if name != "deepstack"),
        ({"grid": GRID | {"rows": 0}}, "rows is missing, but a grid of kind fixed needs one"),
        ({"grid": GRID | {"merge": 0}}, "grid.merge"),
        ({"grid": GRID | {"kind": "patches"}}, "patch is missing"),
        ({"grid": GRID | {"kind": "anyres"}}, "pinpoints is missing"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, entries, says):
    assert says in refusal(tmp_path, changed(**entries))


@given(st.data())
def test_no_lost_key_goes_unseen(tmp_path_factory, data):
    document = json.loads(spec_of().dumps())
    lost = data.draw(st.sampled_from(sorted(set(document) - {"cache"})))  # a spec without it is of a concatenated one
    folder = tmp_path_factory.mktemp("export")
    assert lost in refusal(folder, json.dumps({k: v for k, v in document.items() if k != lost}))


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError):
        spec_of().dtype = "float32"
