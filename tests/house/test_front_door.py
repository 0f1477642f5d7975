"""The command line as a whole: cheap help, verbs found by their table, every failure one sentence and a code."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

import saccade
from graphs.versions import pins
from tests.conftest import Outcome

Cli = Callable[..., Outcome]

HEAVY = {"numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich", "torch", "transformers", "PIL"}


@pytest.fixture
def fail(saccade_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Outcome]:
    monkeypatch.delenv("SACCADE_TRACEBACK", raising=False)
    monkeypatch.setitem(saccade.VERBS, "fail", saccade.Verb("tests.house.verbs:fail", "Fail as asked."))
    return lambda how: saccade_cli("fail", how)


@pytest.mark.parametrize(
    ("how", "code", "sentence"),
    [
        ("operation", 1, "the engine gave up"),
        ("usage", 2, "keep is 2, it lies in (0, 1]"),
        ("artefact", 3, "a.bundle is truncated"),
        ("backend", 4, "no CUDA device"),
        ("disk-full", 1, "the disk is full: out/decoder.onnx; make room and run the same command again"),
        ("forbidden", 1, "the system refused: Permission denied: out"),
        ("surprise", 1, "unexpected ZeroDivisionError: division by zero (SACCADE_TRACEBACK=1 shows where)"),
        ("no-torch", 4, "torch is not installed in this Python: run pip install 'saccade[export]'"),
    ],
)
def test_a_failure_is_one_sentence_and_its_code(
    fail: Callable[[str], Outcome], how: str, code: int, sentence: str
) -> None:
    assert fail(how) == Outcome(code, "", f"saccade: {sentence}\n")


def test_an_interrupt_is_130(fail: Callable[[str], Outcome]) -> None:
    got = fail("interrupt")
    assert (got.code, got.stdout, got.stderr.strip()) == (130, "", "saccade: interrupted")


def test_a_missing_room_is_our_mistake_not_a_missing_extra(fail: Callable[[str], Outcome]) -> None:
    got = fail("no-room")
    assert got.code == 1
    assert "unexpected ModuleNotFoundError" in got.stderr


def test_a_verb_may_choose_its_exit_code(fail: Callable[[str], Outcome]) -> None:
    assert fail("exit-3").code == 3
    assert fail("none") == Outcome(0, "done\n", "")


def test_the_trace_is_shown_when_asked_for(fail: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_TRACEBACK", "1")
    assert "Traceback" in fail("surprise").stderr


def test_an_unknown_verb_names_its_neighbours(saccade_cli: Cli) -> None:
    got = saccade_cli("exprot")
    assert (got.code, got.stdout) == (2, "")
    assert "no verb 'exprot'; did you mean export?" in got.stderr


def test_version(saccade_cli: Cli) -> None:
    assert saccade_cli("--version") == Outcome(0, f"saccade {saccade.__version__}\n", "")


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = "import sys, saccade; c = saccade.run(['--help']); print(*sys.modules, file=sys.stderr); sys.exit(c)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [verb for verb in saccade.VERBS if f"  {verb} " not in got.stdout] == []
    assert {name.partition(".")[0] for name in got.stderr.split()} & HEAVY == set()


def test_help_takes_under_150_ms_of_processor_time() -> None:
    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "saccade", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(5)) < 0.15


@pytest.mark.parametrize("verb", saccade.VERBS)
def test_a_verb_is_where_the_table_says_and_does_what_it_says(verb: str) -> None:
    command = saccade.cli.get_command(click.Context(saccade.cli), verb)
    assert command is not None
    assert command.name == verb
    assert (command.help or "").split()[0] == saccade.VERBS[verb].line.split()[0]


@pytest.mark.parametrize("name", saccade.PUBLIC)
def test_a_public_name_is_where_the_table_says(name: str) -> None:
    assert getattr(saccade, name) is not None
    assert name in dir(saccade)


def test_all_and_the_table_agree() -> None:
    assert set(saccade.__all__) == {*saccade.PUBLIC, "main"}


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = saccade.nothing


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        got = subprocess.run(
            [sys.executable, "-m", "saccade", "--help"], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert got.stderr == b""


def test_every_extra_is_in_the_installed_metadata() -> None:
    assert {extra for _, extra in pins().values()} >= {
        None,
        "export",
        "cpu",
        "gpu",
        "rtx",
        "tensorrt",
        "openvino",
        "dev",
    }


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-"])
def test_a_closed_stream_ends_nothing(closed: str) -> None:
    """As a daemon's are."""
    code = (
        "import sys, saccade; from graphs.console import step;"
        "saccade.run = lambda: [step('work').__enter__().advance(), sys.stdin.isatty(), print('said')] and 7;"
        "saccade.main()"
    )
    got = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], timeout=60, check=False
    )
    assert got.returncode == 7
