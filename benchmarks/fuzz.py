"""Trains a few parameters by random recipes under hostile gradients, and counts what an optimizer must never do.

    python benchmarks/fuzz.py --minutes 60 --seed 0        until the time is up; writes benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --case 12345                 one case again, as a failure is printed

A case is drawn from its number alone: recipe, options, shapes, layouts, dtypes, memory formats, plain tensors and
DTensors, a schedule, gradients and an interruption. After every step it must hold that

finite      weights and state are finite;
bound       no update is larger than its clip, or its recipe, allows: singular values at most lr · c · √max(1, m/n),
            beyond decay and the rounding of the weights' dtype;
whole       a gradient that is not finite leaves every weight and all state as they were, and else every parameter that
            has a gradient counts the step;
gradients   gradients are as they were before the step;
resumed     a run that was saved, read with weights_only and loaded into new objects, or copied, goes on to the bit;
raised      nothing raises but what was asked to.
"""

import argparse
import copy
import io
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import spectrim
from fuzz_cases import Case
from spectrim.kernels.settling import LIMITS
from spectrim.lab.files import write_json
from spectrim.optim.grouping.layout import matrices
from spectrim.optim.stepping.entries import role_and_layout

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
#: Where the clip of a matrix is accurate to 1e-3, and of estimates that a step makes in float32.
TOLERANCE = 2e-3
#: The threshold of gradients that are clipped before the step.
CLIPPED = 0.5
#: The modules that ask whether reading is free.
UNREAD = ("screening.nonfinite", "rules.schedule", "optimizer", "gradients.shard_gradients")


class BrokenInvariantError(Exception):
    """An invariant that did not hold; the first word says which."""


# -- What must hold ----------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(held: list[list[nn.Parameter]]) -> list[nn.Parameter]:
    return [parameter for group in held for parameter in group]


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Weights and state, but for the counts of who was to blame."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors = {"weight": local(parameter.detach()).clone()}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and key != "skipped":
                    tensors[key] = local(value).clone()
            found.append(tensors)
    return found


def same(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]], *, made: bool = False) -> str | None:
    """The first difference to the bit; state that was made since is none where ``made``."""
    for index, (mine, its) in enumerate(zip(one, two, strict=True)):
        if set(mine) != set(its) and not (made and set(mine) <= set(its)):
            return f"state of parameter {index}: {sorted(mine)} against {sorted(its)}"
        for key in mine:
            if mine[key].dtype != its[key].dtype or not torch.equal(mine[key], its[key]):
                return f"{key} of parameter {index}"
    return None


def usable(grad: Tensor, *, narrow: bool) -> bool:
    """Whether a step takes a gradient: its square is to be finite in the dtype in which state is kept."""
    values = local(grad)
    wide = values.dtype == torch.float64 and not narrow
    return bool((values.abs().double() < LIMITS[torch.float64 if wide else torch.float32]).all())


def check_finite(optimizer: torch.optim.Optimizer) -> None:
    for index, tensors in enumerate(snapshot(optimizer)):
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise BrokenInvariantError(f"finite: {key} of parameter {index} is not")


def limits(case: Case, optimizer: Any, group: dict[str, Any], parameter: Tensor) -> dict[str, float]:
    """What an update over the learning rate may measure at most: singular values of matrices, or a norm."""
    role, layout = role_and_layout(group, parameter)
    _, _, threshold = optimizer.applied(group, parameter)
    follows = group["clip_scope"] == "all" or role == "matrix"
    if threshold is not None:
        return {"norm" if layout == "vector" else "clipped": threshold}
    if case.wrapped or not follows or layout == "vector":
        return {}
    if case.recipe == "Signum":
        return {"entry": 1.0}
    if case.recipe == "Spectra":
        return {"rms": 0.2}
    if case.recipe == "Muon":
        return {"orthogonal": 1.01 if group["orthogonalize_steps"] is None else 1.3}
    return {}


def check_bound(
    parameter: Tensor, before: Tensor, group: dict[str, Any], applied: Any, allowed: dict[str, float], place: str
) -> None:
    """Compare what a step took away, but for decay, with what was allowed."""
    if not allowed:
        return
    lr, decay, _ = applied
    old, new = before.double(), local(parameter.detach()).double()
    moved = old * (1 - lr * decay) - new
    # Decay and update are rounded to the weight's dtype, entry by entry.
    rounding = 4 * torch.finfo(before.dtype).eps * (old.abs() + new.abs())
    _, layout = role_and_layout(group, parameter)
    views = matrices(moved.contiguous(), layout, group.get("split")) or [moved.reshape(1, -1)]
    slacks = matrices(rounding.contiguous(), layout, group.get("split")) or [rounding.reshape(1, -1)]
    for view, slack in zip(views, slacks, strict=True):
        if not view.numel():
            continue
        m, n = view.shape[-2:]
        off = torch.linalg.matrix_norm(slack)
        for kind, limit in allowed.items():
            size = torch.linalg.matrix_norm(view, 2)
            most = limit
            if kind == "clipped":
                most = limit * math.sqrt(max(1.0, m / n))
            elif kind == "orthogonal":
                scale = (
                    0.2 * math.sqrt(max(m, n)) if group["scale"] == "match_rms_adamw" else math.sqrt(max(1.0, m / n))
                )
                most = limit * scale
            elif kind == "norm":
                size = torch.linalg.matrix_norm(view)
            elif kind == "rms":
                size, most = torch.linalg.matrix_norm(view), limit * math.sqrt(m * n)
            elif kind == "entry":
                size, off = view.abs().amax((-2, -1)), slack.amax((-2, -1))
            excess = float(((size - off) / (lr * most)).amax()) if lr else float((size - off).amax())
            if excess > (1 + TOLERANCE if lr else 0.0):
                raise BrokenInvariantError(f"bound: {place} moved by {excess:.5g} of what {kind} allows at lr {lr:.3g}")


def check_clipped(optimizer: torch.optim.Optimizer) -> None:
    """No gradient that is finite has a singular value above the threshold."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None or not local(grad).isfinite().all():
                continue
            _, layout = role_and_layout(group, parameter)
            slack = 1 + TOLERANCE + 8 * torch.finfo(grad.dtype).eps
            for view in matrices(local(grad).double().contiguous(), layout, group.get("split")):
                if view.numel() and not (torch.linalg.matrix_norm(view, 2) <= CLIPPED * slack).all():
                    raise BrokenInvariantError(
                        f"bound: a clipped gradient of shape {tuple(grad.shape)} is larger than its threshold"
                    )


# -- One case ----------------------------------------------------------------------------------------------------------


def resumed(case: Case, optimizer: torch.optim.Optimizer, held: list[list[nn.Parameter]]) -> tuple[Any, Any]:
    """New objects that go on where these are."""
    if case.interruption == "copied":
        return copy.deepcopy((optimizer, held))
    if case.interruption == "pickled":
        file = io.BytesIO()
        torch.save((optimizer, held), file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    file = io.BytesIO()
    weights = [local(parameter.detach()) for parameter in flat(held)]
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    with torch.serialization.safe_globals(_safe()):
        saved = torch.load(file, weights_only=True)
    fresh = case.parameters()
    with torch.no_grad():
        for parameter, weight in zip(flat(fresh), saved["weights"], strict=True):
            local(parameter).copy_(weight)
    again = case.optimizer(fresh)
    again.load_state_dict(saved["optimizer"])
    return again, fresh


def _safe() -> list[Any]:
    """What torch itself needs to read DTensors with weights_only."""
    from torch.distributed.tensor import DeviceMesh as Mesh
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    return [DTensor, DTensorSpec, TensorMeta, Mesh, Replicate, Shard]


def one_step(case: Case, number: int, optimizer: Any, held: list[list[nn.Parameter]], *, checked: bool) -> None:
    drawn = case.plan[number]
    generator = torch.Generator().manual_seed(drawn["seed"])
    parameters = flat(held)
    for parameter, kind in zip(parameters, drawn["kinds"], strict=True):
        parameter.grad = case.gradient(parameter, kind, drawn["scale"], generator)
    for group in optimizer.param_groups:
        rate = group["first_lr"] * drawn["lr"]
        group["lr"] = torch.tensor(rate) if case.lr_in_a_tensor and not case.wrapped else rate
    if case.utility == "clip":
        spectrim.clip_grad_spectral_(optimizer.param_groups, CLIPPED)
        check_clipped(optimizer)
    elif case.utility == "shrink":
        spectrim.shrink_grad_(optimizer.param_groups, 2.0)
    present = [parameter for parameter in parameters if parameter.grad is not None]
    narrow = case.options.get("state_dtype") == "bfloat16"
    taken = all(usable(parameter.grad, narrow=narrow) for parameter in present)
    before = snapshot(optimizer)
    given = [None if parameter.grad is None else local(parameter.grad).clone() for parameter in parameters]
    places = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    rules = []
    for group, parameter in places if checked else ():
        rules.append((optimizer.applied(group, parameter), limits(case, optimizer, group, parameter)))
    try:
        optimizer.step()
    except FloatingPointError:
        if taken or not case.raises:
            raise
    else:
        if case.raises and not taken:
            raise BrokenInvariantError("whole: a gradient that is not finite did not raise")
    if not checked:
        return
    after = snapshot(optimizer)
    for index, (parameter, grad) in enumerate(zip(parameters, given, strict=True)):
        now = parameter.grad
        if (now is None) != (grad is None) or (grad is not None and not same_entries(local(now), grad)):
            raise BrokenInvariantError(f"gradients: that of parameter {index} changed")
    if not taken:
        if difference := same(before, after, made=True):
            raise BrokenInvariantError(f"whole: a skipped step changed {difference}")
        return
    check_finite(optimizer)
    still = all(group["lr"] == 0 for group in optimizer.param_groups)
    for index, ((group, parameter), old, (applied, allowed)) in enumerate(zip(places, before, rules, strict=True)):
        place = f"parameter {index} of shape {tuple(parameter.shape)}"
        if parameter.grad is None:
            if not torch.equal(local(parameter.detach()), old["weight"]):
                raise BrokenInvariantError(f"whole: {place} moved without a gradient")
            continue
        check_bound(parameter, old["weight"], group, applied, allowed, place)
        if not case.wrapped and not still:
            count = float(optimizer.state[parameter]["step"]) - float(old.get("step", torch.zeros(())))
            if count != 1:
                raise BrokenInvariantError(f"whole: {place} counted {count:g} steps")


def same_entries(one: Tensor, two: Tensor) -> bool:
    return bool(torch.equal(one.nan_to_num(nan=7.0), two.nan_to_num(nan=7.0)))


def run(number: int, mesh: DeviceMesh, count: Counter[str]) -> None:
    """One case; raises BrokenInvariantError, or whatever it made the library raise."""
    case = Case(number, mesh)
    held = case.parameters()
    optimizer = case.optimizer(held)
    count[f"recipe {case.name}"] += 1
    for group in case.groups:
        count[f"layout {group['said'].get('layout')}"] += 1
        for parameter in group["parameters"]:
            count[f"memory {parameter['memory']}"] += 1
    spectrim.describe(optimizer)
    twin: tuple[Any, Any] | None = None
    for step in range(case.steps):
        one_step(case, step, optimizer, held, checked=True)
        count["steps"] += 1
        if twin is not None:
            one_step(case, step, *twin, checked=False)
        if step == case.interrupted_after and case.interruption != "none":
            twin = resumed(case, optimizer, held)
            count[f"interruption {case.interruption}"] += 1
    spectrim.describe(optimizer)
    if twin is not None and (difference := same(snapshot(optimizer), snapshot(twin[0]))):
        raise BrokenInvariantError(f"resumed: after being {case.interruption}, {difference} differs")


def attempt(number: int, mesh: DeviceMesh, count: Counter[str], *, aloud: bool) -> str | None:
    """What went wrong in a case, if anything."""
    try:
        with warnings.catch_warnings(), ExitStack() as patches:
            warnings.simplefilter("ignore")
            for place in UNREAD if Case(number, mesh).unread else ():
                patches.enter_context(mock.patch(f"spectrim.optim.{place}.reading_is_free", return_value=False))
            run(number, mesh, count)
    except BrokenInvariantError as failure:
        return str(failure)
    except Exception as error:  # whatever it is, it counts
        if aloud:
            traceback.print_exc()
        return f"raised: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="cases are numbered from this times a billion")
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    count: Counter[str] = Counter()
    if arguments.case is not None:
        case = Case(arguments.case, mesh)
        print(
            case.name,
            {"lr": case.lr, **case.options},
            f"{case.steps} steps, {case.interruption}, {case.utility}",
            "unread" if case.unread else "",
            "lr in a tensor" if case.lr_in_a_tensor else "",
        )
        for group in case.groups:
            print("   ", group["said"], [(p["shape"], str(p["dtype"]), p["memory"]) for p in group["parameters"]])
        problem = attempt(arguments.case, mesh, count, aloud=True)
        print(problem or "holds")
        return int(problem is not None)
    started, failures, cases = time.monotonic(), [], 0
    while time.monotonic() - started < 60 * arguments.minutes:
        number = arguments.seed * 10**9 + cases
        cases += 1
        if problem := attempt(number, mesh, count, aloud=False):
            failures.append({"case": number, "what": problem})
            print(f"FAILED {problem}    python benchmarks/fuzz.py --case {number}", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{cases:,} cases, {count['steps']:,} steps in {minutes:.1f} minutes: {len(failures)} failures")
    found = {"minutes": round(minutes, 1), "seed": arguments.seed, "torch": torch.__version__, "cases": cases}
    drawn = {key: count[key] for key in sorted(count) if key != "steps"}
    write_json(arguments.out, {**found, "steps": count["steps"], "failures": failures, "drawn": drawn})
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
