"""Which named policy serves which model family, from the two registries, as the table that stands in README."""

from __future__ import annotations

from collections.abc import Collection

from graphs.families import KNOWN, refusal
from graphs.policies import POLICIES, TABLE

TESTED, SAME_CODE, REFUSED = "●", "○", "–"


def policy_refusal(policy: str, family: str) -> str | None:
    """Why a named policy does not serve a family, None where it does."""
    points = POLICIES[policy].document("alone").point
    return next((why for p in points if p.where == "vision" and (why := refusal(family, p.score))), None)


def support_table(tested: Collection[tuple[str, str]]) -> list[str]:
    """Lines of a Markdown table, policies down, families across; tested: (policy, family)."""
    families = [f.name for f in KNOWN]
    rows = [["policy", *families], ["---", *(":-:" for _ in families)]]
    for policy in (p.name for p in TABLE if p.name != "none"):
        cells = [
            REFUSED if policy_refusal(policy, f) else TESTED if (policy, f) in tested else SAME_CODE for f in families
        ]
        rows.append([f"`{policy}`", *cells])
    return [f"| {' | '.join(row)} |" for row in rows]
