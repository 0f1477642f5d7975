"""Which language models are exported, and what the traced decoder must know of them.

The decoder is the model's own layers, norm and rotary module, replayed around the prune points. What else a model's
forward does would be left out without a word, and golden tensors, which are the same replay, would agree: so the models
whose forward was read are named here, and tests hold each to Hugging Face's own answers.
"""

from __future__ import annotations

from typing import Any

from graphs.console import say
from graphs.errors import UsageError

# model_type of the text config. granite multiplies its embeddings (``embedding_multiplier``); the others only replay.
# Its ``logits_scaling`` is its causal model's, which transformers' LLaVA classes leave out, and so do we: tokens are
# the same, probabilities sharper than that model was trained to give.
DECODERS = frozenset(
    ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
)


def refuse_unknown(text: Any, folder: object) -> None:
    """UsageError for a language model that is not known, or whose layers are not all of full attention."""
    if text.model_type not in DECODERS:
        raise UsageError(
            f"{folder} has a decoder of type {text.model_type}, which is not supported; known are "
            f"{', '.join(sorted(DECODERS))}"
        )
    if odd := sorted({kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"}):
        raise UsageError(
            f"{folder} has decoder layers of {', '.join(odd)}, and pruned tokens would shift their windows; "
            "use a checkpoint whose layers all have full attention"
        )


def positions_of(text: Any, folder: object) -> int:
    """How long a conversation can be; no longer than the window of a model whose every layer has one, which is said.

    Within the window such a layer attends to everything, as the exported one always does (Mistral 7B v0.1, Phi-3).
    """
    most, window = int(text.max_position_embeddings), getattr(text, "sliding_window", None)
    if getattr(text, "layer_types", None) or window is None or window >= most:
        return most
    say(f"{folder}: its decoder attends to {window} positions at a time, so conversations end there, not at {most}")
    return int(window)


def make_static(rotary: Any, folder: object) -> None:
    """Let the rotary module's angles depend on nothing but positions; UsageError where they must.

    ``dynamic`` scaling changes them only beyond ``max_position_embeddings``, where no conversation goes.
    """
    kind = getattr(rotary, "rope_type", "default")
    if kind == "longrope":
        raise UsageError(
            f"{folder} uses longrope positions, whose angles change with the length, so cached keys would become "
            "wrong; use a checkpoint without longrope"
        )
    if kind == "dynamic":
        rotary.rope_type = "default"
