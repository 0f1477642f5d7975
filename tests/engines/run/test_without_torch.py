from __future__ import annotations

import json
import subprocess
from pathlib import Path

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
