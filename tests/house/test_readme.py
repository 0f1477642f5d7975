"""What README says is run: its commands in their order, its Python, its tables and its links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from graphs import errors
from tests.house.imports import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAIR = ROOT / "glyphs" / "pair"

# The checkpoints README names, played by the shipped pair, and the photograph by one of its pictures.
PHOTOS = ("photo.jpg", "one.jpg", "two.jpg")
STAND_INS = {"llava-1.5-7b-hf": PAIR / "small", "llava-1.5-13b-hf": PAIR / "large"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Return the lines after a `$ ` prompt, continued over trailing backslashes."""
    text = "".join(blocks("console")).replace("\\\n", " ")
    return [" ".join(line[2:].split()) for line in text.splitlines() if line.startswith("$ ")]


def starting_with(word: str) -> list[str]:
    return [command for command in commands() if command.split()[0] == word]


@pytest.mark.slow
def test_the_commands_and_the_python_of_readme_run(tmp_path: Path) -> None:
    from PIL import Image

    for name, checkpoint in STAND_INS.items():
        shutil.copytree(checkpoint, tmp_path / name)
    for photo in PHOTOS:
        Image.radial_gradient("L").convert("RGB").save(tmp_path / photo)
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = "set -e\n" + "\n".join(c for c in starting_with("saccade") if c != "saccade demo")
    for arguments in (["bash", "-c", script], [sys.executable, "-c", "\n".join(blocks("python"))]):
        got = subprocess.run(
            arguments,
            cwd=tmp_path,
            env={**os.environ, "PATH": scripts},
            input="how many digits ?\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert got.returncode == 0, got.stderr


def test_readme_shows_the_way_from_checkpoint_to_answer() -> None:
    verbs = [command.split()[1] for command in starting_with("saccade")]
    assert [verb for verb in ("export", "build", "run") if verb not in verbs] == []


def test_the_checkpoints_of_readme_have_stand_ins() -> None:
    named = {command.split()[2] for command in starting_with("saccade") if command.split()[1] == "export"}
    assert named == set(STAND_INS)


def test_the_plans_of_readme_are_plans() -> None:
    from graphs.plan_file import plan_from_toml

    assert blocks("toml")
    for text in blocks("toml"):
        assert plan_from_toml(text).resolved(32).points


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = {target for command in starting_with("make") for target in command.split()[1:]}
    assert wanted == {"demo", "test"}
    assert [target for target in wanted if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_extras_of_readme_exist() -> None:
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {name for group in re.findall(r"(?:saccade|\.)\[([\w,]+)\]", README) for name in group.split(",")}
    assert named - known == set()


def test_the_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert documented == raised | {0, 130}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere_and_no_path_is_of_one_machine(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    assert [t for t in targets if not (ROOT / t).exists()] == []
    assert re.findall(r"/(?:work|root|home|tmp)/\S*", text) == []
