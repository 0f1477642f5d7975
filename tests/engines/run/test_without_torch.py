from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.cascade import Cascade

QUESTION = "what colour is the 3 ?"

ASK = """
import sys, saccade
code = saccade.run(sys.argv[1:])
assert not {"torch", "onnxscript", "exporter"} & set(sys.modules), "something imported torch"
sys.exit(code)
"""


def test_a_python_without_torch_gives_the_same_answer(
    torchless_python: Path, tiny_bundle: Path, image_file: Path
) -> None:
    told = subprocess.run(
        [torchless_python, "-c", ASK, "run", tiny_bundle, "--image", image_file, QUESTION, "--json", "--threshold=1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=image_file.parent,
    )
    assert (told.returncode, told.stderr) == (0, "")
    document = json.loads(told.stdout)
    answer = Cascade.open(tiny_bundle).ask(image_file, QUESTION, threshold=1).document()
    same = ("answer", "tokens", "kept", "model", "prompt_tokens", "average_retention")
    assert {key: document[key] for key in same} == {key: answer[key] for key in same}


def test_a_python_without_torch_calibrates_and_evaluates(
    torchless_python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "pair.bundle")
    common = ["glyphs", "--questions", "8", "--max-new-tokens", "2", "--threads", "1"]
    for verb in (["calibrate", bundle, *common, "--max-loss", "0.3", "--confidence", "0.8"],
                 ["eval", bundle, *common, "-o", tmp_path / "out", "--policy", "sgl,random"]):  # fmt: skip
        told = subprocess.run(
            [torchless_python, "-c", ASK, *verb], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert told.returncode == 0, told.stderr
    assert (tmp_path / "out" / "results.csv").exists()


MAIN = """
import sys, saccade
try:
    saccade.main()
finally:
    loaded = {name for name, module in sys.modules.items() if module is not None}
    unused = {"torch", "onnxscript", "scipy", "sklearn", "triton", "tensorrt_rtx", "openvino", "rich", "exporter",
              "glyphs", "plugins"}
    print("LOADED", *sorted(unused & loaded), file=sys.stderr)
"""


def test_run_imports_nothing_that_it_does_not_use(tiny_bundle: Path, image_file: Path) -> None:
    """In this very Python, where torch and the others are installed."""
    told = subprocess.run(
        [sys.executable, "-c", MAIN, "run", tiny_bundle, "--image", image_file, QUESTION, "--max-new-tokens", "2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr.splitlines()[-1].split() == ["LOADED"]


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("chat", ()),
        ("calibrate", ("glyphs", "--questions", "8", "--max-loss", "0.3", "--confidence", "0.8")),
        ("eval", ("glyphs", "--questions", "4", "-o", "out")),
        ("tune", ("glyphs", "--questions", "8", "-o", "out", "--max-loss", "0.5", "--keep", "0.5")),
    ],
)
def test_no_verb_that_is_timed_imports_torch(
    tiny_bundle: Path, tmp_path: Path, verb: str, options: tuple[str, ...]
) -> None:
    """In this very Python, where torch is installed; a torch there would be timed too."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "pair.bundle")
    told = subprocess.run(
        [sys.executable, "-c", MAIN, verb, bundle, *options, "--max-new-tokens", "2", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        input="what ?\n",
    )
    assert told.returncode == 0, told.stderr
    assert not {"torch", "onnxscript", "exporter"} & set(told.stderr.splitlines()[-1].split())


def test_verbs_that_need_no_torch_run_where_it_is_hidden(tiny_bundle: Path, tmp_path: Path) -> None:
    """As the console script runs them: what imports torch on the way fails there, and in no test of this process."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "pair.bundle")
    for arguments in (
        ("check", bundle / "small"),
        ("build", bundle, "-o", "narrow.bundle", "--precision", "int8"),
        ("lower", bundle / "large", "-o", "lowered", "--parser", "10.3"),
        ("verify", bundle),
        ("pack", bundle, "-o", "pair.saccade"),
        ("unpack", "pair.saccade", "-o", "unpacked"),
        *(("show", *what) for what in ((bundle,), ("families",), ("policies",), ("formats",), ("ops",), ("machine",))),
    ):
        told = subprocess.run(
            [sys.executable, "-c", MAIN, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )
        assert told.returncode == 0, (arguments, told.stderr)
        assert "torch" not in told.stderr.splitlines()[-1].split()
