"""How many variants (trials of a search, arms of an experiment) a cluster holds at the same time.

A comparison of sums would be wrong: a worker lies on one node, and its share of a GPU on one GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bdpo.config import Config
from bdpo.config.derive import value_at
from bdpo.errors import UserError

Nodes = Sequence[tuple[int, Mapping[str, float]]]
"""How many nodes, and the resources of each by Ray's names."""

_ACCELERATOR = "accelerator_type:"

_ROUNDING = 1e-9  # tolerance for sums of GPU shares


def max_concurrent(config: Config, nodes: Nodes | None, todo: int, key: str, share: float = 0.0) -> int:
    """How many of `todo` variants the nodes hold at the same time, at most the value of `key`.

    An arm holds its training workers, and after the training what its evaluation requires. A trial returns
    to its training after every evaluation. It therefore holds, beside its workers, `share` of a GPU for the
    evaluation as long as it runs, so that trials never wait for each other; the CPUs of its workers are idle
    while it is evaluated. If the nodes are not known (None), the config has to set the limit.

    Raises:
        UserError: the nodes hold not even one, and the message shows the arithmetic; or `train.workers` is a
            range: trainings beside each other would take each other's room.
    """
    if config.train.min_workers < config.train.max_workers:
        raise UserError(
            f"train.workers={config.train.workers}: the trainings of a search or an experiment run beside "
            "each other, each with a fixed number of workers; set one number"
        )
    limit: int | None = value_at(config, key)
    if nodes is None:
        if limit is None:
            raise UserError(f"{key}: set it; what this cluster may grow to is known to KubeRay alone")
        return limit
    fit = 0
    while fit < min(limit or todo, todo) and _hold(nodes, config, fit + 1, share):
        fit += 1
    if not fit:
        raise UserError(
            f"{key.partition('.')[0]}: one training requires {_need(config, share)}; that does not fit the "
            f"cluster of {_described(nodes)}; lower them, or use a larger cluster"
        )
    return fit


class _Node:
    """The free resources of a node."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        self.names = resources.keys()
        self.cpus = resources.get("CPU", 0.0)
        self.gpus = _parts(resources.get("GPU", 0.0))

    def take(self, cpus: float, gpus: float, accelerator: str | None = None) -> bool:
        """Reserve these resources if they are free; a share of a GPU on the fullest GPU that has it."""
        left = list(self.gpus)
        if cpus > self.cpus + _ROUNDING or (accelerator and _ACCELERATOR + accelerator not in self.names):
            return False
        for part in _parts(gpus):
            fitting = [number for number, free in enumerate(left) if part <= free + _ROUNDING]
            if not fitting:
                return False
            left[min(fitting, key=left.__getitem__)] -= part
        self.cpus, self.gpus = self.cpus - cpus, left
        return True


def _parts(gpus: float) -> list[float]:
    """A number of GPUs as whole GPUs and a share of one more."""
    whole, share = divmod(gpus, 1)
    return [1.0] * int(whole) + [share] * (share > 0)


def _hold(nodes: Nodes, config: Config, variants: int, share: float) -> bool:
    """Whether so many fit in the worst case: the evaluations are placed first, on the largest nodes."""
    train, free = config.train, [_Node(resources) for count, resources in nodes for _ in range(count)]
    free.sort(key=lambda node: len(node.gpus), reverse=True)

    def place(count: int, cpus: float, gpus: float, accelerator: str | None = None) -> bool:
        return all(any(node.take(cpus, gpus, accelerator) for node in free) for _ in range(count))

    return place(variants, 0, share) and place(
        variants * train.min_workers, 1, train.gpus_per_worker, train.accelerator_type
    )


def _need(config: Config, share: float) -> str:
    train = config.train
    count = train.min_workers
    workers, gpus = f"train.workers={count}", count * train.gpus_per_worker + share
    need = f"{count} CPU ({workers} x 1)"
    if gpus:
        need += f" and {gpus:g} GPU ({workers} x {train.gpus_per_worker:g}"
        need += f" on {train.accelerator_type}" if train.accelerator_type else ""
        need += f" + evaluate.gpus_per_worker={share:g})" if share else ")"
        need += ", each share on one GPU" if train.gpus_per_worker % 1 or share % 1 else ""
    return need


def _described(nodes: Nodes) -> str:
    """Nodes with the same resources as one entry: `8 x (16 CPU, 1 GPU, L40S)`."""
    counts: Counter[str] = Counter()
    for count, resources in nodes:
        parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
        parts += [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
        counts[", ".join(parts) or "nothing"] += count
    return " + ".join(f"{count} x ({what})" for what, count in counts.items())
