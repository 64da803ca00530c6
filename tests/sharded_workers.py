"""What the ranks of tests/distributed run."""

from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import sharded_cases as cases
import spectrim
from spectrim.distributed.collectives import record

STEPS = 4

#: What layouts are tried on beside FSDP, which is tried on everything.
SOME = ("wide", "tall", "uneven", "fused", "experts", "bias", "short")


def one_process_against_many(rank: int, world: int, recipes: dict[str, list[str]], gradients: list[str]):
    """The update of every layout, and its gradients after the utilities."""
    return every_layout(rank, world, recipes), every_gradient(rank, world, gradients)


def every_gradient(rank: int, world: int, layouts: list[str]):
    """For every utility, the gradients that it leaves in these layouts, what it found, and whether replicas agree."""
    found = {}
    for layout, make in cases.layouts(world):
        for utility, work in cases.UTILITIES.items() if layout in layouts else ():
            parameters = make()
            if layout != "fsdp":
                parameters = {name: parameters[name] for name in SOME}
            for name, parameter in parameters.items():
                parameter.grad = cases.like(parameter, cases.gradient(name, 0))
            numbers = work(cases.groups(parameters))
            left = {name: parameter.grad for name, parameter in parameters.items()}
            found[layout, utility] = cases.whole(left), numbers, replicas_agree(left)
    return found


def every_layout(rank: int, world: int, recipes: dict[str, list[str]]):
    """For the recipes of every layout, the parameters after some steps; and whether replicas agree."""
    found = {}
    for layout, make in cases.layouts(world):
        for recipe in recipes.get(layout, ()):
            parameters = make()
            if layout != "fsdp":
                parameters = {name: parameters[name] for name in SOME}
            optimizer = cases.RECIPES[recipe](cases.groups(parameters))
            for number in range(STEPS):
                cases.step(optimizer, parameters, number)
            found[layout, recipe] = cases.whole(parameters), replicas_agree(parameters)
    return found if rank == 0 else {key: agree for key, (_, agree) in found.items()}


def replicas_agree(parameters) -> bool:
    for parameter in parameters.values():
        for dim, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_replicate():
                mine = parameter.to_local().detach()
                all_of_them = [torch.empty_like(mine) for _ in range(parameter.device_mesh.size(dim))]
                dist.all_gather(all_of_them, mine.contiguous(), group=parameter.device_mesh.get_group(dim))
                if not all(torch.equal(mine, other) for other in all_of_them):
                    return False
    return True


def on_four_ranks(rank: int, folder: str):
    """Everything that needs four ranks and no comparison of layouts, in one launch."""
    return {
        "bytes": bytes_sent(),
        "state": state_shares(),
        "faults": faults(rank),
        "gradient faults": gradient_faults(rank),
        "disagreement": disagreement(rank),
        "options": state_dict_options(rank),
        "saved": save(folder),
        "narrow": narrow(),
    }


def bytes_sent():
    """For recipes on one matrix: its shape, its rank k, and what this rank sent in its second step, by purpose."""
    mesh = init_device_mesh("cpu", (4,))
    found = {}
    for dtype in ("float32", "bfloat16"):
        for placement in (Shard(0), Shard(1)):
            for recipe, make in {
                "adamw": lambda p: spectrim.AdamW(p),
                "adamw+shrink": lambda p: spectrim.AdamW(p, shrink=3.0),
                "adamw+clip": lambda p, dtype=dtype: spectrim.AdamW(p, clip=1.0, exchange_dtype=dtype),
                "muon": lambda p, dtype=dtype: spectrim.Muon(p, exchange_dtype=dtype),
                "spectra": lambda p: spectrim.Spectra(p, rank_ratio=0.25),
                "around AdamW": lambda p: spectrim.SpectralClipping(torch.optim.AdamW(p), 1.0),
            }.items():
                parameters = [
                    nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement])) for shape in BYTES_SHAPES
                ]
                optimizer = make(parameters)
                for _ in range(2):
                    for parameter in parameters:
                        parameter.grad = torch.randn_like(parameter)
                    with record() as recorder:
                        optimizer.step()
                found[recipe, dtype, placement.dim] = dict(recorder.sent)
            narrow = getattr(torch, dtype)
            for utility, work in {"clip grad": clip_grads, "shrink grad": spectrim.shrink_grad_}.items():
                narrowed = [nn.Parameter(parameter.detach().to(narrow)) for parameter in parameters]
                for parameter in narrowed:
                    parameter.grad = torch.randn_like(parameter)
                with record() as recorder:
                    work(narrowed)
                found[utility, dtype, placement.dim] = dict(recorder.sent)
    return found


def clip_grads(parameters, **options):
    return spectrim.clip_grad_spectral_(parameters, 1.0, **options)


BYTES_SHAPES = ((32, 16), (16, 48), (32, 16))


def narrow():
    """Fused projections in bfloat16 after steps of AdamW alone, in shards and as a whole."""
    whole = nn.Parameter(cases.start()["fused"].bfloat16())
    placed = distribute_tensor(whole.detach(), init_device_mesh("cpu", (4,)), [Shard(0)], src_data_rank=None)
    pair = [nn.Parameter(placed.clone()), whole]
    for parameter in pair:
        optimizer = cases.RECIPES["adamw"](cases.groups({"fused": parameter}))
        for number in range(3):
            parameter.grad = cases.like(parameter, cases.gradient("fused", number).bfloat16())
            optimizer.step()
    return pair[0].detach().full_tensor(), whole.detach()


def state_shares():
    """This rank's bytes of Spectra's state over those of AdamW's, for a matrix in row shards."""
    mesh = init_device_mesh("cpu", (4,))
    sizes = []
    for make in (spectrim.Spectra, torch.optim.AdamW):
        parameter = nn.Parameter(distribute_tensor(torch.randn(256, 512), mesh, [Shard(0)]))
        optimizer = make([parameter])
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if value.numel() > 1]
        sizes.append(sum(value.to_local().nbytes for value in state))
    return sizes[0] / sizes[1]


def faults(rank: int):
    """One rank's gradient is not finite, then missing; with what the parameters and their state were and became."""
    found = {}
    for recipe in ("adamw+clip", "spectra", "adamw+shrink", "around AdamW"):
        parameters = cases.fsdp(init_device_mesh("cpu", (4,)))
        optimizer = cases.RECIPES[recipe](cases.groups(parameters))
        cases.step(optimizer, parameters, 0)
        before = cases.whole(parameters)
        for name, parameter in parameters.items():
            parameter.grad = cases.like(parameter, cases.gradient(name, 1))
        if rank == 1:
            kept = parameters["wide"].grad.to_local().clone()
            parameters["wide"].grad.to_local()[0, 0] = float("nan")
            parameters["uneven"].grad = None
        parameters["tall"].grad = None
        optimizer.step()
        after = cases.whole(parameters)
        assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step moved something"
        if rank == 1:
            parameters["wide"].grad.to_local().copy_(kept)
        optimizer.step()
        after = cases.whole(parameters)
        moved = {name: not torch.equal(before[name], after[name]) for name in before}
        steps = {name: int(optimizer.state[parameter]["step"]) for name, parameter in parameters.items()}
        found[recipe] = moved, steps, optimizer.skipped_steps()
    found["raised"] = {}
    for recipe in ("adamw+clip", "around AdamW"):
        plain = nn.Parameter(torch.ones(3, 4))
        optimizer = cases.RECIPES[recipe]([*cases.groups(parameters), {"params": [("plain", plain)]}])
        for group in optimizer.param_groups:
            group["on_nonfinite"] = "raise"
        for name, parameter in parameters.items():
            parameter.grad = cases.like(parameter, cases.gradient(name, 1))
        plain.grad = torch.full((3, 4), float("inf") if rank == 2 else 1.0)
        alone = message(FloatingPointError, optimizer.step)
        if rank == 2:
            parameters["fused"].grad.to_local()[0, 0] = float("inf")
        found["raised"][recipe] = alone, message(FloatingPointError, optimizer.step)
    replicated = {
        "wide": nn.Parameter(distribute_tensor(cases.start()["wide"], init_device_mesh("cpu", (4,)), [Replicate()]))
    }
    found["some replicas"] = []
    for recipe in ("adamw", "around AdamW"):
        optimizer = cases.RECIPES[recipe](cases.groups(replicated))
        replicated["wide"].grad = None
        if rank:
            replicated["wide"].grad = cases.like(replicated["wide"], cases.gradient("wide", 0))
        optimizer.step()
        found["some replicas"].append((replicas_agree(replicated), optimizer.skipped_steps()))
    named = [("bias", parameters["bias"])]
    found["refused"] = {
        "Adafactor": message(ValueError, lambda: spectrim.SpectralClipping(torch.optim.Adafactor(named))),
        "Rprop": message(ValueError, lambda: spectrim.SpectralClipping(torch.optim.Rprop(named))),
    }
    return found


def gradient_faults(rank: int):
    """One rank's gradient is not finite, or missing, or another plain one is: what is left, found and raised."""
    with mock.patch("spectrim.optim.gradients.shard_gradients.reading_is_free", return_value=False):
        found = {("unread", utility): found for utility, found in bad_or_missing(rank).items()}
    found |= bad_or_missing(rank)
    plain, sharded = nn.Parameter(torch.ones(3, 4)), cases.fsdp(init_device_mesh("cpu", (4,)))["fused"]
    plain.grad = torch.full((3, 4), float("inf") if rank == 3 else 1.0)
    sharded.grad = cases.like(sharded, cases.gradient("fused", 1))
    left, mixed = sharded.grad.to_local().clone(), [("plain", plain), ("fused", sharded)]
    for utility in (clip_grads, spectrim.shrink_grad_):
        raised = message(RuntimeError, lambda utility=utility: utility(mixed, error_if_nonfinite=True))
        found["raised", utility.__name__] = raised, torch.equal(sharded.grad.to_local(), left)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    crossing = [
        nn.Parameter(distribute_tensor(torch.ones(4, 3), grid[name], [Shard(0)])) for name in ("rows", "columns")
    ]
    for parameter in (plain, *crossing):
        parameter.grad = torch.ones_like(parameter)
    if rank == 3:
        plain.grad[0, 0] = float("nan")
    every = [plain, *crossing]
    found["crossing"] = message(RuntimeError, lambda: clip_grads(every, error_if_nonfinite=True))
    replicated = nn.Parameter(
        distribute_tensor(cases.start()["wide"], init_device_mesh("cpu", (4,)), [Replicate()], src_data_rank=None)
    )
    if rank:
        replicated.grad = cases.like(replicated, cases.gradient("wide", 0))
    norms = spectrim.clip_grad_spectral_([replicated], 0.1)
    found["some replicas"] = norms.tolist()
    part = cases.gradient("wide", 0) * (rank + 1)
    replicated.grad = DTensor.from_local(part, replicated.device_mesh, [Partial()], run_check=False)
    found["partial"] = clip_grads([replicated]), replicated.grad.full_tensor()
    return found


def bad_or_missing(rank: int):
    """For every utility, gradients before and after, one not finite and one missing on rank 1; and what was found."""
    found = {}
    for utility, work in cases.UTILITIES.items():
        parameters = cases.fsdp(init_device_mesh("cpu", (4,)))
        for name, parameter in parameters.items():
            parameter.grad = cases.like(parameter, cases.gradient(name, 1))
        if rank == 1:
            parameters["wide"].grad.to_local()[0, 0] = float("nan")
            parameters["uneven"].grad = None
        parameters["tall"].grad = None
        given = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        before = {name: grad.to_local().clone() for name, grad in given.items()}
        numbers = work(cases.groups(parameters))
        after = {name: grad.to_local() for name, grad in given.items()}
        kept = all(parameters[name].grad is grad for name, grad in given.items())
        found[utility] = before, after, numbers, kept
    return found


def disagreement(rank: int):
    """What a rank is told whose clip, or later learning rate, differs from the others'."""
    parameters = cases.fsdp(init_device_mesh("cpu", (4,)))
    optimizer = spectrim.AdamW(cases.groups(parameters), clip=2.0 if rank == 3 else 1.0)
    first = message(ValueError, lambda: cases.step(optimizer, parameters, 0))
    optimizer = spectrim.AdamW(cases.groups(parameters), clip=1.0)
    cases.step(optimizer, parameters, 0)
    if rank == 0:
        optimizer.param_groups[2]["lr"] = 0.5
    return first, message(ValueError, lambda: cases.step(optimizer, parameters, 1))


def message(kind, function) -> str:
    try:
        function()
    except kind as error:
        return str(error)
    return "nothing was raised"


def held(parameters):
    """A model that names its parameters as ``cases.fsdp`` does."""
    holder = cases.Holder({})
    for name, parameter in parameters.items():
        holder.held[name.replace(" ", "_")] = parameter
    return holder


def trained(mesh, first: int, last: int, load=None, recipe: str = "spectra"):
    parameters = cases.fsdp(mesh)
    optimizer = cases.RECIPES[recipe](
        [
            {**group, "params": [(f"held.{n.replace(' ', '_')}", p) for n, p in group["params"]]}
            for group in cases.groups(parameters)
        ]
    )
    if load is not None:
        load(held(parameters), optimizer)
    for number in range(first, last):
        cases.step(optimizer, parameters, number)
    return parameters, optimizer


def state_dict_options(rank: int):
    """Parameters after four steps, and after two, a state dict of either kind to a new optimizer, and two more."""
    mesh = init_device_mesh("cpu", (4,))
    found = {"straight": cases.whole(trained(mesh, 0, 4)[0])}
    found["straight, wrapped"] = cases.whole(trained(mesh, 0, 4, recipe="around AdamW")[0])
    for kind, recipe in {"sharded": "spectra", "full": "spectra", "sharded, wrapped": "around AdamW"}.items():
        options = StateDictOptions(full_state_dict=kind == "full")
        parameters, optimizer = trained(mesh, 0, 2, recipe=recipe)
        model = held(parameters)
        saved = get_state_dict(model, optimizer, options=options)

        def load(model, optimizer, saved=saved, options=options):
            set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)

        found[kind] = cases.whole(trained(mesh, 2, 4, load, recipe)[0])
    return found if rank == 0 else None


def save(folder: str):
    parameters, optimizer = trained(init_device_mesh("cpu", (4,)), 0, 2)
    model, state = get_state_dict(held(parameters), optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    return True


def resumed(rank: int, world: int, folder: str):
    """The parameters after two more steps from what four ranks saved."""

    def load(model, optimizer):
        saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    return cases.whole(trained(init_device_mesh("cpu", (world,)), 2, 4, load)[0])


def experts_of_unlike_spectra(rank: int) -> float:
    """The largest difference between one process and four, of which two have experts without a spike."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = cases.start(["experts"])["experts"]
    parameters = [nn.Parameter(whole.clone()), nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), Shard(2)]))]
    group = {"role": "matrix", "layout": "stack"}
    optimizers = [spectrim.Spectra([{**group, "params": [p]}], lr=1e-2, rank_ratio=0.3) for p in parameters]
    for step in range(3):
        grad = cases.gradient("experts", step)
        grad[:2] = 0.1 * torch.randn(grad[:2].shape, generator=cases.seeded(step))
        parameters[0].grad, parameters[1].grad = grad, distribute_tensor(grad, mesh, [Shard(0), Shard(2)])
        for optimizer in optimizers:
            optimizer.step()
    return float((parameters[1].full_tensor() - parameters[0]).abs().max())
