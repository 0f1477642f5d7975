"""Weights: outside the graphs, once, byte for byte; converted as a stream; never all of them in memory."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import weights as weights_page
from exporter.checkpoint import checkpoint_from_folder, skeleton_of, slices_of_parameters
from exporter.export import export_checkpoint
from exporter.parameters import once_each
from exporter.weights import place_weights, weight_from_slice
from graphs.errors import BadArtefact, OperationFailed, UsageError
from graphs.rules import export_from_folder, findings_in
from graphs.weights import safetensors_file, tensors_from_checkpoint
from tests.exporter.conftest import EXPORTS
from tests.exporter.driver import Exported
from tests.exporter.hub import hub_name, module_name, stored_as_on_the_hub

PLACED = {"small": "copy", "large": "copy", "half": "in-place", "narrowed": "converted", "widened": "converted"}
TORCH = {1: torch.float32, 10: torch.float16}


def tensors_of(graph):
    """Every tensor inside a graph: initialisers, constants, and those of its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors_of(attribute.g)


def models_of(exported):
    for name, stage in exported.spec.stages.items():
        yield name, onnx.load(exported.folder / stage.file, load_external_data=False)


def places_of(model):
    """Initialiser name → (file, offset, length, dtype, shape) of those outside the file."""
    out = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {e.key: e.value for e in tensor.external_data}
            out[tensor.name] = (
                where["location"],
                int(where["offset"]),
                int(where["length"]),
                TORCH[tensor.data_type],
                tuple(tensor.dims),
            )
    return out


def parameter_of(stage, initialiser):
    """The module's parameter behind a graph's initialiser."""
    if stage == "vision":
        return initialiser.removeprefix("model.")
    if initialiser.startswith("lm_head."):
        return initialiser
    return f"model.language_model.{initialiser}"


@pytest.fixture(params=PLACED)
def model(request, exported):
    return exported(request.param)


@pytest.fixture
def parameters(model, hf):
    """The checkpoint in transformers, in the export's dtype by torch's own cast."""
    source = EXPORTS[name_of(model)][0]
    stored = {"half": "float16", "brain": "bfloat16"}.get(source, "float32")
    cast = getattr(torch, model.spec.dtype)
    return {name: p.detach().to(cast) for name, p in hf(source, stored).named_parameters(remove_duplicate=False)}


def name_of(model):
    return "half" if model.spec.weights_are == "in-place" else model.folder.name


def test_every_weight_lies_outside_and_equals_the_checkpoints(model, parameters):
    seen = set()
    for stage, graph in models_of(model):
        for initialiser, (file, offset, length, dtype, shape) in places_of(graph).items():
            wanted = parameters[parameter_of(stage, initialiser)]
            seen.add(parameter_of(stage, initialiser))
            assert file in {w.name for w in model.spec.weights}
            assert (dtype, shape) == (wanted.dtype, tuple(wanted.shape))
            with (model.folder / file).open("rb") as f:
                f.seek(offset)
                assert f.read(length) == wanted.contiguous().numpy().tobytes(), initialiser
    # All of the language model is in a graph; what the tower has behind the selected layer is in none.
    missing = {n for n in parameters if n not in seen}
    unused = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    tied = {"lm_head.weight"} if torch.equal(parameters["lm_head.weight"], embedding(parameters)) else set()
    assert {n for n in missing if not n.startswith(unused)} <= tied


def embedding(parameters):
    return parameters["model.language_model.embed_tokens.weight"]


def test_no_weight_is_inside_a_graph(model, parameters):
    known = {p.numpy().tobytes() for p in parameters.values()}
    known |= {p.T.contiguous().numpy().tobytes() for p in parameters.values() if p.dim() == 2}
    rotary = model.spec.language.head_dim // 2  # the one table of numbers that a graph may hold
    for stage, graph in models_of(model):
        for tensor in tensors_of(graph.graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                continue
            array = onnx.numpy_helper.to_array(tensor)
            assert array.dtype.kind != "f" or array.size <= rotary, (stage, tensor.name, array.shape)
            assert array.tobytes() not in known
        assert (model.folder / model.spec.stages[stage].file).stat().st_size < 100_000


def test_no_weight_is_stored_twice(model):
    places = [places_of(graph) for _, graph in models_of(model)]
    spans = {place[:3] for table in places for place in table.values()}
    taken = sorted(spans)
    for (file, offset, length), (other, after, _) in pairwise(taken):
        assert file != other or offset + length <= after, "slices overlap"
    if model.spec.weights_are == "converted":
        (file,) = model.spec.weights
        stored = safetensors_file(model.folder / file.name)
        assert {(file.name, s.offset, s.length) for s in stored.tensors.values()} == spans
    head, table = places[2].get("lm_head.weight"), places[0] | places[1]
    tied = EXPORTS[name_of(model)][0] in ("tied", "brain")
    assert (head == table["embed_tokens.weight"]) == tied
    assert {w.name: w.bytes for w in model.spec.weights} == {
        w.name: (model.folder / w.name).stat().st_size for w in model.spec.weights
    }
    on_disk = {p.name for p in model.folder.glob("*.safetensors")} - {"golden.safetensors"}
    assert on_disk == {w.name for w in model.spec.weights}


def test_two_weights_of_equal_bytes_lie_in_one_place(checkpoint, tmp_path, traced_before):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("untied"), folder)
    tensors = load_file(folder / "model.safetensors")
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors[head] = next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight")).clone()
    first = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[first.replace("layers.0", "layers.2")] = tensors[first].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    export_checkpoint(folder, tmp_path / "out", role="small")
    assert "G405" not in {finding.code for finding in findings_in(export_from_folder(tmp_path / "out"))}
    model = Exported(tmp_path / "out")
    places = {stage: places_of(graph) for stage, graph in models_of(model)}
    assert places["decoder"]["lm_head.weight"] == places["embed"]["embed_tokens.weight"]
    assert "layers.0.mlp.up_proj.weight" in places["decoder"]
    assert "layers.2.mlp.up_proj.weight" not in places["decoder"]
    case = "decoder/prefill/in/"
    out = model.run("decoder", {n.removeprefix(case): v for n, v in model.golden.items() if n.startswith(case)})
    np.testing.assert_allclose(out["logits"], model.golden["decoder/prefill/out/logits"], atol=1e-4)


def test_onnx_itself_accepts_the_files(model):
    for stage in model.spec.stages.values():
        path = model.folder / stage.file
        onnx.checker.check_model(path)
        loaded = onnx.load(path)
        assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in loaded.graph.initializer)
        onnx.checker.check_model(loaded, full_check=True)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


def test_what_was_done_is_said_and_is_so(model, checkpoint):
    source = checkpoint(EXPORTS[name_of(model)][0])
    assert model.spec.weights_are == PLACED[name_of(model)]
    if model.spec.weights_are == "copy":
        mine, theirs = model.folder / "model.safetensors", source / "model.safetensors"
        assert mine.read_bytes() == theirs.read_bytes()
        assert not mine.is_symlink()
        assert mine.stat().st_ino != theirs.stat().st_ino, "onnx refuses hard links"


def test_a_clone_is_called_a_clone(checkpoint, tmp_path, traced_before, monkeypatch):
    def clone(source, target):
        target.write_bytes(source.read_bytes())
        return "clone"

    monkeypatch.setattr(weights_page, "clone_or_copy", clone)
    spec = export_checkpoint(checkpoint("untied"), tmp_path / "out", role="small")
    assert spec.weights_are == "clone"


# In place


def test_in_place_writes_no_weight_and_transformers_still_loads_it(checkpoint, tmp_path, traced_before, capsys):
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("untied"), folder)
    before, files = digests(folder), {p.name for p in folder.iterdir()}
    wanted = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    spec = export_checkpoint(folder, role="small", in_place=True)
    assert spec.weights_are == "in-place"
    after = digests(folder)
    after.pop("golden.safetensors")
    assert after == before
    stages = {"vision.onnx", "embed.onnx", "decoder.onnx"}
    assert {p.name for p in folder.iterdir()} == files | stages | {"spec.json", "golden.safetensors", "processor"}
    got = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UsageError, match="--overwrite"):
        export_checkpoint(folder, role="small", in_place=True)
    (folder / "spec.json").unlink()
    with pytest.raises(UsageError, match=r"already has .*decoder.onnx"):
        export_checkpoint(folder, role="small", in_place=True)
    export_checkpoint(folder, role="small", in_place=True, overwrite=True)
    assert {p.name for p in folder.iterdir()} == files | stages | {"spec.json", "golden.safetensors", "processor"}
    with pytest.raises(UsageError, match="holds the checkpoint itself"):
        export_checkpoint(folder, folder, role="small", overwrite=True)


# Converting


@pytest.fixture
def stored(tmp_path):
    """Tensors of every source dtype, one of them longer than a chunk, one empty, one a scalar."""
    draw = torch.Generator().manual_seed(2)
    tensors = {
        "long": torch.randn(7, 31, generator=draw).to(torch.bfloat16),
        "wide": torch.randn(3, 5, 2, generator=draw),
        "half": torch.randn(11, generator=draw).half(),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(1.5, dtype=torch.bfloat16),
        "tiny": torch.tensor([1e-7, -3e-8, 6e-5, 65504.0, -0.0, 1e-40]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_streamed_conversion_is_torchs_cast(tmp_path, stored, dtype, monkeypatch):
    monkeypatch.setattr(weights_page, "CHUNK", 16)
    (tmp_path / "out").mkdir()
    placed = place_weights(tensors_from_checkpoint(tmp_path), dtype, tmp_path / "out", in_place=False)
    assert placed.how == "converted"
    assert placed.files == [tmp_path / "out" / "model.safetensors"]
    read = load_file(placed.files[0])
    content = placed.files[0].read_bytes()
    for name, tensor in stored.items():
        wanted = tensor.to(getattr(torch, dtype))
        assert read[name].dtype == wanted.dtype
        assert read[name].shape == wanted.shape
        assert read[name].numpy().tobytes() == wanted.numpy().tobytes()
        where = placed.slices[name]
        assert content[where.offset : where.offset + where.length] == wanted.numpy().tobytes()


def test_what_two_names_share_is_converted_once(tmp_path):
    (tmp_path / "out").mkdir()
    table = torch.randn(16, 8)
    tensors = {"table": table, "other": table + 1, "head": table.clone(), "turned": table.reshape(8, 16).clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    slices = once_each(tensors_from_checkpoint(tmp_path))
    placed = place_weights(slices, "float16", tmp_path / "out", in_place=False).slices
    assert placed["head"] == placed["table"]
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors) - {"table"}
    assert torch.equal(weight_from_slice(placed["table"]), table.half())
    assert torch.equal(weight_from_slice(placed["turned"]), table.half().reshape(8, 16))


def test_only_matrices_that_are_equal_to_the_last_byte_are_stored_once(tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.parameters.CHUNK", 4096)  # several pieces
    table, vector = torch.randn(64, 64), torch.randn(64 * 64)
    late, few = table.clone(), torch.randn(4, 4)
    late[-1, -1] += 1
    same = {
        "again": table.clone(),
        "vector": vector,
        "vector_again": vector.clone(),
        "few": few,
        "few_again": few.clone(),
    }
    save_file({"a": table, "late": late, **same}, tmp_path / "model.safetensors")
    slices = tensors_from_checkpoint(tmp_path)
    assert {name for name, where in once_each(slices).items() if where != slices[name]} == {"again"}


@pytest.mark.parametrize("alike", [True, False])
def test_weights_that_are_stored_and_differ_are_not_tied_whatever_the_configuration_says(
    checkpoint, tmp_path, capsys, alike
):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("tied"), folder)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    [(name, table)] = [item for item in tensors.items() if item[0].endswith("embed_tokens.weight")]
    head = name.replace("model.embed_tokens", "lm_head")
    save_file({**tensors, head: table.clone() if alike else table + 1}, file)
    model = skeleton_of(checkpoint_from_folder(folder), torch.float32)
    one = model.lm_head.weight is model.get_input_embeddings().weight
    assert one is alike
    assert ("lm_head.weight" in model.all_tied_weights_keys) is alike
    assert ("both are stored and differ: they are not tied" in capsys.readouterr().err) is not alike


def test_what_float16_cannot_hold_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"fine": torch.ones(3), "big.weight": torch.tensor([1.0, 7e4])}, tmp_path / "model.safetensors")
    with pytest.raises(OperationFailed, match=r"big\.weight leaves the range of float16.*--dtype float32"):
        place_weights(tensors_from_checkpoint(tmp_path), "float16", tmp_path / "out", in_place=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, bad):
    (tmp_path / "out").mkdir()
    save_file({"odd.weight": torch.tensor([1.0, bad]).bfloat16()}, tmp_path / "model.safetensors")
    with pytest.raises(OperationFailed, match=r"odd\.weight is not finite in the checkpoint.*repair"):
        place_weights(tensors_from_checkpoint(tmp_path), "float32", tmp_path / "out", in_place=False)


# Names


@pytest.mark.parametrize("naming", ["as saved", "hub", "module", "hub, sharded"])
@pytest.mark.parametrize("source", ["untied", "tied"])
def test_every_way_to_name_the_weights_leads_to_the_same_parameters(checkpoint, hf, tmp_path, naming, source):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(source), folder)
    rename = {"hub": hub_name, "module": module_name}.get(naming, str)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if "sharded" in naming:
        stored_as_on_the_hub(folder)
    opened = checkpoint_from_folder(folder)
    slices = slices_of_parameters(skeleton_of(opened, torch.float32), opened)
    wanted = dict(hf(source).named_parameters())
    assert set(slices) == set(wanted)
    for name, where in slices.items():
        with where.file.open("rb") as f:
            f.seek(where.offset)
            assert f.read(where.length) == wanted[name].detach().contiguous().numpy().tobytes(), name


# Memory

MEMORY = """
import json, sys, torch
from pathlib import Path
from transformers import LlavaForConditionalGeneration
torch.set_num_threads(1)
import saccade
from exporter.export import export_checkpoint
from exporter.weights import place_weights
from graphs.weights import tensors_from_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

source, nowhere = map(Path, sys.argv[1:])
seen = {"before": peak()}
seen["code"] = saccade.run(["export", str(source), "--in-place", "--role", "small"])
seen["exported"] = peak()
place_weights(tensors_from_checkpoint(source), "float32", nowhere, in_place=False)
seen["converted"] = peak()
print(json.dumps(seen))
"""
OURS = ("reading ", "tracing ", "placing ", "writing ", "computing ", "weights: ")


@pytest.fixture
def big_checkpoint(checkpoint, tmp_path):
    """Half a billion float16 parameters in a sparse file: a gigabyte to whoever reads it, nothing on the disk."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    folder = tmp_path / "big"
    shutil.copytree(checkpoint("untied"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.update(
        {"hidden_size": 2560, "intermediate_size": 18432, "num_hidden_layers": 3, "num_attention_heads": 20}
        | {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 8192, "dtype": "float16"}
    )
    config.dtype = "float16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlavaForConditionalGeneration(config).state_dict().items()}
    at, header = 0, {}
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    return folder, at


@pytest.mark.slow
def test_neither_export_nor_conversion_holds_the_weights(big_checkpoint, tmp_path):
    folder, size = big_checkpoint
    assert size > 0.9e9
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    (nowhere / "model.safetensors").symlink_to("/dev/null")
    command = [sys.executable, "-c", MEMORY, str(folder), str(nowhere)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 0, done.stderr
    assert seen["exported"] - seen["before"] < 0.5 * size, seen
    assert seen["converted"] - seen["before"] < 0.5 * size, seen
    # Nothing of the libraries comes between our lines.
    assert [line for line in done.stderr.splitlines() if not line.startswith(OURS)] == []


def test_a_truncated_shard_is_noticed_when_it_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.ones(8).bfloat16()}, tmp_path / "model.safetensors")
    slices = tensors_from_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadArtefact, match="ended early"):
        place_weights(slices, "float32", tmp_path / "out", in_place=False)
