"""What is tried: which bundle's large model, pruned by which policy, how far, before which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from engines.budgets import keep_ratios
from engines.evaluation.contenders import Contender
from graphs.errors import UsageError
from graphs.plan import PruningPlan
from graphs.policies import POLICIES

RANDOM = "random"
Shares: TypeAlias = tuple[float, ...]
Layers: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """How a large model is pruned: shares per prune point, and by which policy; None where it sees everything.

    layers: those before which its decoder prunes. bundle: whose model it is, by its place on the command line.
    """

    keep: Shares
    policy: str | None
    layers: Layers = ()
    bundle: int = 0

    @property
    def name(self) -> str:
        """A key that tells settings apart."""
        shares = ":".join(_short(share) for share in self.keep) or "1"
        named = f"{shares} {self.policy}" if self.policy else shares
        return f"{named} #{self.bundle + 1}" if self.bundle else named


def settings_of(
    contenders: Sequence[Contender], keeps: Sequence[Shares], policies: Sequence[str], layers: Sequence[Layers]
) -> tuple[Setting, ...]:
    """Each distinct way to prune the bundles' large (or only) models; () where there is none to prune.

    policies: the bundles' own by their names, and ``random`` where the host gives the scores. keeps: one with several
    shares tries the bundles with as many prune points. Raises UsageError for what another export would be needed for,
    with the command that makes it.
    """
    plans = {at: one.plan for at, one in enumerate(contenders) if one.plan}
    if not plans:
        if keeps or policies or layers:
            raise UsageError(
                "this bundle's only model is not pruned, so --keep, --policy and --layer have no effect; leave them out"
            )
        return ()
    _refuse_policies(plans.values(), policies)
    _refuse_layers(contenders, layers)
    chosen = {at: plan for at, plan in plans.items() if not layers or layers_of(plan) in layers}
    found: list[Setting] = []
    for at, plan in chosen.items():
        own = [policy for policy in policies or [plan.name] if policy in possible(plan)]
        if not own:
            continue
        for shares in shares_of(plan, keeps, alone=len(chosen) == 1):
            if all(share == 1 for share in shares):
                found.append(Setting(shares, None, (), contenders[at].whole))
            else:
                found += [Setting(shares, policy, layers_of(plan), at) for policy in own]
    _refuse_unused(found, keeps, policies)
    return tuple(dict.fromkeys(_one_whole(contenders, found)))


def possible(plan: PruningPlan) -> list[str]:
    """The policies that a bundle of this plan can be run with."""
    return [plan.name, *([RANDOM] if plan.needs_guidance and plan.name != RANDOM else [])]


def layers_of(plan: PruningPlan) -> Layers:
    """The layers before which its decoder prunes."""
    return tuple(point.layer for point in plan.points)


def shares_of(plan: PruningPlan, keeps: Sequence[Shares], alone: bool = True) -> list[Shares]:
    """What this plan's points are to keep; raises as ``settings_of``. alone: no other bundle could have been meant."""
    if not keeps:
        if any(budget.count is not None for budget in plan.budgets):
            raise UsageError(
                f"plan {plan.name} keeps a fixed count of tokens, a different share of each image; give --keep"
            )
        return [keep_ratios(plan, None)]
    found = []
    for shares in keeps:
        everything = all(share == 1 for share in shares)
        if not alone and not everything and len(shares) != len(plan.budgets):
            continue
        spread = shares * len(plan.budgets) if everything and len(shares) == 1 else shares
        found.append(keep_ratios(plan, spread))
    if not found:
        raise UsageError(
            f"policy {plan.name} has {len(plan.budgets)} prune points and no --keep has as many; add one, such as "
            + ":".join(f"{share:.4g}" for share in keep_ratios(plan, None))
        )
    return found


def _one_whole(contenders: Sequence[Contender], found: Sequence[Setting]) -> list[Setting]:
    """A model that sees everything has as many shares as its own bundle's plan has prune points."""
    shares = {at: (1.0,) * len(one.plan.budgets) for at, one in enumerate(contenders) if one.plan}
    return [s if s.policy else Setting(shares[s.bundle], None, (), s.bundle) for s in found]


def _refuse_policies(plans: object, policies: Sequence[str]) -> None:
    known = list(dict.fromkeys(name for plan in plans for name in possible(plan)))  # type: ignore[attr-defined]
    for policy in policies:
        if policy not in known:
            how = f"--policy {policy}" if all(part in POLICIES for part in policy.split("+")) else "--plan FILE"
            raise UsageError(
                f"policy {policy!r} is not in any of these bundles, which can be run with {' and '.join(known)}; "
                + _makes(how)
            )


def _refuse_layers(contenders: Sequence[Contender], layers: Sequence[Layers]) -> None:
    plans = [(one.model.spec.language.layers, one.plan) for one in contenders if one.plan]
    there = [layers_of(plan) for _, plan in plans]
    for wanted in layers:
        if wanted not in there:
            depth, plan = plans[0]
            if not all(0 < layer < depth for layer in wanted):
                raise UsageError(
                    f"nothing can be pruned before {_spelt(wanted)}: this model has {depth} layers, and the first "
                    f"must see everything; give layers from 1 to {depth - 1}"
                )
            known = " and ".join(dict.fromkeys(_spelt(before) for before in there))
            fraction = f"--policy {plan.name} --layer-fraction {(wanted[0] + 0.5) / depth:.4g}"
            raise UsageError(
                f"no bundle prunes before {_spelt(wanted)}, these do before {known}; "
                + _makes(fraction if len(wanted) == 1 else "--plan FILE")
            )


def _refuse_unused(found: Sequence[Setting], keeps: Sequence[Shares], policies: Sequence[str]) -> None:
    """Nothing of what was asked for does nothing."""
    if not found:
        raise UsageError("no bundle prunes before these layers by these policies; leave --layer or --policy out")
    for shares in keeps:
        if not all(share == 1 for share in shares) and shares not in [setting.keep for setting in found]:
            raise UsageError(
                f"--keep {':'.join(f'{share:g}' for share in shares)} has {len(shares)} shares, and no bundle that is "
                "tried has as many prune points; leave it out"
            )
    ran = {setting.policy for setting in found}
    for policy in policies:
        if policy not in ran and any(setting.policy for setting in found):
            raise UsageError(f"no bundle that prunes before these layers can be run with {policy}; leave it out")


def _spelt(layers: Layers) -> str:
    return f"layer {':'.join(map(str, layers))}" if layers else "no layer (at the vision stage only)"


def _makes(how: str) -> str:
    return (
        f"make one and give it beside these: saccade export CHECKPOINT -o LARGE --role large {how}, then "
        "saccade build SMALL LARGE -o OTHER.bundle"
    )


def _short(share: float) -> str:
    """As few digits as tell it from every other share."""
    return short if float(short := f"{share:g}") == share else repr(share)
