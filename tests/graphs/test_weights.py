"""Safetensors headers and checkpoint indices: what is refused, and in which words."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from graphs.errors import BadArtefact
from graphs.weights import INDEX_FILE, index_of_checkpoint, safetensors_file, tensors_from_checkpoint


@pytest.fixture
def weights():
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float16), "c": np.ones(1, bool)}


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_slices_point_at_the_bytes(tmp_path, weights):
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    read = safetensors_file(path)
    assert read.metadata == {"format": "pt"}
    assert read.bytes == path.stat().st_size
    assert set(read.tensors) == set(weights)
    content = path.read_bytes()
    for name, tensor in read.tensors.items():
        assert content[tensor.offset : tensor.offset + tensor.length] == weights[name].tobytes()
        assert tensor.shape == weights[name].shape
        assert tensor.dtype == str(weights[name].dtype)


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"not json", b"", "not JSON"),
        (b"[1]", b"", "not a JSON object"),
        ({"a": 1}, b"", "lacks dtype"),
        ({"a": entry(0, 8, dtype="F7")}, b"x" * 8, "dtype 'F7'"),
        ({"a": entry(0, 8, shape=[3])}, b"x" * 8, "takes 12"),
        ({"a": entry(0, 8, shape=[-2])}, b"x" * 8, "not a count"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, b"x" * 16, "hole"),
        ({"a": entry(0, 8)}, b"x" * 7, "truncated"),
        ({"a": entry(0, 8)}, b"x" * 9, "describes"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, says):
    path = raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(BadArtefact, match=says) as e:
        safetensors_file(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too few"),
        (b"\x80\x02}q\x00.", "too few"),
        (b"PK\x03\x04" + b"\0" * 3 + b"\xff" * 20, "claim a header"),
        (struct.pack("<Q", 99) + b"{}", "truncated"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadArtefact, match=says):
        safetensors_file(tmp_path / "model.safetensors")


@given(cut=st.integers(0, 400))
def test_every_truncation_is_noticed(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    save_file({"a": np.arange(40, dtype=np.float32), "b": np.ones(20, np.float16)}, folder / "whole")
    whole = (folder / "whole").read_bytes()
    (folder / "part").write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(BadArtefact):
        safetensors_file(folder / "part")


def sharded(folder, table, shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": table}))


def test_shards(tmp_path, weights):
    one, two = {"a": weights["a"]}, {"c": weights["c"]}
    table = {"a": "m-1.safetensors", "c": "m-2.safetensors"}
    sharded(tmp_path, table, {"m-1.safetensors": one, "m-2.safetensors": two})
    assert {n: t.file.name for n, t in tensors_from_checkpoint(tmp_path).items()} == table
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(BadArtefact, match=r"shard m-2.safetensors is missing"):
        index_of_checkpoint(tmp_path)


def test_the_single_file_is_read_where_an_index_lies_beside_it(tmp_path, weights):
    save_file({"a": weights["a"]}, tmp_path / "model.safetensors")
    sharded(tmp_path, {"a": "gone.safetensors"}, {})
    assert list(index_of_checkpoint(tmp_path)) == ["model.safetensors"]
    assert tensors_from_checkpoint(tmp_path)["a"].file.name == "model.safetensors"


def test_index_that_disagrees_with_its_shard(tmp_path, weights):
    sharded(tmp_path, {"z": "m.safetensors"}, {"m.safetensors": {"a": weights["a"]}})
    with pytest.raises(BadArtefact, match="no tensor z"):
        tensors_from_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../m.safetensors", "/etc/passwd", "x/m.safetensors", "..", "", 3, "..\\m"])
def test_shard_names_stay_in_the_folder(tmp_path, weights, shard):
    sharded(tmp_path, {"a": shard}, {})
    with pytest.raises(BadArtefact, match="outside the folder"):
        index_of_checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(BadArtefact, match="neither"):
        tensors_from_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadArtefact, match="convert them"):
        tensors_from_checkpoint(tmp_path)
    with pytest.raises(BadArtefact, match="not a folder"):
        tensors_from_checkpoint(tmp_path / "nowhere")
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(BadArtefact, match="no weight_map"):
        tensors_from_checkpoint(tmp_path)
