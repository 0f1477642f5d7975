"""One export per plan and session, of tiny random checkpoints."""

import pytest

from graphs.plan_file import plan_from_toml
from tests.policies.onnx_run import Stages
from tests.tiny import tiny_llava


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """``case_of(family)``: its tiny checkpoint and vision stage, made once."""
    from tests.policies.vision_cases import VisionCase

    made = {}

    def case(name: str) -> VisionCase:
        if name not in made:
            made[name] = VisionCase(name, tmp_path_factory.mktemp(name))
        return made[name]

    return case


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A LLaVA of 4 layers with 16 visual tokens per image."""
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava_model(llava):
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def exported(llava, tmp_path_factory):
    """``exported(policy)`` or ``exported(toml text)``: the stages of an export, made once."""
    from exporter.export import export_checkpoint

    made = {}

    def export(plan: str, role: str = "alone") -> Stages:
        if (plan, role) not in made:
            folder = tmp_path_factory.mktemp("export") / "x"
            if "schema" in plan:
                export_checkpoint(llava, folder, plan=plan_from_toml(plan), role=role)
            else:
                export_checkpoint(llava, folder, policy=plan, role=role)
            made[plan, role] = Stages(folder)
        return made[plan, role]

    return export
