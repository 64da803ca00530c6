"""The tables that ``spectrim plan`` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spectrim.lab.planning.scaling import Projection
from spectrim.lab.planning.settings import Cluster, Hardware
from spectrim.lab.tables import TextTable, header_and_rows

if TYPE_CHECKING:
    from spectrim.optim.describe import Description

__all__ = ["plan_table", "scaling_rows", "scaling_table"]


def scaling_table(
    model: str, active: float, projections: Sequence[Projection], cluster: Cluster, hardware: Hardware
) -> TextTable:
    """One row for each recipe, with the assumptions below."""
    layout = cluster.parallel if cluster.shard is None else f"{cluster.parallel} over {cluster.shard}"
    note = (
        f"{model}, {cluster.world:,} ranks, {layout}. Means over ranks, and in brackets the rank that has most; "
        f"share: its share of a step of {hardware.tokens:,} tokens a rank and 6 operations for each of {active:.3g} "
        f"parameters, at {hardware.flops:g} operations and {hardware.bandwidth:g} bytes a second. Arithmetic, not a "
        f"measurement. Gathered: the same with every matrix gathered whole on every rank."
    )
    return TextTable(header_and_rows(scaling_rows(projections)), note=note)


def scaling_rows(projections: Sequence[Projection]) -> list[dict[str, str]]:
    """The cells of a table of projections."""
    return [
        {
            "recipe": projection.recipe,
            "GFLOP": with_most(projection.cost.flops / 1e9, projection.cost.busiest_flops / 1e9),
            "MB sent": with_most(projection.cost.bytes_sent / 1e6, projection.cost.busiest_bytes_sent / 1e6),
            "state MB": with_most(projection.cost.state_bytes / 1e6, projection.cost.largest_state_bytes / 1e6),
            "share": f"{projection.share:.2%}",
            "gathered GFLOP": number(projection.gathered.flops / 1e9),
            "gathered MB sent": number(projection.gathered.bytes_sent / 1e6),
            "gathered share": f"{projection.gathered_share:.2%}",
        }
        for projection in projections
    ]


def with_most(mean: float, most: float) -> str:
    """A mean, and in brackets the largest where that differs to the eye."""
    return number(mean) if number(mean) == number(most) else f"{number(mean)} ({number(most)})"


def number(value: float) -> str:
    """Three digits or all before the point, with commas."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def plan_table(description: "Description") -> TextTable:
    """The rows of a description, with the totals below."""
    return TextTable(description.cells(), note=description.summary(), words=("shape", "role", "matrix", "rule"))
