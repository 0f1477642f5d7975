"""Building: what goes in, what is refused, and what a full disk or a kill leaves behind."""

import errno
import json
import shutil
import subprocess
import sys
import textwrap

import pytest

from engines.bundles import build as build_module
from engines.bundles.build import build_bundle
from engines.bundles.bundle import open_bundle
from graphs.errors import BadArtefact, OperationFailed, UsageError
from graphs.plan import PrunePoint, PruningPlan
from graphs.spec import PROCESSOR_FOLDER
from tests.hand_made import WEIGHTS, edit_model, edit_spec, write_export


def test_a_pair_in_any_order_with_each_weight_once(exports, tmp_path):
    out = tmp_path / "b"
    manifest = build_bundle([exports["large"], exports["small"]], out, threshold=0.5)
    assert {name: m.role for name, m in manifest.members.items()} == {"small": "small", "large": "large"}
    assert manifest.members["small"].targets["cpu"].ops == {"AttentionReceived": "body"}
    assert manifest.members["large"].targets["cpu"].ops == {"CompactRows": "body", "KeepTopK": "body"}
    assert manifest.threshold == 0.5
    assert manifest.tools["onnxruntime"]
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob(WEIGHTS)) == [f"large/{WEIGHTS}", f"small/{WEIGHTS}"]
    assert {f.path for f in manifest.files} == {
        p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    for name in ("small", "large"):
        assert (out / name / WEIGHTS).stat().st_nlink == 1
        assert (out / name / WEIGHTS).read_bytes() == (exports[name] / WEIGHTS).read_bytes()


def test_one_model_alone(exports, tmp_path):
    build_bundle([exports["alone"]], tmp_path / "b")
    assert list(open_bundle(tmp_path / "b").members) == ["alone"]


def test_only_what_the_export_names_is_copied(copy_of, tmp_path):
    """An in-place export lies among a checkpoint's other files."""
    folder = copy_of("alone")
    (folder / "README.md").write_text("of the checkpoint")
    build_bundle([folder], tmp_path / "b")
    assert not (tmp_path / "b" / "alone" / "README.md").exists()


def refuse(folders, out, says, error=UsageError):
    with pytest.raises(error, match=says) as e:
        build_bundle(folders, out)
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))
    return e.value


def test_roles_that_make_no_pair(exports, tmp_path):
    refuse([exports["small"], exports["small"]], tmp_path / "b", "one small and one large")
    refuse([exports["small"], exports["alone"]], tmp_path / "b", "is alone")
    refuse([exports["small"]] * 3, tmp_path / "b", "got 3 exports")
    refuse([exports["large"]], tmp_path / "b", "give that export too")


def test_unequal_grids(exports, copy_of, tmp_path):
    folder = copy_of("large")
    edit_spec(folder, lambda s: s["grid"].update(rows=4, columns=1))
    refuse([exports["small"], folder], tmp_path / "b", "unequal grids of visual tokens: .* into 2×2, .* into 4×1")


def processor_change(file, change):
    def apply(folder):
        path = folder / PROCESSOR_FOLDER / file
        path.write_text(change(path.read_text()))

    return apply


def swap_words(text):
    document = json.loads(text)
    document["model"]["vocab"] |= {"w3": 4, "w4": 3}
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (processor_change("tokenizer.json", swap_words), r"the vocabulary of .* \('w3' is 3 in one and 4"),
        (processor_change("tokenizer.json", lambda t: t.replace('"<image>"', '"<img>"')), "the added tokens"),
        (processor_change("chat_template.jinja", lambda t: t + "!"), "the chat template"),
        (lambda f: edit_spec(f, lambda s: s["tokens"].update(eos=[2])), "the end tokens"),
        (lambda f: edit_spec(f, lambda s: s["tokens"].update(image_text="<img>")), "the image token"),
    ],
)
def test_unequal_tokenizers(exports, copy_of, tmp_path, change, says):
    folder = copy_of("large")
    change(folder)
    refuse([exports["small"], folder], tmp_path / "b", f"unequal tokenizers: {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is missing"),
        ("{", "is not JSON"),
        ("[]", "holds no tokenizer"),
        ('{"model": {}, "added_tokens": ["x"]}', "holds no tokenizer"),
        ('{"model": {}, "added_tokens": [{"content": []}]}', "holds no tokenizer"),
        ('{"model": {}, "added_tokens": 5}', "holds no tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(exports, copy_of, tmp_path, text, says):
    folder = copy_of("large")
    path = folder / PROCESSOR_FOLDER / "tokenizer.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    refuse([exports["small"], folder], tmp_path / "b", says, BadArtefact)


def test_a_template_that_is_no_text(exports, copy_of, tmp_path):
    folder = copy_of("large")
    (folder / PROCESSOR_FOLDER / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refuse([exports["small"], folder], tmp_path / "b", r"chat_template\.jinja is not UTF-8 text", BadArtefact)


def test_a_template_may_stand_in_the_config(exports, copy_of, tmp_path):
    folder = copy_of("large") / PROCESSOR_FOLDER
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    build_bundle([exports["small"], folder.parent], tmp_path / "b")


def test_guidance_nobody_gives(exports, tmp_path):
    small = write_export(tmp_path / "small", "small", "none")
    refuse([small, exports["large"]], tmp_path / "b", "needs guidance")


def test_a_plan_that_prunes_nothing_unasked(exports, tmp_path):
    plan = PruningPlan(name="mine", points=(PrunePoint(layer=1, score="priority", keep=1.0),))
    large = write_export(tmp_path / "large", "large", plan=plan)
    refuse([exports["small"], large], tmp_path / "b", "plan mine prunes nothing")
    alone = write_export(tmp_path / "alone", "alone", plan=PruningPlan(name="empty"))
    refuse([alone], tmp_path / "b", "plan empty prunes nothing")


def test_a_plan_that_prunes_nothing_as_asked(exports, tmp_path, capsys):
    build_bundle([exports["small"], exports["unpruned"]], tmp_path / "b")
    assert "the large model prunes nothing, as its plan none asks" in capsys.readouterr().err


def test_an_export_that_breaks_a_rule(exports, copy_of, tmp_path):
    folder = copy_of("large")
    edit_model(folder, "decoder", lambda m: m.ClearField("functions"))
    refuse([exports["small"], folder], tmp_path / "b", "breaks graph rule G101", BadArtefact)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_thresholds_outside(exports, tmp_path, threshold):
    with pytest.raises(UsageError, match=r"must lie in \[0, 1\]"):
        build_bundle([exports["alone"]], tmp_path / "b", threshold=threshold)


def test_unknown_target(exports, tmp_path):
    with pytest.raises(UsageError, match=r"known are .*cpu"):
        build_bundle([exports["alone"]], tmp_path / "b", target="abacus")


def test_overwriting(exports, tmp_path):
    out = tmp_path / "b"
    build_bundle([exports["alone"]], out)
    with pytest.raises(UsageError, match="--overwrite"):
        build_bundle([exports["alone"]], out)
    build_bundle([exports["small"], exports["large"]], out, overwrite=True, threshold=0.25)
    assert open_bundle(out).threshold == 0.25
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("years of work")
    with pytest.raises(UsageError, match="saccade did not write it"):
        build_bundle([exports["alone"]], other, overwrite=True)
    assert (other / "chapter.tex").exists()


def test_an_export_in_the_old_bundle_or_around_the_new_one_is_left_alone(exports, copy_of, tmp_path):
    out = tmp_path / "b"
    build_bundle([exports["alone"]], out)
    shutil.copytree(exports["small"], out / "mine")
    with pytest.raises(UsageError, match=r"b holds the export .*mine itself, which would be replaced"):
        build_bundle([out / "mine"], out, overwrite=True)
    assert (out / "mine" / WEIGHTS).exists()
    folder = copy_of("alone")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match=r"processor/b lies in the export .*alone, which is read"):
        build_bundle([folder], folder / PROCESSOR_FOLDER / "b")
    assert sorted(folder.rglob("*")) == before
    build_bundle([folder], folder.with_name("alone-bundle"))


def test_a_threshold_of_one_model_is_refused(exports, tmp_path):
    with pytest.raises(UsageError, match="a threshold has no effect; leave it out"):
        build_bundle([exports["alone"]], tmp_path / "b", threshold=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["copy", "processor", "manifest"])
def test_a_full_disk(exports, tmp_path, monkeypatch, broken):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_, **__):
        raise full

    if broken == "copy":
        monkeypatch.setattr(build_module, "clone_or_copy", fail)
    elif broken == "processor":
        monkeypatch.setattr(shutil, "copyfile", fail)
    else:
        monkeypatch.setattr(build_module.Manifest, "dumps", fail)
    refuse([exports["small"], exports["large"]], tmp_path / "b", "disk is full", OperationFailed)


KILLED = textwrap.dedent(
    """
    import sys, time
    from engines.bundles import build
    copy, done = build.clone_or_copy, 0
    def slowly(source, target):
        global done
        done += 1
        if done == 8:  # in the middle of the second model
            print("half-way", flush=True)
            time.sleep(60)
        return copy(source, target)
    build.clone_or_copy = slowly
    build.build_bundle(sys.argv[1:3], sys.argv[3])
    """
)


@pytest.mark.parametrize("kill", ["kill", "terminate"])
def test_a_kill_leaves_nothing_under_the_final_name(exports, tmp_path, kill):
    out = tmp_path / "b"
    arguments = [str(exports["small"]), str(exports["large"]), str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "half-way\n"
        getattr(process, kill)()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == (1 if kill == "kill" else 0)
    build_bundle(arguments[:2], out)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
