"""How many trials of a search, or arms of an experiment, a cluster holds: workers on nodes and GPUs.

Sums would not do: a worker lies on one node, and its share of a GPU on one GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bdpo.config import Config
from bdpo.errors import UserError

Nodes = Sequence[tuple[int, Mapping[str, float]]]  # how many, and the resources of each by Ray's names

_ACCELERATOR = "accelerator_type:"

_ROUNDING = 1e-9  # of sums of shares


def at_a_time(
    config: Config, nodes: Nodes | None, of: int, most: int | None, key: str, share: float = 0.0
) -> int:
    """How many of `of` trials, or arms, the nodes hold, at most `most`, from `key`.

    An arm has its training workers, and its evaluation after them. A trial goes back to its workers when it
    is evaluated: it keeps `share` of a GPU for that beside them as long as it lives, so that trials never
    wait for each other, and their processors, which wait meanwhile. Of nodes that cannot be known (None) the
    config has to say it.

    Raises:
        UserError: not even one; the message has the arithmetic.
    """
    if nodes is None:
        if most is None:
            raise UserError(f"{key}: set it; what this cluster may grow to is known to KubeRay alone")
        return most
    fit = 0
    while fit < min(most or of, of) and _hold(nodes, config, fit + 1, share):
        fit += 1
    if not fit:
        raise UserError(
            f"{key.partition('.')[0]}: one training needs {_need(config, share)}; that does not fit the "
            f"cluster of {_described(nodes)}; lower them, or use a larger cluster"
        )
    return fit


class _Node:
    """What is free of a node."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        self.names = resources.keys()
        self.cpus = resources.get("CPU", 0.0)
        self.gpus = _parts(resources.get("GPU", 0.0))

    def take(self, cpus: float, gpus: float, accelerator: str | None = None) -> bool:
        """Take so much if it is there: a share from the fullest GPU that has it, as Ray does."""
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
    """Whole GPUs, and a share of another."""
    whole, share = divmod(gpus, 1)
    return [1.0] * int(whole) + [share] * (share > 0)


def _hold(nodes: Nodes, config: Config, trials: int, share: float) -> bool:
    """Whether there is room for so many, at worst: evaluations come first, and take of the largest nodes."""
    train, free = config.train, [_Node(resources) for count, resources in nodes for _ in range(count)]
    free.sort(key=lambda node: len(node.gpus), reverse=True)

    def place(count: int, cpus: float, gpus: float, accelerator: str | None = None) -> bool:
        return all(any(node.take(cpus, gpus, accelerator) for node in free) for _ in range(count))

    return place(trials, 0, share) and place(
        trials * train.workers, 1, train.gpus_per_worker, train.accelerator_type
    )


def _need(config: Config, share: float) -> str:
    train = config.train
    workers, gpus = f"train.workers={train.workers}", train.workers * train.gpus_per_worker + share
    need = f"{train.workers} CPU ({workers} x 1)"
    if gpus:
        need += f" and {gpus:g} GPU ({workers} x {train.gpus_per_worker:g}"
        need += f" on {train.accelerator_type}" if train.accelerator_type else ""
        need += f" + evaluate.gpus_per_worker={share:g})" if share else ")"
        need += ", each share on one GPU" if train.gpus_per_worker % 1 or share % 1 else ""
    return need


def _described(nodes: Nodes) -> str:
    """Alike nodes as one: `8 x (16 CPU, 1 GPU, L40S)`."""
    counts: Counter[str] = Counter()
    for count, resources in nodes:
        parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
        parts += [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
        counts[", ".join(parts) or "nothing"] += count
    return " + ".join(f"{count} x ({what})" for what, count in counts.items())
