"""What a user can get wrong, and what a machine can: one sentence, an exit code, nothing half-written."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import export as exporter_page
from exporter import golden as golden_page
from graphs.errors import SaccadeError
from graphs.policies import POLICIES

# What a sentence ends with: the next step.
NEXT = re.compile(
    r"give |download|convert|save |export |choose|leave|use |make room|repair|add |known are|known|did you mean|"
    r"does not belong|list |order"
)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint of the test's own, to be spoilt."""
    return Path(shutil.copytree(checkpoint("untied"), tmp_path / "checkpoint"))


@pytest.fixture
def refuse(saccade_cli, tmp_path, monkeypatch):
    """Export, and get the one sentence it ends with; nothing may have been traced or left behind."""

    def untimely(*_):
        raise AssertionError("bad input must be found before a graph is traced")

    monkeypatch.setattr(exporter_page, "onnx_from_program", untimely)

    def call(source, *options, code=3, out="out"):
        before = sorted(tmp_path.rglob("*"))
        arguments = ["export", source, *options]
        outcome = saccade_cli(*arguments, *(["-o", tmp_path / out] if out else []))
        assert outcome.code == code, outcome.stderr
        assert outcome.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        assert "unexpected" not in outcome.stderr
        assert "Traceback" not in outcome.stderr
        said = [line for line in outcome.stderr.splitlines() if not line.startswith("reading the checkpoint")]
        assert len(said) == 1, said
        assert NEXT.search(said[0]), said[0]
        return said[0]

    return call


def edit(path, **entries):
    document = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))


def reweigh(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# The folder and its configuration


def test_no_such_folder(refuse, tmp_path, folder):
    assert "nowhere is not a folder" in refuse(tmp_path / "nowhere")
    assert "config.json is not a folder" in refuse(folder / "config.json")
    assert "llava-hf/llava-1.5-7b-hf is not a folder" in refuse("llava-hf/llava-1.5-7b-hf")


def test_no_config(refuse, folder):
    (folder / "config.json").unlink()
    assert "config.json is missing" in refuse(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ', "\x00", "[" * 100_000], ids=range(7))
def test_a_config_that_is_no_json_object(refuse, folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json is not a JSON object" in refuse(folder)


@pytest.mark.parametrize("architectures", ["LlavaForConditionalGeneration", 5, [None], {"a": 1}])
def test_architectures_that_are_no_list(refuse, folder, architectures):
    edit(folder / "config.json", architectures=architectures)
    assert "architectures" in refuse(folder)


def test_an_unknown_architecture_lists_the_known_and_names_the_near(refuse, folder):
    edit(folder / "config.json", architectures=["LlavForConditionalGeneration"])
    said = refuse(folder)
    assert "unknown architecture LlavForConditionalGeneration" in said
    assert re.search(r"known are .*\bLlavaForConditionalGeneration", said)
    assert "did you mean LlavaForConditionalGeneration" in said
    edit(folder / "config.json", architectures=["LlavaNextForConditionalGeneration"])
    said = refuse(folder)
    assert "LlavaNextForConditionalGeneration wants" in said
    assert "LlavaConfig" in said
    edit(folder / "config.json", architectures=["ResNet"])
    said = refuse(folder)
    assert re.search(r"known are .*\bLlavaForConditionalGeneration", said)
    assert "did you mean" not in said
    edit(folder / "config.json", architectures=...)
    assert "unknown architecture none" in refuse(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "no_such_model"},
        {"model_type": ...},
        {"text_config": 5},
        {"vision_config": "CLIP"},
        {"text_config": {"model_type": "llama", "hidden_size": "wide"}},
        {"text_config": {"model_type": "llama", "num_attention_heads": 0}},
        {"vision_config": {"model_type": "clip_vision_model", "patch_size": 0, "image_size": 32}},
    ],
    ids=range(7),
)
def test_a_config_that_describes_no_model(refuse, folder, entries):
    edit(folder / "config.json", **entries)
    assert "config.json" in refuse(folder)


def test_the_strategy_that_gives_no_grid(refuse, folder):
    edit(folder / "config.json", vision_feature_select_strategy="full")
    assert "'full'" in refuse(folder, code=2)


# The weights


def test_no_weights(refuse, folder):
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refuse(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    said = refuse(folder)
    assert "pytorch_model.bin" in said
    assert "save_pretrained" in said


@pytest.mark.parametrize("size", [0, 5, 100, 60_000, -1])
def test_truncated_weights(refuse, folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    said = refuse(folder)
    assert "model.safetensors" in said
    assert ("is truncated" if size > 5 or size < 0 else "too few for a header") in said


@pytest.mark.parametrize(
    "text", [b"PK\x03\x04" * 99, b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64]
)
def test_weights_that_are_no_safetensors(refuse, folder, text):
    (folder / "model.safetensors").write_bytes(text)
    assert "is not a safetensors file" in refuse(folder)


def test_a_shard_is_missing(refuse, folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    table = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert "model-00002-of-00002.safetensors is missing" in refuse(folder)


def test_a_tensor_is_missing(refuse, folder):
    reweigh(folder, lambda t: t.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    said = refuse(folder)
    assert "layers.1.mlp.up_proj.weight" in said
    reweigh(folder, dict.clear)
    assert re.search(r"and \d+ more", refuse(folder))


def test_a_tensor_of_another_shape(refuse, folder):
    reweigh(folder, lambda t: t.update({"language_model.lm_head.weight": torch.zeros(3, 32)}))
    said = refuse(folder)
    assert "lm_head.weight has shape [3, 32]" in said
    assert "[64, 32]" in said


def test_a_quantised_tensor(refuse, folder):
    reweigh(folder, lambda t: t.update({"language_model.lm_head.weight": torch.zeros(64, 32, dtype=torch.int8)}))
    assert "lm_head.weight is stored as int8" in refuse(folder)


# The processor


def test_no_tokenizer(refuse, folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not a tokenizer" in refuse(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refuse(folder)


def test_no_image_processor(refuse, folder):
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refuse(folder)


def test_the_image_token_is_none_of_the_tokenizers(refuse, folder):
    edit(folder / "config.json", image_token_index=..., image_token_id=63)
    assert "image token's id 63" in refuse(folder)


def test_a_broken_generation_config(refuse, folder):
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refuse(folder)


@pytest.mark.parametrize("change", [{"image_mean": [0.5, 0.5]}, {"image_std": [0, 0, 0]}, {"image_mean": "x"}])
def test_an_image_processor_that_does_not_work(refuse, folder, change):
    edit(folder / "preprocessor_config.json", **change)
    assert "its image processor cannot" in refuse(folder).replace("cannot load", "cannot")


def test_more_layers_than_anything_holds(refuse, folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | {"num_hidden_layers": 10**12})
    assert "num_hidden_layers is 1000000000000, but the files hold" in refuse(folder)


# The request


def test_a_plan_and_a_policy(saccade_cli, folder, tmp_path):
    told = saccade_cli("export", folder, "-o", tmp_path / "out", "--plan", tmp_path / "plan.toml", "--policy", "sgl")
    assert (told.code, "--plan replaces --policy" in told.stderr) == (2, True)


def test_dtypes(refuse, saccade_cli, folder):
    outcome = saccade_cli("export", folder, "-o", folder / "out", "--dtype", "bfloat16")
    assert outcome.code == 2
    assert "'bfloat16' is not one of 'float32', 'float16'" in outcome.stderr
    said = refuse(folder, "--in-place", "--dtype", "float16", code=2, out=None)
    assert "needs weights stored as float16" in said
    assert "has float32" in said


def test_where_to_write(refuse, folder, tmp_path):
    assert "give an output folder, or --in-place" in refuse(folder, code=2, out=None)
    assert "not both" in refuse(folder, "--in-place", code=2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert "exists and is not empty" in refuse(folder, code=2, out="taken")
    assert "saccade did not write it" in refuse(folder, "--overwrite", code=2, out="taken")
    assert "is not a folder" in refuse(folder, code=2, out="taken/mine.txt")
    assert "holds the checkpoint itself" in refuse(folder, "--overwrite", code=2, out="checkpoint")
    assert "holds the checkpoint itself" in refuse(folder, "--overwrite", code=2, out=".")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "fastw"], "'fastw'"),
        (["--keep", "0"], "(0, 1]"),
        (["--keep", "1.5"], "(0, 1]"),
        (["--keep", "nan"], "(0, 1]"),
        (["--layer-fraction", "1"], "[0, 1)"),
        (["--layer-fraction", "-0.5"], "[0, 1)"),
        (["--policy", "none", "--keep", "0.5"], "none takes no keep"),
        (["--role", "small", "--keep", "0.5"], "takes no keep"),
    ],
)
def test_plans_that_cannot_be(refuse, folder, options, says):
    said = refuse(folder, *options, code=2)
    assert says in said
    if options[1] == "fastw":
        assert all(policy in said for policy in POLICIES)


# The machine


@pytest.fixture
def few_bytes():
    """Files longer than 100 kB cannot be written, as if the disk were full: the system says so, not a mock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_, **__):
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["copied weights", "golden tensors"])
def test_a_disk_that_fills_up(saccade_cli, folder, tmp_path, traced_before, where, few_bytes):
    place = ["-o", tmp_path / "out"] if where == "copied weights" else ["--in-place"]
    before = sorted(tmp_path.rglob("*"))
    outcome = saccade_cli("export", folder, "--role", "small", *place)
    assert outcome.code == 1
    assert "the disk is full while writing" in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [(ir, "save", full), (golden_page, "save_file", full_in_rust), (Path, "write_text", full)],
    ids=["a graph", "the golden tensors", "the spec"],
)
def test_a_disk_that_fills_up_later(saccade_cli, folder, tmp_path, traced_before, monkeypatch, owner, name, failure):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(owner, name, failure)
    outcome = saccade_cli("export", folder, "--role", "small", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "the disk is full while writing" in outcome.stderr.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite(saccade_cli, folder, tmp_path, traced_before):
    reweigh(folder, lambda t: t["language_model.model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    before = sorted(tmp_path.rglob("*"))
    for options in ([], ["--dtype", "float16"]):
        outcome = saccade_cli("export", folder, "--role", "small", "-o", tmp_path / "out", *options)
        assert outcome.code == 1
        said = outcome.stderr.splitlines()[-1]
        assert "finite" in said
        assert NEXT.search(said)
        assert not options or "layers.0.mlp.up_proj.weight" in said
        assert sorted(tmp_path.rglob("*")) == before


STOPPED = """
import sys, time
from pathlib import Path
import onnx_ir as ir
import saccade
from exporter import export

traces, source, out = sys.argv[1:]
export.onnx_from_program = lambda program, *_: ir.load(
    Path(traces) / f"{type(program).__name__.removesuffix('Program').lower()}.onnx"
)
def wait(*_):
    print("half-way", flush=True)
    time.sleep(100)
export.copy_processor = wait
sys.exit(saccade.run(["export", source, "-o", out, "--role", "small"]))
"""


def test_a_kill_leaves_nothing_under_the_final_name(saccade_cli, folder, tmp_path, traced_before):
    """SIGTERM cleans up; SIGKILL cannot, so the next run does; both while the weights are there already."""
    home, command = tmp_path / "home", [sys.executable, "-c", STOPPED, str(traced_before), str(folder)]
    home.mkdir()
    started = [
        subprocess.Popen(
            [*command, str(home / name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        for name in ("terminated", "killed")
    ]
    for process in started:
        assert process.stdout.readline() == b"half-way\n"
    assert all(list(home.glob(f".{name}.partial-*/decoder.onnx")) for name in ("terminated", "killed"))
    terminated, killed = started
    terminated.terminate()
    killed.kill()
    codes = [process.wait(30) for process in started]
    for process in started:
        process.stdout.close()
        process.stderr.close()
    assert codes == [128 + signal.SIGTERM, -signal.SIGKILL]
    (left,) = home.iterdir()
    assert left.name.startswith(".killed.partial-")
    outcome = saccade_cli("export", folder, "--role", "small", "-o", home / "killed")
    assert outcome.code == 0, outcome.stderr
    assert [p.name for p in home.iterdir()] == ["killed"]
    assert outcome.stdout == f"{home / 'killed'}\n"


def test_json_is_the_spec(saccade_cli, folder, tmp_path, traced_before):
    outcome = saccade_cli("export", folder, "--role", "small", "-o", tmp_path / "out", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout) == json.loads((tmp_path / "out" / "spec.json").read_text())


def test_the_python_way_raises_the_same(folder, tmp_path):
    import saccade

    with pytest.raises(SaccadeError, match="must lie"):
        saccade.export(folder, tmp_path / "out", keep=2)
