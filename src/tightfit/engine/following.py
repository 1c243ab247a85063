"""From a plan that was made before, or written by hand, to one that this machine can run."""

from __future__ import annotations

from dataclasses import fields

from tightfit.catalog import parse_one
from tightfit.engine.opening import Opened, Wish
from tightfit.errors import UsageError
from tightfit.kv.compose import compose
from tightfit.plan.schema import OWN, Plan

MAKE_A_PLAN = "Make a new one with `tightfit plan MODEL --out FILE`."


def planned(wish: Wish, plan: Plan) -> Wish:
    """What a plan asks for, of the model that is wished for. Raises UsageError if the wish says more than that."""
    for field in fields(Wish):
        if field.name != "model" and getattr(wish, field.name) is not None:
            raise UsageError(
                f"both the plan and {field.name} = {getattr(wish, field.name)} were given, and the plan fixes that",
                "Leave one out, or edit the plan.",
            )
    return Wish(
        wish.model, plan.budget, plan.context, plan.sequences, chunk=plan.chunk, threads=plan.threads, kv=plan.cache
    )


def follow(plan: Plan, opened: Opened) -> Plan:
    """The plan with its choices as they are, and with what they take worked out anew for this machine.

    Raises UsageError if it is for another model or does not describe this one, BudgetError if it does not fit into the
    budget that it names.
    """
    checkpoint, spec = opened.checkpoint, opened.spec
    if plan.model.fingerprint != checkpoint.fingerprint:
        raise UsageError(
            f"the plan is for {plan.model.name}, whose files differ from those of {checkpoint.name}", MAKE_A_PLAN
        )
    if len(plan.layers) != len(spec.layers):
        raise UsageError(
            f"the plan has {len(plan.layers)} layers, and {checkpoint.name} has {len(spec.layers)}", MAKE_A_PLAN
        )
    for part in (plan.outer, *plan.layers):
        if checkpoint.compressed is not None and part.format != checkpoint.compressed.weights:
            raise UsageError(
                f"the plan has weights in {part.format}, and {checkpoint.name} keeps {checkpoint.compressed.weights}",
                MAKE_A_PLAN,
            )
        if part.format != OWN:
            parse_one("weights", part.format)
    compose(plan.cache)

    opened.load_what_runs_need()

    from tightfit.engine.start import fit_plan

    return fit_plan(checkpoint, spec, plan)
