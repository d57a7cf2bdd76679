"""cluster: where work runs, and what it may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistill.config.section import Count, Section, Weight


class Cluster(Section):
    address: str | None = None
    """Ray cluster to join; null: start one on this machine for the time of the command."""
    teacher_actors: tuple[Count, Count] = (1, 4)
    """Fewest and most teacher actors. The plan lowers the second to what fits."""
    generator_actors: tuple[Annotated[int, Field(ge=0)], Count] = (1, 8)
    """Fewest and most generator actors at once, while `generate` runs. Before and after it there are none."""
    generator_labels: dict[str, str] | None = None
    """Node labels that generator actors ask for, as {pool: spot}; null: any node."""
    generator_fallback: dict[str, str] | None = None
    """Labels to fall back on where no node has the first, {} for any node; null: wait for one."""
    threads: Count | None = None
    """Threads of torch in each teacher and train process, at most the node's cores; null: a share of the cores that a
    cgroup and OMP_NUM_THREADS allow."""
    spill_directory: str | None = None
    """Where Ray on this machine writes what its memory does not hold; null: in Ray's folder, under /tmp."""
    grows_to: dict[Literal["CPU", "GPU"], Annotated[float, Field(ge=0)]] | None = None
    """CPUs and GPUs that the cluster's autoscaler may start at most, as {CPU: 48, GPU: 6}; null: what is there."""

    price_per_hour: Weight | None = None
    """Cost of the machines an hour, in any currency, for the forecast and the bill of `tune`; null: only seconds."""
    prices: dict[str, Weight] = Field(default_factory=dict)
    """Cost of a node of each type an hour, as {train: 0.98, spot: 0.35, head: 0.4}, by the node's label `pool`."""

    @model_validator(mode="after")
    def _ordered(self) -> Cluster:
        for key in ("teacher_actors", "generator_actors"):
            fewest, most = getattr(self, key)
            if fewest > most:
                raise ValueError(
                    f"cluster.{key} is (fewest, most); {[fewest, most]} has them the wrong way round; write "
                    f"{[most, fewest]}"
                )
        return self
