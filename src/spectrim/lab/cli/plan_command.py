"""``spectrim plan``: shows what a recipe would do to a model, or what recipes would cost on many ranks."""

from dataclasses import asdict
from typing import Any

from spectrim.lab.cli.flags import configure, trust_named, with_settings
from spectrim.lab.cli.shared_options import Json, show
from spectrim.lab.planning.settings import DEFAULT_RECIPE, PlanConfig

__all__ = ["plan_command"]

THEMES = {
    "Model and recipe": ("model", "recipe", "lr"),
    "Cost on many ranks": ("world", "parallel", "shard", "flops", "bandwidth", "tokens"),
}


@with_settings(PlanConfig, THEMES)
def plan_command(given: dict[str, Any], as_json: Json = False) -> None:
    """Show what a recipe would do to every parameter of a model, or what recipes would cost on many ranks.

    No weights are built. With --world: operations, bytes sent and bytes of state for every rank, and the share of a
    step of training that the optimizer would take. These numbers are computed from shapes, not measured;
    docs/scaling.md derives them.
    """
    config = configure(PlanConfig, None, given)
    trust_named(given, everything=False)
    from spectrim.lab.planning.plan import SCALING_RECIPES, plan, plan_scaling
    from spectrim.lab.planning.plan_tables import plan_table, scaling_table

    model, cluster, hardware = config.model, config.cluster, config.hardware
    if cluster is None:
        recipe = config.recipe or DEFAULT_RECIPE
        description = plan(model, recipe, lr=config.lr)
        show({"model": model, "recipe": recipe, **description.to_dict()}, as_json, plan_table(description))
        return
    recipes = [config.recipe] if config.recipe else SCALING_RECIPES
    active, projections = plan_scaling(model, recipes, cluster, hardware)
    head = {"model": model, "active_parameters": active, **asdict(cluster), **hardware.model_dump()}
    value = {**head, "recipes": [asdict(projection) for projection in projections]}
    show(value, as_json, scaling_table(model, active, projections, cluster, hardware))
