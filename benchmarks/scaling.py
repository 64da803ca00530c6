"""Writes docs/scaling.md: what recipes would cost on 64 to 4,096 ranks, by the cost model of the lab."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from torch import nn

from spectrim.lab.files import write_text
from spectrim.lab.planning.plan import SCALING_RECIPES, build_on_meta, optimizer_on_meta
from spectrim.lab.planning.plan_tables import scaling_rows
from spectrim.lab.planning.scaling import Projection, Work, active_parameters, project, read_work
from spectrim.lab.planning.settings import Cluster, Hardware
from spectrim.optim.spectral.orthogonalize import Orthogonalize

DOCS = Path(__file__).parent.parent / "docs"
MODELS = {
    "llama3-8b": "Llama 3 8B",
    "llama3-70b": "Llama 3 70B",
    "moe-1t": "A mixture of experts of 10¹² parameters",
}
WORLDS = (64, 256, 1024, 4096)
EXPERT_SHARDS = 128
"""Ranks that share one copy of the mixture with hsdp: three of its 384 experts each."""

TEXT = """\
# What recipes cost on many ranks

<!-- Written by benchmarks/scaling.py. Edit that. -->

**This page is arithmetic on shapes. Nothing on it was measured on an accelerator, and no claim about one is made.**

    spectrim plan --model llama3-8b --world 64 --parallel fsdp
    spectrim plan --model moe-1t --world 4096 --parallel hsdp --shard 128 --flops 4e14 --bandwidth 5e10 --json

project the cost of a recipe's step on many ranks for any model that `spectrim plan` knows. The model is built on the
meta device. `--parallel` is `fsdp` (FSDP2 over all ranks), `hsdp` (over `--shard` ranks, in replicas) or `ddp` (every
rank holds everything). Tensor parallelism is not projected.

## Formulas

P ranks hold pieces of a matrix of m outputs and n inputs. Bytes are those that a rank **sends** in a step after the
first; matrices are sent in float32. Communication of the gradients, which every optimizer needs, is left out.

| what | bytes sent by a rank, mean |
|---|---|
| entry-wise | 48·(P−1)/P for a parameter |
| shrinkage | 16·(P−1)/P more for a matrix |
| clip, orthogonalize | 8·m·n·(P−1)/P² |
| Spectra | 12·k·n·(P−1)/P + 16·(2k² + k + 2)·(P−1)/P, k = 0.015·min(m, n) |
| gathered, to compare | 4·m·n·(P−1)/P |
| experts | 0 |
| ddp | 0 |

- Entry-wise: every rank updates its own entries. A squared norm and two flags per parameter are summed over the ranks,
  in one reduction of float64, which sends each number twice. Shrinkage also sums a scale, clipping of a vector its
  norm.
- Clip and orthogonalize: the pieces are sent to one owner, 4·m·n·(P−1)/P bytes, and the results back. Matrices have
  different owners, so the mean over ranks is a P-th of that.
- Spectra: three times k columns are sent. V is gathered, MᵀU is summed into shards, and gathered for the step. Two k x
  k Gram matrices make U orthonormal; lengths of columns and two norms are summed. A matrix that is stored transposed is
  cut along its inputs, and sends 8·k·m·(P−1)/P.
- Gathered: every rank receives the whole matrix and does the same work as all others.
- Experts: FSDP2 cuts a stack of experts by expert, so each lies whole on a rank.
- hsdp with S ranks a copy and R replicas: P is S above, but any rank can be an owner. It receives the pieces of one
  replica and sends the result to all ranks with a piece: 4·m·n·((S−1)/S + R − 1/S)/(S·R). The same holds for experts,
  whose work the replicas share.
- ddp: every rank does everything.

Matrices are read as `describe` shows them. `adamw+clip`, `signum+clip` and `ademamix+clip` clip embeddings and head as
matrices too.

Operations are multiplications and additions. `spectrim plan` counts them by running every operator on the meta device,
as an accelerator would run it, and adds {entrywise} for an entry of AdamW and 11 more with shrinkage.

For a matrix of 4096 x 14336 that is {clip_gflop} GFLOP to clip, {polar_gflop} to orthogonalise and {spike_gflop} for
Spectra. Tests compare these counts with the operations that run, the state with FSDP2's shards, and the bytes with
those that four ranks record with fsdp and hsdp.

State, over the number of pieces: AdamW 8 bytes a parameter, AdEMAMix 12, Signum and Momentum 4; Muon 4·m·n and Spectra
4·(m·n + n·k) for a matrix, and AdamW's 8 elsewhere.

A step of training is 6 operations for each parameter that is active for a token and {tokens:,} tokens a rank, at
{flops:g} operations a second (about what an H100 achieves in bfloat16); a rank sends {bandwidth:g} bytes a second (400
Gbit/s). **share** is optimizer / (training + optimizer). The optimizer's time is that of the busiest rank's operations
at the same rate, plus that of the most bytes that a rank sends. The share falls about as 1 over `--tokens`.

Limits, and the direction of their error:

- The optimizer's products are float32, which accelerators run slower than bfloat16, by a factor that depends on the
  precision allowed: the operations' part is too small by that factor.
- Entry-wise work is limited by memory, not by operations. AdamW's share is near zero here, but not in practice. All
  recipes have most of that traffic in common: read differences between recipes.
- The implementation overlaps communication with computation, and this projection does not: the bytes' part is too
  large.
- Latency and the network's topology are left out. Latency dominates small pieces, so thousands of ranks look too good.
- All matrices are assigned to owners at once, the largest first. The implementation works in rounds of matrices that
  fit its memory, and gives each to the owner with the least work so far, which is somewhat less even.

## Results

{findings}

{tables}
"""


@dataclass(frozen=True)
class Planned:
    """A model on the meta device, with the work of every recipe."""

    model: nn.Module
    work: dict[str, list[Work]]
    active: float

    @classmethod
    def of(cls, name: str) -> "Planned":
        model = build_on_meta(name)
        work = {recipe: read_work(optimizer_on_meta(model, name, recipe)) for recipe in SCALING_RECIPES}
        return cls(model, work, active_parameters(model, work["adamw"]))

    def on(self, cluster: Cluster) -> dict[str, Projection]:
        return {
            recipe: project(recipe, work, cluster, Hardware(), active=self.active) for recipe, work in self.work.items()
        }


def main() -> None:
    planned = {name: Planned.of(name) for name in MODELS}
    clusters = {name: [Cluster(world=world) for world in WORLDS] for name in MODELS}
    clusters["moe-1t"] += [
        Cluster(world=world, parallel="hsdp", shard=EXPERT_SHARDS) for world in WORLDS if world > EXPERT_SHARDS
    ]
    clusters["llama3-8b"].append(Cluster(world=WORLDS[0], parallel="ddp"))
    projected = {name: {cluster: planned[name].on(cluster) for cluster in clusters[name]} for name in MODELS}
    text = TEXT.format(
        entrywise=planned["llama3-8b"].work["adamw"][0].entry_flops,
        clip_gflop=f"{one_matrix(planned['llama3-8b'], 'adamw+clip') / 1e9:,.0f}",
        polar_gflop=f"{Orthogonalize().flops(4096, 14_336) / 1e9:,.0f}",
        spike_gflop=f"{one_matrix(planned['llama3-8b'], 'spectra') / 1e9:,.0f}",
        tokens=Hardware().tokens,
        flops=Hardware().flops,
        bandwidth=Hardware().bandwidth,
        findings=findings(projected),
        tables="\n\n".join(section(name, planned[name], projected[name]) for name in MODELS),
    )
    write_text(DOCS / "scaling.md", text)


def one_matrix(planned: Planned, recipe: str) -> float:
    """Operations of a recipe on an up projection of Llama 3 8B, entry-wise ones left out."""
    work = next(item for item in planned.work[recipe] if item.shape == (14_336, 4096))
    return sum(work.whole_flops) + work.spike_flops


def findings(projected: dict[str, dict[Cluster, dict[str, Projection]]]) -> str:
    """What the tables say, for and against each recipe."""
    small, large, mixture = (projected[name] for name in MODELS)
    few, many = Cluster(world=WORLDS[0]), Cluster(world=WORLDS[-1])
    hybrid = Cluster(world=WORLDS[-1], parallel="hsdp", shard=EXPERT_SHARDS)
    everywhere = Cluster(world=WORLDS[0], parallel="ddp")
    clip, clip_many = small[few]["adamw+clip"], small[many]["adamw+clip"]
    muon, muon_many = small[few]["muon"], small[many]["muon"]
    spectra, spectra_many = small[few]["spectra"], small[many]["spectra"]
    muon_large, adamw_mixture = large[many]["muon"], mixture[many]["adamw"].cost
    muon_mixture, muon_hybrid = mixture[many]["muon"], mixture[hybrid]["muon"]
    ranks = f"{many.world:,} ranks"
    states = ", ".join(
        f"`{recipe}` {large[few][recipe].cost.state_bytes / 1e9:.2f} GB"
        for recipe in ("adamw", "spectra", "muon", "ademamix+clip")
    )
    lines = [
        f"Gathering whole matrices costs most. On {ranks} `muon` would take {muon_many.gathered_share:.0%} of a step "
        f"of the 8B model and {muon_large.gathered_share:.0%} of one of the 70B model, against {muon_many.share:.1%} "
        f"and {muon_large.share:.1%} with owners, and ranks would send "
        f"{muon_large.gathered.bytes_sent / muon_large.cost.bytes_sent:,.0f} times the bytes on the mean.",
        f"**Against clipping and Muon:** an owner is one rank, so time stops falling once there are fewer matrices "
        f"than ranks. `adamw+clip` on the 8B model takes {clip.share:.1%} of a step on {few.world} ranks and still "
        f"{clip_many.share:.1%} on {many.world:,}. Embedding and head, 128256 x 4096, are the largest matrices: their "
        f"owners do {clip_many.cost.busiest_flops / 1e12:,.0f} TFLOP where the mean is "
        f"{clip_many.cost.flops / 1e12:.2f}. `muon`, which leaves those two to AdamW, goes from {muon.share:.1%} to "
        f'{muon_many.share:.1%}; `clip_scope="matrices"` would do the same for clipping.',
        f"**Against Spectra:** its bytes do not fall with the number of ranks, those of owners do (12·k·n against "
        f"8·m·n/P). On the 8B model it sends more than Muon on the mean beyond about "
        f"{few.world * muon.cost.bytes_sent / spectra.cost.bytes_sent:.0f} ranks: "
        f"{spectra_many.cost.bytes_sent / 1e6:,.0f} MB against {muon_many.cost.bytes_sent / 1e6:,.0f} on {ranks}. "
        f"It needs {muon.cost.flops / spectra.cost.flops:,.0f} times fewer operations than Muon, and they "
        f"are cut as finely as the matrices: {spectra.share:.1%} of a step on {few.world} ranks, "
        f"{spectra_many.share:.1%} on {many.world:,}, nearly all of it bytes.",
        f"**Against clipping and Muon for mixtures of experts:** the optimizer works on all experts, a token on eight "
        f"of 384. On {few.world} ranks `adamw+clip` would take {mixture[few]['adamw+clip'].share:.0%} of a step and "
        f"`muon` {mixture[few]['muon'].share:.0%}; `spectra` {mixture[few]['spectra'].share:.1%}.",
        f"**Against plain FSDP for experts:** on {ranks} 384 hold one expert of every layer and the others none. The "
        f"first holds {adamw_mixture.largest_state_bytes / 1e9:.1f} GB of AdamW's state where the mean is "
        f"{adamw_mixture.state_bytes / 1e9:.1f}. With hsdp over {EXPERT_SHARDS} the replicas share the experts' "
        f"matrices, but a rank then sends {muon_hybrid.cost.bytes_sent / 1e9:.0f} GB of results to the others and "
        f"holds {muon_hybrid.cost.largest_state_bytes / 1e9:.0f} GB of Muon's state: {muon_hybrid.share:.1%} of a step "
        f"instead of {muon_mixture.share:.1%}.",
        f"**Against clipping and Muon with ddp:** every rank does all the work. `adamw+clip` would take "
        f"{small[everywhere]['adamw+clip'].share:.0%} of a step of the 8B model, at any number of ranks.",
        f"Shrinkage sends {small[many]['adamw+shrink'].cost.bytes_sent / 1e3:.1f} kB a step for the 8B model, at any "
        f"number of ranks.",
        f"State of the 70B model, a rank of {few.world}: {states}.",
    ]
    return "\n".join(wrap(f"- {line}", indent="  ") for line in lines)


def wrap(text: str, indent: str = "") -> str:
    return fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def section(name: str, planned: Planned, projected: dict[Cluster, dict[str, Projection]]) -> str:
    """A heading, and one table for every cluster."""
    parameters = sum(parameter.numel() for parameter in planned.model.parameters())
    met = "" if planned.active == parameters else f", of which a token meets {planned.active:,.0f}"
    parts = [
        f"## {MODELS[name]}",
        wrap(
            f"`{name}`: {parameters:,} parameters{met}. Means over ranks; in brackets the rank that has most, where "
            f"that differs. Gathered: whole matrices on every rank, to compare."
        ),
    ]
    for cluster, projections in projected.items():
        layout = {"fsdp": "fsdp", "ddp": "ddp, at any number", "hsdp": f"hsdp over {cluster.shard}"}[cluster.parallel]
        parts += [f"### {cluster.world:,} ranks, {layout}", markdown(scaling_rows(list(projections.values())))]
    return "\n\n".join(parts)


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows that share their columns."""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
