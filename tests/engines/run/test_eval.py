"""``saccade eval`` on the tiny pair: every figure against the public API, and a run that was interrupted."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from engines.bundles.manifest import manifest_of
from engines.cascade import Cascade
from engines.evaluation import sweep
from engines.evaluation.charts import Chart
from engines.evaluation.journal import appending, opened_journal
from engines.evaluation.sweep import from_bits
from engines.guidance import random_guidance
from graphs.atomic import locked
from graphs.errors import BadArtefact, UsageError
from tests.conftest import Outcome
from tests.engines.run.conftest import TinyPair, picture_of, question_of
from tests.engines.run.test_calibrate import data_of

Cli = Callable[..., Outcome]
QUESTIONS = 12
COMMON = ("--max-new-tokens", 2, "--threads", 1, "--json")


@pytest.fixture
def truths(tiny_bundle: Path) -> list[str]:
    """Right on even questions is what the large model says that sees everything."""
    cascade = Cascade.open(tiny_bundle, threads=1)
    said = [
        cascade.ask(picture_of(i), question_of(i), keep=1.0, threshold=1, max_new_tokens=2).text
        for i in range(QUESTIONS)
    ]
    return [text if i % 2 == 0 and text else "nothing" for i, text in enumerate(said)]


def test_every_figure_is_that_of_the_answers(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str]
) -> None:
    out = tmp_path / "out"
    told = saccade_cli(
        "eval", tiny_bundle, data_of(tmp_path, truths), "-o", out, "--keep", "1,0.25", "--policy", "sgl,random",
        "--threshold", "0,0.5,1", "--seed", 3, *COMMON,
    )  # fmt: skip
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    cascade = Cascade.open(tiny_bundle, threads=1)
    right: dict[tuple[Any, ...], list[bool]] = {}
    scores = []
    for i in range(QUESTIONS):
        looked = cascade.look(picture_of(i), question_of(i), max_new_tokens=2)
        scores.append(looked.confidence.score)
        right.setdefault(("small",), []).append(looked.text == truths[i])
        drawn = random_guidance(64, 3 + i)
        for key, keep, guidance in (
            ((1.0, None), 1.0, None),
            ((0.25, "sgl"), 0.25, None),
            ((0.25, "random"), 0.25, drawn),
        ):
            text = cascade.ask(
                picture_of(i), question_of(i), keep=keep, threshold=1, guidance=guidance, max_new_tokens=2
            ).text
            right.setdefault(("large", *key), []).append(text == truths[i])
    found = {}
    for system in document["systems"]:
        shares = (*system["keep"], system["policy"]) if system["keep"] else ()
        bar = (system["threshold"],) if system["system"] == "cascade" else ()
        found[system["system"], *shares, *bar] = system
    assert len(found) == 1 + 3 + 3 * 3
    for key, values in right.items():
        assert found[key]["accuracy"] == pytest.approx(np.mean(values)), key
        assert found[key]["questions"] == QUESTIONS
        if key[0] == "large":
            for bar in (0, 0.5, 1):
                exits = np.array(scores) > bar
                both = found["cascade", *key[1:], bar]
                assert both["accuracy"] == pytest.approx(np.where(exits, right["small",], values).mean())
                assert both["exit_rate"] == pytest.approx(exits.mean())
    assert found["large", 0.25, "sgl"]["average_retention"] == pytest.approx((1 + 2 * 0.25) / 3)
    stages = found["large", 0.25, "sgl"]["ms_by_stage"]
    assert {"small_prefill", "small_consistency", "large_vision", "large_decode"} <= set(stages)
    assert found["large", 0.25, "sgl"]["ms_per_question"] == pytest.approx(sum(stages.values()), abs=0.02)
    assert not any(stage.startswith("small") for stage in found["large", 0.25, "random"]["ms_by_stage"])
    assert json.loads((out / "results.json").read_text()) == document
    with (out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == [s["accuracy"] for s in document["systems"]]
    assert {row["keep"] for row in table} == {"", "1", "0.25"}
    for row, system in zip(table, document["systems"], strict=True):
        assert float(row["kept_tokens"]) == system["kept_tokens"]
        spent = [
            float(value) for name, value in row.items() if name.startswith("ms_") and "question" not in name and value
        ]
        assert sum(spent) == pytest.approx(system["ms_per_question"], abs=0.02)
        counted = [v for name, v in row.items() if name.startswith("estimated_flops_") and "question" not in name and v]
        assert sum(map(float, counted)) == pytest.approx(system["estimated_flops_per_question"], abs=len(counted))


def test_an_interrupted_run_goes_on_where_it_ended(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("eval", tiny_bundle, data_of(tmp_path, truths), "-o", tmp_path / "out", "--keep", "0.5", *COMMON)
    real, asked = sweep.row_of, []

    def stops(*arguments: Any) -> Any:
        asked.append(arguments[3])
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweep, "row_of", stops)
    assert saccade_cli(*ask).code == 130
    journal = tmp_path / "out" / "answers.jsonl"
    assert not (tmp_path / "out" / "results.json").exists()
    with journal.open("a") as file:
        file.write('{"digest": "cut sho')
    told = saccade_cli(*ask)
    assert told.code == 0, told.stderr
    assert asked == [0, 0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 10, 11], "the first of each run is asked once before"
    assert len(journal.read_text().splitlines()) == 1 + QUESTIONS
    again = saccade_cli(*ask)
    assert len(asked) == 15
    assert json.loads(again.stdout) == json.loads(told.stdout)
    # Another threshold chooses among answers that are there; another keep ratio needs new ones.
    assert saccade_cli(*ask, "--threshold", "0.1,0.2").code == 0
    assert len(asked) == 15
    other = saccade_cli(*ask[:5], "--keep", "0.4", *COMMON)
    assert (other.code, "for another bundle, data or settings" in other.stderr) == (2, True)
    slower = saccade_cli(*ask[:-2], 2, "--json")
    assert (slower.code, "for another bundle, data or settings" in slower.stderr) == (2, True), "times would be mixed"
    journal.write_text("{\n")
    assert saccade_cli(*ask).code == 3


def test_a_journal_that_two_runs_wrote_to_is_refused(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str]
) -> None:
    ask = ("eval", tiny_bundle, data_of(tmp_path, truths), "-o", tmp_path / "out", "--keep", "0.5", *COMMON)
    assert saccade_cli(*ask).code == 0
    journal = tmp_path / "out" / "answers.jsonl"
    first, *rows = journal.read_text().splitlines(keepends=True)
    for bad, line in (
        ([rows[0], *rows], 3),
        ([rows[1], rows[0], *rows[2:]], 2),
        (["7\n", *rows[1:]], 2),
        ([*rows, rows[0]], QUESTIONS + 2),
    ):
        journal.write_text("".join([first, *bad]))
        told = saccade_cli(*ask)
        assert (told.code, f"line {line}, is not the answer to question {line - 1}" in told.stderr) == (3, True)
    journal.write_text(first[: len(first) // 2])
    assert saccade_cli(*ask).code == 0, "a journal without its whole first line is a new one"
    with locked(journal):
        journal.write_text("".join([first, *rows[:3]]))
        told = saccade_cli(*ask)
    assert (told.code, "another run writes to" in told.stderr) == (2, True)


def test_a_row_without_both_models_and_rows_that_came_meanwhile_are_refused(tmp_path: Path) -> None:
    path, header = tmp_path / "out" / "answers.jsonl", {"data": "d"}
    examples: Any = [SimpleNamespace(digest=digest) for digest in "ab"]
    assert opened_journal(path, header, examples) == []
    rows = [{"digest": digest, "small": {}, "large": {}} for digest in "ab"]
    with appending(path, 0) as add:
        for row in rows:
            add(row)
            assert opened_journal(path, header, examples)[-1] == row, "on disk when the call returns"
    with appending(path, 2):
        pass
    for done in (0, 1, 3):
        with pytest.raises(UsageError, match=r"wrote to .* meanwhile"), appending(path, done):
            pass
    with locked(path):
        pass
    path.write_text(path.read_text().replace('"small": {}, "large": {}', '"small": {}', 1))
    with pytest.raises(BadArtefact, match="line 2, is not the answer to question 1"):
        opened_journal(path, header, examples)


def test_a_question_that_cannot_be_asked_is_named_and_can_be_left_out(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str]
) -> None:
    data = data_of(tmp_path, truths)
    lines = data.read_text().splitlines()
    odd = [json.dumps(json.loads(lines[0]) | {"question": text}) for text in ("<image> red ?", "red ? " * 300)]
    data.write_text("\n".join([odd[0], *lines[:6], odd[1], *lines[6:]]))
    ask = ("eval", tiny_bundle, data, "-o", tmp_path / "out", "--keep", "0.5", *COMMON)
    told = saccade_cli(*ask)
    assert (told.code, told.stdout) == (3, "")
    assert f"{data}, line 1: the question holds '<image>'" in told.stderr
    assert "--skip-bad goes on" in told.stderr
    told = saccade_cli(*ask, "--skip-bad")
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    assert len(document["bad"]) == 2
    assert f"{data}, line 8: the prompt is" in document["bad"][1]
    assert {system["questions"] for system in document["systems"]} == {QUESTIONS}
    assert saccade_cli(*ask).code == 3, "what was left out before ends a run that leaves nothing out"
    promise = ("--max-loss", 0.5, "--confidence", 0.5, "--skip-bad", "--max-new-tokens", 2, "--json")
    bundle = shutil.copytree(tiny_bundle, tmp_path / "own.bundle")
    found = json.loads(saccade_cli("calibrate", bundle, data, *promise).stdout)
    assert (found["calibration"]["questions"], len(found["bad"])) == (QUESTIONS, 2)


def test_nothing_is_written_among_things_that_are_none_of_ours(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str]
) -> None:
    data, out = data_of(tmp_path, truths), tmp_path / "mine"
    out.mkdir()
    (out / "report.html").write_text("mine")
    for verb in (("eval",), ("tune", "--max-loss", 0.5)):
        for place, words in ((out, "saccade did not write it"), (out / "report.html", "is not a folder")):
            told = saccade_cli(verb[0], tiny_bundle, data, "-o", place, *verb[1:])
            assert (told.code, words in told.stderr) == (2, True), told.stderr
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "mine"


def test_what_was_calibrated_since_is_evaluated_and_the_answers_stay(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "own.bundle"
    shutil.copytree(tiny_bundle, bundle)
    data = data_of(tmp_path, truths)
    ask = ("eval", bundle, data, "-o", tmp_path / "out", "--keep", "0.5", *COMMON)
    before = json.loads(saccade_cli(*ask).stdout)
    promise = ("--max-loss", 0.9, "--confidence", 0.5, "--keep", 0.5, "--max-new-tokens", 2)
    found = json.loads(saccade_cli("calibrate", bundle, data, *promise, "--json").stdout)["calibration"]["threshold"]
    monkeypatch.setattr(sweep, "row_of", lambda *_: pytest.fail("a question was asked"))
    told = saccade_cli(*ask)
    assert told.code == 0, told.stderr
    bars = [
        [s["threshold"] for s in document["systems"] if s["system"] == "cascade"]
        for document in (before, json.loads(told.stdout))
    ]
    assert bars == [[manifest_of(bundle).threshold], [found]]
    assert bars[0] != bars[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "fastv"), "can be run with sgl and random; make one and give it beside these: saccade export"),
        (("--policy", "fastv"), "--role large --policy fastv, then saccade build SMALL LARGE"),
        (("--policy", "none such"), "--plan FILE"),
        (("--layer", "2"), "before layer 2, these do before layer 1; make one"),
        (("--layer", "99"), "this model has 3 layers, and the first must see everything; give layers from 1 to 2"),
        (("--seed", "-1"), "-1 is not in the range"),
        (("--layer", "2"), "--policy sgl --layer-fraction 0.8333"),
        (("--layer", "first"), "is neither a layer"),
        (("--keep", "2"), "(0, 1]"),
        (("--keep", "0.5:0.2"), "2 keep ratios"),
        (("--keep", "half"), "is neither a number"),
        (("--threshold", "1.5"), "range"),
    ],
)
def test_refusals_ask_nothing(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, calls: list[Path], options: tuple[str, ...], words: str
) -> None:
    data = data_of(tmp_path, ["nothing"] * QUESTIONS)
    told = saccade_cli("eval", tiny_bundle, data, "-o", tmp_path / "out", *options, *COMMON)
    assert (told.code, told.stdout) == (2, "")
    assert words in told.stderr
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_data_without_answers_is_refused(saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    told = saccade_cli("eval", tiny_bundle, data_of(tmp_path, None), "-o", tmp_path / "out")
    assert told.code == 2
    assert "has no answers" in told.stderr


def test_a_model_alone_and_its_own_pruning(
    saccade_cli: Cli, tiny_pair: TinyPair, tmp_path: Path, truths: list[str]
) -> None:
    from engines.bundles.build import build_bundle

    build_bundle([tiny_pair.exports["alone"]], tmp_path / "one")
    ask = ("eval", tmp_path / "one", data_of(tmp_path, truths), "-o", tmp_path / "out", *COMMON)
    told = saccade_cli(*ask, "--keep", "1,0.25")
    assert told.code == 0, told.stderr
    cascade = Cascade.open(tmp_path / "one", threads=1)
    for system, keep in zip(json.loads(told.stdout)["systems"], (1.0, 0.25), strict=True):
        said = [cascade.ask(picture_of(i), question_of(i), keep=keep, max_new_tokens=2).text for i in range(QUESTIONS)]
        assert (system["system"], system["keep"]) == ("alone", [keep])
        assert system["accuracy"] == pytest.approx(np.mean([s == t for s, t in zip(said, truths, strict=True)]))
    refused = saccade_cli(*ask, "--threshold", "0.5")
    assert (refused.code, "one model" in refused.stderr) == (2, True)


def test_settings_of_the_vision_stage_do_not_meet_in_the_cache(
    saccade_cli: Cli, tiny_pair: TinyPair, tmp_path: Path, truths: list[str]
) -> None:
    from engines.bundles.build import build_bundle
    from exporter.export import export_checkpoint

    large = tmp_path / "large"
    export_checkpoint(tiny_pair.checkpoints["large"], large, policy="divprune+sgl", role="large")
    build_bundle([tiny_pair.exports["small"], large], tmp_path / "pair")
    out = tmp_path / "out"
    told = saccade_cli(
        "eval", tmp_path / "pair", data_of(tmp_path, truths), "-o", out, "--keep", "0.5:0.1,1:1,0.25:0.25", *COMMON
    )
    assert told.code == 0, told.stderr
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()[1:]]
    cascade = Cascade.open(tmp_path / "pair", threads=1)
    for i, row in enumerate(rows):
        for keep, (name, answer) in zip(((0.5, 0.1), (1, 1), (0.25, 0.25)), row["large"].items(), strict=True):
            alone = cascade.ask(picture_of(i), question_of(i), keep=keep, threshold=1, max_new_tokens=2)
            assert (answer["text"], answer["retention"]) == (alone.text, alone.average_retention), name


@pytest.fixture(scope="module")
def fastv_bundle(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engines.bundles.build import build_bundle
    from exporter.export import export_checkpoint

    home = tmp_path_factory.mktemp("fastv")
    export_checkpoint(tiny_pair.checkpoints["large"], home / "large", policy="fastv", role="large")
    build_bundle([tiny_pair.exports["small"], home / "large"], home / "fastv.bundle")
    return home / "fastv.bundle"


def test_several_bundles_share_what_is_the_same(
    saccade_cli: Cli, tiny_bundle: Path, fastv_bundle: Path, tmp_path: Path, truths: list[str], calls: list[Path]
) -> None:
    out = tmp_path / "out"
    ask = ("eval", tiny_bundle, fastv_bundle, data_of(tmp_path, truths), "-o", out, "--threshold", 0.5, *COMMON)
    told = saccade_cli(*ask, "--keep", "1,0.25")
    assert told.code == 0, told.stderr
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()[1:]]
    assert all(list(row["small"]) == ["0"] for row in rows)
    assert all(list(row["large"]) == ["1", "0.25 sgl", "0.25 fastv #2"] for row in rows)
    assert not [path for path in calls if path.is_relative_to(fastv_bundle / "small")]
    cascade = Cascade.open(fastv_bundle, threads=1)
    for i, row in enumerate(rows):
        alone = cascade.ask(picture_of(i), question_of(i), keep=0.25, threshold=1, max_new_tokens=2)
        answer = row["large"]["0.25 fastv #2"]
        assert (answer["text"], answer["retention"]) == (alone.text, alone.average_retention)
        assert alone.kept is not None
        assert from_bits(answer["kept"], answer["visual_tokens"]).tolist() == alone.kept[-1].tolist()
    systems = {(s["system"], s["policy"], Path(s["bundle"]).name): s for s in json.loads(told.stdout)["systems"]}
    guided, by_itself = (systems["large", p, b] for p, b in (("sgl", tiny_bundle.name), ("fastv", fastv_bundle.name)))
    assert (guided["layers"], by_itself["layers"]) == ([1], [2])
    assert "small_prefill" in guided["estimated_flops_by_stage"]
    assert "small_prefill" not in by_itself["estimated_flops_by_stage"]
    vision = guided["estimated_flops_by_stage"]["large_vision"]
    assert vision == by_itself["estimated_flops_by_stage"]["large_vision"] > 0
    twice = saccade_cli("eval", tiny_bundle, tiny_bundle, ask[3], "-o", out)
    assert (twice.code, "the same bundle as" in twice.stderr) == (2, True)
    refused = saccade_cli(*ask, "--keep", "0.25", "--policy", "random", "--layer", "2")
    assert (refused.code, "by these policies" in refused.stderr) == (2, True)


def test_the_page_is_whole_escaped_and_holds_the_numbers(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str]
) -> None:
    out, odd = tmp_path / "out", "<script>alert(1)</script> & <b>"
    data = data_of(tmp_path, [odd if i == 0 else text for i, text in enumerate(truths)])
    data.write_text(data.read_text() + '\n{"image": "<i>gone.png", "question": "?", "answer": "x"}')
    told = saccade_cli(
        "eval", tiny_bundle, data, "-o", out, "--keep", "1,0.5,0.25", "--policy", "sgl,random", "--skip-bad",
        "--threshold", "0.5", *COMMON,
    )  # fmt: skip
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    text = (out / "report.html").read_text("utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))  # noqa: S314 (our own page)
    assert "http" not in text
    assert {tag.tag for tag in page.iter()} & {"script", "link", "iframe", "i"} == set()
    assert all(
        v.startswith(("data:image/jpeg;base64,", "#"))
        for t in page.iter()
        for k, v in t.items()
        if k in ("src", "href")
    )
    assert [li.text for li in page.iter("li")] == document["bad"]
    assert "gone.png" in document["bad"][0]
    assert "estimated" in text

    charts = {section[0].text: section for section in page.iter("section")}
    circles = [{k: c.get(k) for k in ("data-x", "data-y")} for c in charts["Accuracy over retention"].iter("circle")]
    shown = {(float(c["data-x"]), float(c["data-y"])) for c in circles if c["data-x"]}  # type: ignore[arg-type]
    wanted = {
        (1.0 if s["average_retention"] is None else s["average_retention"], s["accuracy"])
        for s in document["systems"]
        if s["system"] != "cascade"
    }
    assert shown == wanted
    left, right = Chart.left, Chart.right
    for circle in charts["Accuracy over retention"].iter("circle"):
        if circle.get("data-x"):
            assert float(circle.get("cx", 0)) == pytest.approx(
                left + float(circle.get("data-x", 0)) * (right - left), abs=0.01
            )
    reliability = next(section for title, section in charts.items() if title and title.startswith("Reliability"))
    bins = [b for b in document["reliability"][0]["bins"] if b["questions"]]
    assert [float(c.get("data-y", -1)) for c in reliability.iter("circle")] == [b["accuracy"] for b in bins]
    assert f"{document['reliability'][0]['expected_calibration_error']:.3f}" in (reliability[-1].text or "")
    assert "Accuracy over threshold" in charts
    assert "Ms a question over threshold" in charts

    figures = list(page.iter("figure"))
    assert len(figures) == 6
    assert all(len(list(figure.iter("img"))) == 1 for figure in figures)
    picture = base64.b64decode(next(figures[0].iter("img")).get("src", "").partition(",")[2])
    assert min(Image.open(io.BytesIO(picture)).size) >= 480
