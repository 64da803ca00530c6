"""Settings of ``spectrim plan``, and the ranks and the hardware that a projection assumes. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from spectrim.lab.errors import LabError
from spectrim.lab.models.published import PUBLISHED
from spectrim.lab.settings import Config, PositiveFloat, PositiveInt, unset

__all__ = ["DEFAULT_RECIPE", "DEFAULT_SHARD", "Cluster", "Hardware", "ParallelMode", "PlanConfig"]

DEFAULT_RECIPE = "adamw+clip"

DEFAULT_SHARD = 8
"""Ranks that share one copy with hsdp: the GPUs of a usual machine."""

ParallelMode = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The number of ranks and the layout of parameters on them.

    Attributes:
        world: ranks.
        parallel: "ddp": every rank holds everything. "fsdp": FSDP2, every parameter cut along its first dimension over
            all ranks; a stack of experts is then cut by expert. "hsdp": the same over ``shard`` ranks, in replicas.
        shard: ranks that hold one copy with "hsdp".

    Raises:
        LabError: the sizes do not fit each other.
    """

    world: int
    parallel: ParallelMode = "fsdp"
    shard: int | None = None

    def __post_init__(self) -> None:
        if self.parallel == "hsdp" and (self.shard is None or self.shard < 1 or self.world % self.shard):
            given = "is missing" if self.shard is None else str(self.shard)
            raise LabError(f"--shard {given}: hsdp on {self.world} ranks expects a divisor of {self.world}")
        if self.parallel != "hsdp" and self.shard is not None:
            raise LabError(f"--shard {self.shard}: {self.parallel} has no shard groups, only hsdp does")

    @property
    def shards(self) -> int:
        """The number of pieces that a parameter is cut into."""
        return {"ddp": 1, "fsdp": self.world, "hsdp": self.shard or 1}[self.parallel]

    @property
    def replicas(self) -> int:
        """The number of ranks that hold the same piece."""
        return self.world // self.shards


class Hardware(Config):
    """The speed of a rank. The defaults are about an H100 training in bfloat16 on a 400 Gbit/s network."""

    flops: PositiveFloat = 4e14
    """Floating-point operations that a rank achieves in a second."""
    bandwidth: PositiveFloat = 5e10
    """Bytes that a rank sends in a second."""
    tokens: PositiveInt = 8192
    """Tokens that a rank trains on in a step."""


class PlanConfig(Hardware):
    """Settings of ``spectrim plan``."""

    model: str = Field(
        default="2m",
        description="A preset of the lab, a model type of transformers, a config.json or a folder with one, or a "
        f"published shape: {', '.join(PUBLISHED)}.",
    )
    recipe: str | None = unset(f"{DEFAULT_RECIPE}; with --world, seven recipes")
    """base[+shrink][+preclip][+clip], for example adamw, adamw+clip, spectra, muon."""
    lr: PositiveFloat | None = unset("the recipe's own")
    """Peak learning rate."""
    world: PositiveInt | None = unset("none: show every parameter instead")
    """Number of ranks to project the cost of a step for."""
    parallel: ParallelMode | None = unset("fsdp")
    """How parameters lie on the ranks."""
    shard: PositiveInt | None = unset(f"{DEFAULT_SHARD} with hsdp")
    """For hsdp, ranks that share one copy."""

    @model_validator(mode="after")
    def _only_a_projection_has_ranks(self) -> Self:
        for key in ("parallel", "shard", *Hardware.model_fields):
            if self.world is None and key in self.model_fields_set:
                raise ValueError(f"--{key} {getattr(self, key)}: only for a projection; add --world")
        if self.world is not None and self.lr is not None:
            raise ValueError(f"--lr {self.lr}: the cost of a step does not depend on it; leave it out with --world")
        return self

    @property
    def cluster(self) -> Cluster | None:
        """The ranks of the projection, if there is one."""
        if self.world is None:
            return None
        shard = DEFAULT_SHARD if self.parallel == "hsdp" and self.shard is None else self.shard
        return Cluster(world=self.world, parallel=self.parallel or "fsdp", shard=shard)

    @property
    def hardware(self) -> Hardware:
        """The speed of a rank."""
        return Hardware(**{key: getattr(self, key) for key in Hardware.model_fields})
