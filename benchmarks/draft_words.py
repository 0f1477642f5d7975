"""README's sentences on the small answer as a draft, made from benchmarks/results/draft.json alone.

`python -m benchmarks.draft_words` writes them between `<!-- draft … -->` and `<!-- end of draft -->`;
`python -m benchmarks.draft` does so behind its measurement.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import fill
from typing import Any

from graphs.files import atomic_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "draft.json"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- draft: [^>]* -->\n\n).*?(\n\n<!-- end of draft -->\n)", re.DOTALL)
WIDTH = 128


def words_of(document: dict[str, Any]) -> str:
    """What drafts save, and under which conditions."""
    told, every = document["conditions"], [r for r in document["results"] if r["asked"] == "all questions"]
    saved = "; ".join(
        f"{r['decode_steps_saved']:,} of {r['decode_steps_without']:,} decode steps at {r['average_retention']:.0%}, "
        f"{r['ms_saved_median']:.1f} ms of {r['ms_without_median']:.1f}"
        for r in every
    )
    answers, equal, near = (sum(r[key] for r in every) for key in ("questions", "answers_equal", "near_ties"))
    same = "all" if equal == answers else f"{equal:,}"
    return (
        f"On the glyph pair that saves {saved} (medians of prefill and decode together). Of {answers:,} answers {same} "
        "are, token for token, those without a draft; steps whose two best logits lie closer than 1e-4: "
        f"{near}. Conditions: {told['questions']:,} questions, fp32, {told['cores']} cores of an {told['processor']}, "
        f"threads: {told['threads']}, ONNX Runtime {told['onnxruntime']}, {told['date_utc']}; what else ran: "
        f"{told['beside']}."
    )


def filled(text: str, document: dict[str, Any]) -> str:
    """The page with the sentences made anew."""
    said = fill(words_of(document), WIDTH, break_long_words=False, break_on_hyphens=False)
    return BLOCK.sub(lambda found: found[1] + said + found[2], text)


def publish() -> None:
    """Write them into README.md."""
    text = filled(README.read_text("utf-8"), json.loads(RESULTS.read_text("utf-8")))
    with atomic_file(README) as partial:
        partial.write_text(text, "utf-8")


if __name__ == "__main__":
    publish()
