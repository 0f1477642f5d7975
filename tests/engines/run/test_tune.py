"""``saccade tune`` on the tiny pair: the front and the choice against a search by hand, layers, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.bundles.manifest import Manifest, manifest_of
from engines.cascade import Cascade
from engines.evaluation import sweep
from engines.evaluation.data import Data, Example, data_from_file
from engines.evaluation.settings import Setting
from engines.model import Model
from engines.tuning import layers
from engines.tuning import tune as search
from engines.tuning.commands import _said
from engines.tuning.front import BARS, Asked, System, cheapest, front_of, systems_of
from engines.tuning.tune import doubts, halves
from graphs.errors import BackendMissing, BadArtefact, SaccadeError, UsageError
from graphs.plan import PrunePoint, PruningPlan
from graphs.plan_file import plan_from_file
from graphs.spec import spec_from_folder
from tests.conftest import Outcome
from tests.engines.run.conftest import TinyPair, picture_of, question_of
from tests.engines.run.test_calibrate import data_of

Cli = Callable[..., Outcome]
QUESTIONS = 12
COMMON = ("--max-loss", 0.3, "--max-new-tokens", 2, "--threads", 1)


@pytest.fixture(scope="module")
def truths(tiny_bundle: Path) -> list[str]:
    """The small model is right on one question in four, the large one pruned to a half on the others."""
    cascade = Cascade.open(tiny_bundle, threads=1)
    asked = [(picture_of(i), question_of(i)) for i in range(QUESTIONS)]
    large = [cascade.ask(*one, keep=0.5, threshold=1, max_new_tokens=2).text for one in asked]
    small = [cascade.ask(*one, threshold=0, max_new_tokens=2).text for one in asked]
    return [small[i] if i % 4 == 0 else large[i] for i in range(QUESTIONS)]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small pass takes 1 ms, a large one 10 ms times the retention, whatever the machine does."""
    real = sweep._answer_row

    def row(answer: Any, model: str, flops: Any) -> dict[str, Any]:
        ms = 1.0 if model == "small" else 10.0 * answer.average_retention
        return {**real(answer, model, flops), "milliseconds": {f"{model}_prefill": ms}}

    monkeypatch.setattr(sweep, "_answer_row", row)


def is_right(said: dict[str, Any], example: Example) -> bool:
    return " ".join(said["text"].split()) in {" ".join(a.split()) for a in example.answers}


def lost_by_hand(folder: Path, threshold: float | None, data: Data) -> np.ndarray:
    """What the choice loses beside the large model that sees everything, question by question of those to report on."""
    [journal] = folder.glob("chosen-*.jsonl")
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    lost = []
    for row, example in zip(rows, halves(data, 0)[1].examples, strict=True):
        whole, pruned = row["large"].values()
        exits = threshold is not None and row["small"]["0"]["score"] > threshold
        lost.append(is_right(whole, example) - is_right(row["small"]["0"] if exits else pruned, example))
    return np.array(lost)


def by_hand(folder: Path, journals: list[str], data: Path) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Every system of the journals: (layer, keep, threshold) → accuracy, ms."""
    tuned_on, _ = halves(data_from_file(data), 0)
    found = {}
    for journal in journals:
        rows = [json.loads(line) for line in (folder / f"{journal}.jsonl").read_text().splitlines()[1:]]
        for name in rows[0]["large"]:
            for bar in (None, *BARS):
                right, spent = [], []
                for row, example in zip(rows, tuned_on.examples, strict=True):
                    exits = bar is not None and row["small"]["0"]["score"] > bar
                    said = row["small"]["0"] if exits else row["large"][name]
                    right.append(is_right(said, example))
                    ms = {**(row["large"][name]["milliseconds"] if not exits else {})}
                    if bar is not None or name != "1":
                        ms |= row["small"]["0"]["milliseconds"]
                    spent.append(sum(ms.values()))
                layer = None if name == "1" else int(journal.partition("-")[2])
                found[layer, float(name.split()[0]), bar] = float(np.mean(right)), float(np.mean(spent))
    return found


def key_of(system: dict[str, Any]) -> tuple[Any, ...]:
    return system["layer"], *system["keep"], system["threshold"]


def check_choice(
    document: dict[str, Any], systems: dict[tuple[Any, ...], tuple[float, float]], max_loss: float
) -> None:
    best_accuracy, whole_ms = systems[None, 1.0, None]
    front = [key_of(one) for one in document["front"]]
    for one in document["front"]:
        accuracy, ms = systems[key_of(one)]
        assert (one["accuracy"], one["ms_per_question"]) == (pytest.approx(accuracy), pytest.approx(ms, abs=1e-3))
        assert not [k for k, (a, m) in systems.items() if a >= accuracy and m < ms - 1e-3], "a better one was left out"
    for key, (accuracy, ms) in systems.items():
        beaten = any(systems[k][0] >= accuracy and systems[k][1] <= ms + 1e-3 for k in front)
        assert beaten, f"{key} belongs to the front"
    fast = min(ms for accuracy, ms in systems.values() if accuracy >= best_accuracy - max_loss - 1e-9)
    if document["chosen"] is None:
        assert whole_ms <= fast + 1e-3
    else:
        assert systems[key_of(document["chosen"])][1] == pytest.approx(fast, abs=1e-3)


@pytest.mark.usefixtures("steady")
def test_the_front_and_the_choice_are_those_of_a_search_by_hand(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = data_of(tmp_path, truths), tmp_path / "out"
    ask = ("tune", tiny_bundle, data, "-o", out, "--keep", "0.5,0.1", *COMMON)
    real, asked = sweep.row_of, []

    def stops(*arguments: Any) -> Any:
        asked.append(arguments[3])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweep, "row_of", stops)
    assert saccade_cli(*ask).code == 130
    told = saccade_cli(*ask, "--json")
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    assert asked[:5] == [0, 0, 1, 1, 1], "an interrupted search goes on where it ended, once warm"
    assert "layers are not walked" in told.stderr
    assert f"{document['tuned_on']} questions to tune on, {document['reported_on']} others" in told.stderr
    assert (document["layers"], document["layers_walked"]) == ([1], False)
    assert document["tuned_on"] + document["reported_on"] == QUESTIONS
    assert document["tuned_on"] > 3 < document["reported_on"]
    check_choice(document, by_hand(out, ["layer-1"], data), 0.3)
    assert json.loads((out / "tune.json").read_text()) == document
    again = saccade_cli(*ask)
    reported = 1 + document["reported_on"] if document["chosen"] else 0
    assert len(asked) == 3 + 1 + document["tuned_on"] - 1 + reported
    assert f"on {document['tuned_on']} questions" in again.stdout
    chosen = document["chosen"]
    assert chosen, "half of the tokens and the small pass take 7.7 ms of 10, and are worth no less"
    plan = plan_from_file(out / "plan.toml").resolved(3)
    assert [(p.layer, p.score, p.keep) for p in plan.points] == [(1, "priority", chosen["keep"][0])]
    reported = document["reported"]
    assert reported["loss"] == pytest.approx(reported["baseline"]["accuracy"] - reported["chosen"]["accuracy"])
    lost = lost_by_hand(out, chosen["threshold"], data_from_file(data))
    assert lost.std(), "choose answers of which some are lost or won"
    assert reported["loss"] == pytest.approx(lost.mean())
    assert reported["loss_standard_error"] == pytest.approx(lost.std() / len(lost) ** 0.5)
    assert saccade_cli(*ask[:5], "--keep", "0.3", *COMMON).code == 2, "the journal is of other shares"


@pytest.mark.usefixtures("steady")
def test_another_layer_is_another_export(
    saccade_cli: Cli, tiny_bundle: Path, tiny_pair: TinyPair, tmp_path: Path, truths: list[str]
) -> None:
    data, out = data_of(tmp_path, truths), tmp_path / "out"
    told = saccade_cli(
        "tune", tiny_bundle, data, "-o", out, "--keep", "0.25", *COMMON, "--checkpoint", tiny_pair.checkpoints["large"],
        "--layer", "1,2", "--json",
    )  # fmt: skip
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    assert (document["layers"], document["layers_walked"]) == ([1, 2], True)
    check_choice(document, by_hand(out, ["layer-1", "layer-2"], data), 0.3)
    assert document["baseline_ms_median_by_layer"] == [10.0, 10.0], "each layer's search times the uncut model too"
    for layer in (1, 2):
        rows = [json.loads(line) for line in (out / f"layer-{layer}.jsonl").read_text().splitlines()[1:]]
        assert {row["large"]["0.25 sgl"]["retention"] for row in rows} == {(layer + (3 - layer) * 0.25) / 3}
    assert not list(out.glob(".*")), "the export is removed when it has been asked"
    assert told.stderr.count("exporting") == 2 + 2 * ((document["chosen"] or {}).get("layer") == 2)


def test_a_model_alone_has_no_threshold(
    saccade_cli: Cli, tiny_pair: TinyPair, tmp_path: Path, truths: list[str]
) -> None:
    from engines.bundles.build import build_bundle

    build_bundle([tiny_pair.exports["alone"]], tmp_path / "one")
    ask = ("tune", tmp_path / "one", data_of(tmp_path, truths), "-o", tmp_path / "out", "--keep", "0.3", *COMMON)
    told = saccade_cli(*ask, "--json")
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    assert {one["threshold"] for one in document["front"]} == {None}
    assert {one["exit_rate"] for one in document["front"]} == {None}


def asked(layer: int, keep: float, worth: list[int], ms: float, small: list[int] | None = None) -> Asked:
    n = len(worth)
    setting = Setting((keep,), None if keep == 1 else "sgl")
    known = (np.array(small, float), np.full(n, 1.0), np.linspace(0, 0.9, n)) if small else None
    return Asked(layer, setting, np.array(worth, float), np.full(n, ms), known, looks=keep < 1)


def test_the_large_model_alone_may_be_the_best_there_is() -> None:
    whole = asked(1, 1.0, [1, 1, 1, 1], 10.0, [0, 0, 0, 0])
    slow = asked(1, 0.5, [1, 1, 1, 1], 9.5, [0, 0, 0, 0])  # with the small pass it takes 10.5
    systems = systems_of([whole, slow])
    best = cheapest(systems, 1.0)
    assert best
    assert (best.layer, best.threshold, best.ms) == (None, None, 10.0)
    assert [one.ms for one in front_of(systems)] == sorted({one.ms for one in front_of(systems)})
    assert front_of(systems)[-1] == best
    assert cheapest(systems, 1.1) is None


STEADY = {"baseline_ms_median_by_layer": [10.0, 11.0]}


def test_times_of_a_machine_that_was_busy_are_doubted() -> None:
    busy = {"baseline_ms_median_by_layer": [12.0, 50.0, 14.0], "max_loss": 0.02, "reported": None}
    [doubt] = doubts(busy)
    assert "took 12.0 ms at one time and 50.0 at another" in doubt


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (0.05, 0.01, "more than the 2%"),
        (0.01, 0.01, "± 2.0%"),
        (0.0, 0.005, None),
        (0.0, 0.0, "up to 3.0% are lost; 149"),
        (None, 0, None),
    ],
)
def test_what_the_other_part_says_against_a_choice_is_said(loss: float | None, error: float, words: str | None) -> None:
    told = None if loss is None else {"loss": loss, "loss_standard_error": error}
    found = doubts({**STEADY, "reported": told, "max_loss": 0.02, "reported_on": 100})
    assert [words in doubt for doubt in found] == ([True] if words else [])  # type: ignore[operator]


def test_the_halves_are_drawn_by_digest(tmp_path: Path, truths: list[str]) -> None:
    data = data_from_file(data_of(tmp_path, truths))
    parts = [[e.digest for e in half.examples] for half in halves(data, 0)]
    assert sorted(parts[0] + parts[1]) == sorted(e.digest for e in data.examples)
    assert [len(part) for part in parts] == [QUESTIONS // 2] * 2
    turned = replace(data, examples=(*data.examples[::-1], *data.examples[:3]))
    assert [{e.digest for e in half.examples} for half in halves(turned, 0)] == [set(part) for part in parts]
    assert [e.digest for e in halves(data, 1)[0].examples] != parts[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-loss", 0.01), "too few for a loss of at most 0.01"),
        (("--max-loss", 0), "must be in (0, 1)"),
        (("--keep", "1"), "nothing to choose from"),
        (("--keep", "0.5:0.2"), "2 keep ratios"),
        (("--layer", "2"), "--checkpoint"),
        (("--layer", "7", "--checkpoint", "x"), "below the model's 3 layers"),
    ],
)
def test_refusals_ask_nothing(
    saccade_cli: Cli,
    tiny_bundle: Path,
    tmp_path: Path,
    truths: list[str],
    calls: list[Path],
    options: tuple[object, ...],
    words: str,
) -> None:
    told = saccade_cli("tune", tiny_bundle, data_of(tmp_path, truths), "-o", tmp_path / "out", *COMMON, *options)
    assert (told.code, told.stdout) == (2, "")
    assert words in told.stderr
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_data_without_answers_is_refused(saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    told = saccade_cli("tune", tiny_bundle, data_of(tmp_path, None), "-o", tmp_path / "out")
    assert (told.code, "has no answers" in told.stderr) == (2, True)


def test_plans_whose_layers_cannot_be_walked(tiny_pair: TinyPair, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tiny_pair.exports["large"]
    spec = spec_from_folder(folder)
    points = tuple(PrunePoint(layer=i, score="priority", keep=0.5) for i in (1, 2))
    twice = spec.model_copy(update={"plan": PruningPlan(name="twice", points=points)})
    manifest = manifest_of(tiny_bundle)

    def walk(cascade: Cascade, of: Manifest = manifest) -> list[int | None]:
        return layers.layers_to_walk(cascade, of, tmp_path, ())

    with pytest.raises(UsageError, match="2 prune points"):
        walk(Cascade(None, Model(folder, twice)))
    with pytest.raises(UsageError, match="runs engines"):
        walk(Cascade(None, Model(folder, spec, "rtx")))
    for told, changed in (("int8", {"precision": "int8"}), ("bf16", {"dtype": "bfloat16"})):
        large = manifest.members["large"]
        entry = large.targets["cpu"].model_copy(update=changed)
        large = large.model_copy(update={"targets": {"cpu": entry}})
        with pytest.raises(UsageError, match=f"--precision {told}"):
            walk(tiny_pair.cascade(), manifest.model_copy(update={"members": {**manifest.members, "large": large}}))
    assert walk(tiny_pair.cascade()) == [0, 1]
    assert walk(Cascade(None, tiny_pair.model("alone"))) == [1]


@pytest.mark.usefixtures("steady")
def test_a_plan_of_a_search_that_allowed_more_goes(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpruned(systems: list[System], accuracy: float) -> System:
        return next(one for one in systems if one.policy is None and one.threshold is None)

    monkeypatch.setattr(search, "cheapest", unpruned)
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.toml").write_text("of a looser bound")
    data = data_of(tmp_path, truths)
    told = saccade_cli("tune", tiny_bundle, data, "-o", out, "--keep", "0.5", *COMMON, "--json")
    assert told.code == 0, told.stderr
    assert json.loads(told.stdout)["chosen"] is None
    assert not (out / "plan.toml").exists()


def test_what_is_pruned_elsewhere_than_before_one_layer_is_told() -> None:
    one = {"policy": "star", "layer": None, "keep": [0.5, 0.2], "threshold": None}
    assert _said(one) == "pruned where the plan says, keep 0.5:0.2, nothing exits"
    assert _said({**one, "policy": "sgl", "layer": 2}).startswith("cut before layer 2, ")
    assert _said({**one, "policy": None}).startswith("nothing is pruned, ")


def test_another_checkpoint_is_refused(tiny_pair: TinyPair, tiny_bundle: Path, tmp_path: Path) -> None:
    manifest, own = manifest_of(tiny_bundle), spec_from_folder(tiny_pair.exports["large"])
    layers.refuse_another(Path("x"), tiny_pair.exports["large"], own, own, manifest)
    other = spec_from_folder(tiny_pair.exports["small"])
    with pytest.raises(BadArtefact, match="language differ"):
        layers.refuse_another(
            Path("x"), tiny_pair.exports["small"], other.model_copy(update={"role": "large"}), own, manifest
        )
    trained_on = tmp_path / "large"
    shutil.copytree(tiny_pair.exports["large"], trained_on)
    weights = trained_on / own.weights[0].name
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadArtefact, match=r"the weights model\.safetensors differ"):
        layers.refuse_another(Path("x"), trained_on, own, own, manifest)


@pytest.mark.parametrize(("code", "kind"), [(3, BadArtefact), (4, BackendMissing), (-9, SaccadeError)])
def test_what_ends_the_export_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[SaccadeError]
) -> None:
    script = f"import os, sys; sys.stderr.write('step\\nsaccade: it is so\\n'); sys.stderr.flush(); os._exit({code})"
    if code < 0:
        script = script.replace(f"os._exit({code})", "os.kill(os.getpid(), 9)")
    monkeypatch.setattr(layers, "EXPORT", ("-c", script))
    like: Any = SimpleNamespace(role="large", dtype="float32")
    plan: Any = SimpleNamespace(dumps=lambda: "")
    with pytest.raises(kind, match=r"^it is so$"):
        layers.export(tmp_path, tmp_path / "out", plan, like, tmp_path / "plan.toml")
