"""What the nodes report of themselves against what a run requires of them; see `bdpo.cluster.preflight`."""

from __future__ import annotations

from collections.abc import Sequence

from bdpo.cluster.nodes import NodeFacts
from bdpo.cluster.preflight import Check, Doubt
from bdpo.config import Config, TrainConfig
from bdpo.errors import UserError
from bdpo.storage.cache import cache_folder
from bdpo.storage.paths import local_path
from bdpo.storage.run_dir import RunDir
from bdpo.training.memory import (
    GIB,
    checkpoint_bytes,
    gpu_memory,
    memory_need,
    model_shape,
    require_gpu_memory,
)

SPARE_GIB = 5
"""Free space in each node's temporary folder, for Ray's logs and the objects that it spills."""


def files_on_nodes(config: Config) -> list[str]:
    """Models and benchmarks that the config names in folders of this machine: every node reads them too.

    What lies in the cache folder a node makes for itself.
    """
    named = [config.model.name_or_path, *config.evaluate.files()]
    here = {name: local_path(name) for name in named}
    cache = cache_folder().resolve()
    return [n for n, path in here.items() if path.exists() and not path.resolve().is_relative_to(cache)]


def check_nodes_alike(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str:
    """Every node has the same versions of what the stages import."""
    first, *others = nodes
    for node in others:
        for name, here in first.versions.items():
            if node.versions.get(name) != here:
                raise UserError(
                    f"nodes {first.address} and {node.address} differ: {name} {here} and "
                    f"{node.versions.get(name)}; give all nodes one image, or run their setup commands again"
                )
    return f"{len(nodes)} with " + ", ".join(f"{name} {version}" for name, version in first.versions.items())


def check_token(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str:
    """No node answers to whoever asks."""
    for node in nodes:
        if node.auth_mode != "token":
            raise UserError(
                f"node {node.address}: RAY_AUTH_MODE={node.auth_mode}, whoever reaches it runs code there; "
                "start Ray with RAY_AUTH_MODE=token and a token on every node"
            )
    return "RAY_AUTH_MODE=token on every node"


def check_shared(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str:
    """What one node writes to the run folder, every node reads."""
    for node in nodes:
        if node.storage_error:
            raise UserError(
                f"run_dir={run.root}: node {node.address} {node.storage_error}; put it on s3://, gs:// or a "
                "folder that is mounted on every node"
            )
    return f"run_dir={run.root}: seen by {len(nodes)} nodes"


def check_files(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str:
    """Models and benchmarks in folders are on every node."""
    for node in nodes:
        if node.missing:
            raise UserError(
                f"node {node.address} has no {', '.join(node.missing)}; put it into a folder that is mounted "
                "on every node, or copy it there"
            )
    return f"{len(files_on_nodes(config))} named, on every node"


def check_key(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str:
    """Where a judge or an attacker requires a key, the nodes have it."""
    keys = {
        "evaluate.judge": config.evaluate.judge.key_variable,
        "attack.attacker": config.attack.key_variable,
    }
    for section, name in keys.items():
        without = [node.address for node in nodes if name and name not in node.variables]
        if without:
            raise UserError(
                f"{section}.api_key_env: the environment variable {name} is not set on "
                f"{', '.join(without)}; set it there before Ray starts"
            )
    found = ", ".join(dict.fromkeys(name for name in keys.values() if name))
    return f"{found}: set on every node" if found else "none is asked for"


def check_scratch(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str | Doubt:
    """Room for a checkpoint on its way to the run folder, on each node for the part of its workers."""
    checkpoint = checkpoint_bytes(config, model_shape(config)[0]) / GIB
    for node in nodes:
        need = SPARE_GIB + checkpoint * _share(config.train, node)
        if node.scratch_gib < need:
            return Doubt(
                f"node {node.address}: {node.scratch_gib:.1f} GiB free in its temporary folder, where a "
                f"checkpoint may need {need:.1f}; set TMPDIR to a larger disk there"
            )
    free = min(node.scratch_gib for node in nodes)
    return (
        f"{free:.0f} GiB or more free in every node's temporary folder; a checkpoint is {checkpoint:.1f} GiB"
    )


def _share(train: TrainConfig, node: NodeFacts) -> float:
    """The part of the workers that may be on a node."""
    if not train.gpus_per_worker:
        return 1.0
    return min(1.0, len(node.gpu_gib) / train.gpus_per_worker / train.min_workers)


def check_memory(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str | Doubt:
    """The training fits `train.gpu_memory`, or the smallest GPU of the nodes that are up."""
    train = config.train
    if train.gpus_per_worker == 0:
        return "no GPU is asked for"
    need = memory_need(config, model_shape(config)[0])
    smallest = min((gib * GIB for node in nodes for gib in node.gpu_gib), default=None)
    # Nodes do not report which of their GPUs are of the accelerator type.
    known = gpu_memory(train) or (None if train.accelerator_type else smallest)
    require_gpu_memory(config, need, known)
    found = f"{need.gpu_total / GIB:.1f} GiB of each GPU"
    if known is None:
        return Doubt(f"{found}: nothing is known of the GPUs to compare; set train.gpu_memory")
    if smallest is not None and smallest < need.gpu_total and train.accelerator_type is None:
        return Doubt(
            f"{found}, and some that are up have {smallest / GIB:.0f}: training may get those; set "
            "train.accelerator_type to keep it off them"
        )
    return f"{found}, which has {known / GIB:.0f}"


def check_host(config: Config, run: RunDir, nodes: Sequence[NodeFacts]) -> str | Doubt:
    """What the training keeps in the memory of the nodes fits there, for all workers that a node's GPUs take.

    That is what is offloaded, and the copies from which checkpoints are written.
    """
    train = config.train
    if train.offload == "nvme" or not train.gpus_per_worker:
        return "not looked at: states are on NVMe, or all of the training is in it"
    each = memory_need(config, model_shape(config)[0]).host_total / GIB
    wanted = {node.address: each * train.min_workers * _share(train, node) for node in nodes}
    small = [node for node in nodes if node.memory_gib < wanted[node.address]]
    if not small:
        return f"{each:.1f} GiB for each worker"
    node = max(small, key=lambda node: node.memory_gib)
    found = (
        f"node {node.address} has {node.memory_gib:.0f} GiB, and the training may keep "
        f"{wanted[node.address]:.0f} there (copies of its checkpoint, and what train.offload puts there)"
    )
    if len(small) < sum(need > 0 for need in wanted.values()):
        return Doubt(f"{found}; set train.accelerator_type to keep training on larger nodes")
    raise UserError(
        f"{found}; use nodes with more memory, more nodes with fewer GPUs each, or no train.offload"
    )


NODE_CHECKS: dict[str, Check] = {
    "versions": check_nodes_alike,
    "token": check_token,
    "shared storage": check_shared,
    "files": check_files,
    "judge's key": check_key,
    "scratch": check_scratch,
    "GPU memory": check_memory,
    "host memory": check_host,
}
