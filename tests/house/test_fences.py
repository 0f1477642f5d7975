"""Who may import whom: the rooms among themselves, and each third-party library in its place."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.house.imports import ROOMS, Import, imports_of_source, imports_of_tree

OURS = {*ROOMS, "saccade", "tests"}

MAY_IMPORT = {
    "graphs": set(),
    "exporter": {"graphs"},
    "plugins": {"graphs"},
    "engines": {"graphs", "plugins"},
    "glyphs": {"graphs"},
    "saccade": set(ROOMS),
}

# A single file that may do more than its room, and why.
EXCEPTIONS = {
    ("glyphs/demo.py", "saccade"): "the demo is a user of the public API",
    ("glyphs/threshold.py", "saccade"): "it asks a bundle as a user would",
    ("glyphs/findings/check.py", "saccade"): "it holds the findings to what a user gets",
}

# What is no model class: processors, tokenizers, configurations and the helpers around them.
TRANSFORMERS_DATA_SIDE = re.compile(
    r"transformers\.("
    r"(models\.\w+\.)?(image_processing|processing|tokenization|configuration|image_utils|image_transforms)\w*(\.\w+)*"
    r"|utils(\.\w+)*|__version__"
    r"|\w*(Processor|ProcessorPil|ProcessorFast|Tokenizer|TokenizerFast|TokenizerBase|Config))"
)
HF_TRAINING = re.compile(r"glyphs/((train|tower|evaluate|checkpoint|packed)\w*|findings/models)\.py")
TORCH_HALF_OF_GRAPHS = re.compile(r"graphs/(ops/\w+|\w+_torch)\.py")


def transformers_fence(found: Import) -> bool:
    """Model classes live in the exporter, and in the scripts that train the shipped pair."""
    return bool(
        found.room == "exporter"
        or HF_TRAINING.fullmatch(found.file)
        or TRANSFORMERS_DATA_SIDE.fullmatch(found.name)
        or (found.name == "transformers" and found.lazily)
    )


def torch_fence(found: Import) -> bool:
    """engines and the front door never; graphs in the torch half of an op, inside functions only."""
    if found.for_types_only and found.room != "engines":
        return True
    if found.room == "graphs":
        return bool(TORCH_HALF_OF_GRAPHS.fullmatch(found.file)) and (found.lazily or found.file.endswith("_torch.py"))
    if found.room == "plugins":
        return found.file == "plugins/kernels/launch_torch.py"  # what runs an engine has no torch
    if found.file in {"glyphs/demo.py", "glyphs/systems.py", "glyphs/threshold.py"}:
        return False  # the reference in torch is saccade.Reference
    return found.room in {"exporter", "glyphs"}


def triton_fence(found: Import) -> bool:
    """The kernels, and inside functions what compiles them: a machine that runs an engine has no Triton."""
    return found.file.startswith("plugins/kernels/") or (found.file == "plugins/cubins.py" and found.lazily)


FENCES: dict[str, Callable[[Import], bool]] = {
    "transformers": transformers_fence,
    "torch": torch_fence,
    "torchvision": lambda found: False,  # its pixels differ from PIL's (see the processors)
    "onnxscript": lambda found: found.room == "exporter",
    "onnxruntime": lambda found: found.room == "engines",
    "openvino": lambda found: found.room == "engines",
    "tensorrt": lambda found: found.room in {"plugins", "engines"},
    "tensorrt_rtx": lambda found: found.room in {"plugins", "engines"},
    "triton": triton_fence,
    "cuda": lambda found: found.room in {"plugins", "engines"} and found.lazily,
}


def breaches(imports: list[Import]) -> list[str]:
    """Return the imports that cross a fence."""
    return [str(found) for found in imports if not allowed(found)]


def allowed(found: Import) -> bool:
    """Decide one import."""
    if found.top in OURS:
        return found.top == found.room or found.top in MAY_IMPORT[found.room] or (found.file, found.top) in EXCEPTIONS
    return FENCES[found.top](found) if found.top in FENCES else True


def test_nothing_in_the_tree_crosses_a_fence() -> None:
    imports = imports_of_tree()
    assert len(imports) > 20, "the reader of imports found next to nothing"
    assert breaches(imports) == []


def test_the_front_door_loads_the_rooms_lazily() -> None:
    eager = [f for f in imports_of_tree() if f.room == "saccade" and f.top in OURS and not f.lazily]
    assert eager == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("graphs/plan.py", "import exporter"),
        ("graphs/plan.py", "def f():\n    from engines import bundle"),
        ("graphs/plan.py", "import torch"),
        ("graphs/plan.py", "def f():\n    import torch"),
        ("graphs/ops/keep.py", "import torch"),
        ("exporter/a.py", "from engines.bundles.bundle import open_bundle"),
        ("exporter/a.py", "import onnxruntime"),
        ("engines/a.py", "from exporter import families"),
        ("engines/a.py", "import importlib\nimportlib.import_module('exporter.families')"),
        ("engines/a.py", "def f():\n    import torch"),
        ("engines/a.py", "from transformers import LlavaForConditionalGeneration"),
        ("engines/a.py", "from transformers.models.llava.modeling_llava import LlavaModel"),
        ("engines/a.py", "import transformers"),
        ("engines/a.py", "def f():\n    import transformers\n    transformers.AutoModel.from_pretrained('.')"),
        ("engines/a.py", "def f():\n    from . import x\n    import triton"),
        ("plugins/a.py", "from engines import build"),
        ("plugins/a.py", "def f():\n    import torch"),
        ("plugins/creator.py", "import triton"),
        ("plugins/cubins.py", "import triton"),
        ("plugins/launch.py", "from cuda.bindings import driver"),
        ("plugins/a.py", "import onnxruntime as ort"),
        ("glyphs/data.py", "import saccade"),
        ("glyphs/data.py", "from transformers import LlavaForConditionalGeneration"),
        ("glyphs/demo.py", "from exporter.export import export_checkpoint"),
        ("glyphs/demo.py", "import torch"),
    ],
)
def test_a_breach_is_found(file: str, line: str) -> None:
    assert breaches(imports_of_source(line, file))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("graphs/ops/keep.py", "def define():\n    import torch"),
        ("graphs/ops/keep.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("exporter/a.py", "import torch\nfrom graphs.plan import PruningPlan"),
        ("engines/a.py", "from transformers import AutoImageProcessor, PreTrainedTokenizerFast"),
        ("engines/a.py", "from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil"),
        ("engines/a.py", "import onnxruntime\nfrom plugins import registry"),
        ("glyphs/demo.py", "import saccade"),
        ("glyphs/train.py", "import torch\nfrom transformers import LlavaForConditionalGeneration"),
        ("saccade.py", "def f():\n    from graphs.errors import SaccadeError"),
    ],
)
def test_what_is_allowed_passes(file: str, line: str) -> None:
    assert breaches(imports_of_source(line, file)) == []
