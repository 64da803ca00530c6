"""The result of a comparison or a sweep in one sentence, as careful as its numbers are.

It names one recipe: the lowest of those that are surely below AdamW, by the interval of the paired difference; without
such a one the lowest beside AdamW, and then it says that this may be nothing, or that nothing was gained.
"""

from typing import Any

from spectrim.lab.recipes.names import BASELINE

__all__ = ["comparison_headline", "cost_of", "sweep_headline"]

Summary = dict[str, Any]


def comparison_headline(summary: Summary) -> str:
    """Who reaches AdamW's loss after what share of its tokens, where it ends, and how sure that is."""
    recipes = summary["recipes"]
    losses = {name: entry["final_loss"] for name, entry in recipes.items() if entry["final_loss"] is not None}
    if not losses:
        return "Every recipe diverged."
    if BASELINE not in losses:
        why = "AdamW diverged" if BASELINE in recipes else "AdamW is not among the recipes"
        lowest = min(losses, key=losses.__getitem__)
        return f"{lowest} ends lowest, at {losses[lowest]:.4f}; {why}, so that there is nothing to hold it against."
    base = losses[BASELINE]
    if len(losses) == 1:
        rest = "no other recipe was compared" if len(recipes) == 1 else "every other recipe diverged"
        return f"AdamW ends at {base:.4f}; {rest}."
    name = challenger(recipes, losses)
    entry, gap = recipes[name], losses[name] - base
    if is_open(entry):
        side = "below" if gap < 0 else "above"
        return f"{name} ends {abs(gap):.4f} {side} AdamW's final loss, but that may be nothing: {interval(entry)}."
    if gap >= 0:
        return (
            f"No recipe ends below AdamW's {base:.4f}: the lowest, {name}, ends {gap:.4f} above it{certainty(entry)}."
        )
    share = entry["tokens_to_adamw"]
    if share is None:
        return f"{name} ends {-gap:.4f} below AdamW's final loss{certainty(entry)}."
    reached = f"reaches AdamW's final loss after {share:.0%} of AdamW's tokens"
    return f"{name} {reached} and ends {-gap:.4f} below it{certainty(entry)}."


def challenger(recipes: Summary, losses: dict[str, float]) -> str:
    """The recipe that the headline is about."""
    others = [name for name in losses if name != BASELINE]
    sure = [name for name in others if losses[name] < losses[BASELINE] and is_sure(recipes[name])]
    return min(sure or others, key=losses.__getitem__)


def is_sure(entry: Summary) -> bool:
    """Whether the interval of the difference to AdamW holds one sign only."""
    paired = entry.get("difference_to_adamw") or {}
    return paired.get("low") is not None and not is_open(entry)


def is_open(entry: Summary) -> bool:
    """Whether the interval of the difference to AdamW holds zero."""
    paired = entry.get("difference_to_adamw") or {}
    return paired.get("low") is not None and bool(paired["low"] <= 0 <= paired["high"])


def interval(entry: Summary) -> str:
    paired = entry["difference_to_adamw"]
    seeds = f"over {paired['pairs']} seeds"
    return f"the 95\u00a0% interval of the difference is {paired['low']:+.4f} to {paired['high']:+.4f} {seeds}"


def certainty(entry: Summary) -> str:
    """How sure the difference is, as far as the seeds can tell."""
    paired = entry.get("difference_to_adamw")
    if not paired:
        return "; the interval is not in these results"
    return "; one seed cannot say how sure that is" if paired["low"] is None else f" ({interval(entry)})"


def cost_of(summary: Summary) -> str:
    """What the recipe of the headline costs: time per step, and where it stands at AdamW's time; empty if unknown."""
    recipes = summary["recipes"]
    losses = {name: entry["final_loss"] for name, entry in recipes.items() if entry["final_loss"] is not None}
    if BASELINE not in losses or len(losses) == 1:
        return ""
    name = challenger(recipes, losses)
    entry, base = recipes[name], recipes[BASELINE]
    state = entry["state_bytes"] / base["state_bytes"]
    cost = f"A step of {name} takes {entry['step_ms'] / base['step_ms']:.2f} times AdamW's time"
    cost += f" and {state:.2f} times its optimizer state."
    equal = entry.get("equal_time")
    if not equal or not equal["difference"]:
        return cost
    gap = equal["difference"]["mean"]
    side = "below" if gap < 0 else "above"
    return f"{cost} When AdamW is done, {name} stands {abs(gap):.4f} {side} it, with {equal['share']:.0%} of its steps."


def sweep_headline(summary: Summary) -> str:
    """Whose best trial is the lowest, and at which learning rate."""
    found = {name: entry["best"] for name, entry in summary["recipes"].items() if entry["best"]}
    if not found:
        return "No trial has reached its end yet."
    order = sorted(found, key=lambda name: found[name]["final_loss"])
    best, loss = order[0], found[order[0]]["final_loss"]
    sentence = f"The lowest loss, {loss:.4f}, is {best}'s, at learning rate {found[best]['lr']:.2g}"
    if len(order) > 1:
        sentence += f"; the best of {order[1]} is {found[order[1]]['final_loss'] - loss:.4f} above it"
    return f"{sentence}. Winners are also lucky: compare them on other seeds."
