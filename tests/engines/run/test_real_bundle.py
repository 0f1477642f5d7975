"""What the exporter really writes: every rule holds, golden tensors replay, the bundle opens and answers."""

import pytest
from PIL import Image

from engines.bundles.build import build_bundle
from engines.bundles.golden import refuse_disagreement, replay
from engines.cascade import Cascade
from graphs.rules import export_from_folder, findings_in
from tests.tiny import tiny_llava


def rules_hold_and_golden_tensors_replay(folder):
    export = export_from_folder(folder)
    assert findings_in(export) == []
    replays = list(replay(folder, export.spec))
    assert {r.stage for r in replays} == {"vision", "embed", "decoder"}
    refuse_disagreement(replays, str(folder))


@pytest.mark.parametrize("role", ["small", "large", "alone"])
def test_rules_hold(tiny_pair, role):
    rules_hold_and_golden_tensors_replay(tiny_pair.exports[role])


def test_rules_hold_for_half_precision_and_tied_embeddings(tmp_path):
    from exporter.export import export_checkpoint

    checkpoint = tiny_llava(tmp_path / "c", dtype="float16", tie=True, num_hidden_layers=2)
    export_checkpoint(checkpoint, tmp_path / "e", role="alone", fraction=0.5)
    rules_hold_and_golden_tensors_replay(tmp_path / "e")


def test_a_bundle_answers_like_its_exports(tiny_pair, tmp_path, saccade_cli):
    build_bundle([tiny_pair.exports["large"], tiny_pair.exports["small"]], tmp_path / "b", threshold=1)
    assert saccade_cli("verify", tmp_path / "b").code == 0
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    from_bundle = Cascade.open(tmp_path / "b", threads=1).ask(image, "which digit ?", max_new_tokens=3)
    from_exports = tiny_pair.cascade().ask(image, "which digit ?", max_new_tokens=3)
    assert from_bundle.text == from_exports.text


def test_verify_replays_the_decoder_that_runs(tiny_bundle, saccade_cli, monkeypatch):
    """A canonical decoder is rewritten when it is opened to run, its caches in place where its heads allow."""
    from engines.sessions import session

    cascade = Cascade.open(tiny_bundle, threads=1)
    run = [cascade.small.session("decoder").form, cascade.large.session("decoder").form]

    forms, real = [], session.open_session

    def opened(file, *rest, **options):
        made = real(file, *rest, **options)
        if file.name.startswith("decoder"):
            forms.append(made.form)
        return made

    monkeypatch.setattr(session, "open_session", opened)
    told = saccade_cli("verify", tiny_bundle)
    assert told.code == 0, told.stderr
    assert forms == run
    assert "in-place" in forms
