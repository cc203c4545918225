"""Whether a cluster can take a run: room for the workers of every stage, and nodes that can work together."""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING

from bdpo.cluster.node_checks import NODE_CHECKS, files_on_nodes
from bdpo.cluster.nodes import NodeFacts, node_facts
from bdpo.cluster.preflight import Check, Doubt
from bdpo.config import Config, worker_range, workers_label
from bdpo.errors import UserError, first_line
from bdpo.storage.paths import write_text
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.cluster import cluster_nodes, connect, require_capacity
from pipelines.runtime.stages import STAGES

if TYPE_CHECKING:
    from ray import ObjectRef

ANSWER_SECONDS = 120  # a node imports what the stages do before it answers


def refuse_what_does_not_fit(config: Config, run: RunDir) -> None:
    """The part of `preflight` that asks the cluster and would stop the run; one node is compared with none.

    Raises:
        UserError: the first fault that is found.
    """
    connect()
    for check in room_checks(config, run).values():
        check(config, run)
    nodes, _ = ask_nodes(config, run)
    if len(nodes) > 1:
        for check in NODE_CHECKS.values():
            check(config, run, nodes)


def room_checks(config: Config, run: RunDir) -> dict[str, Check]:
    """Room on the cluster for each stage that uses it."""
    stages = [stage(config, run) for stage in STAGES]
    sections = dict.fromkeys(stage.section for stage in stages if stage.section and stage.applies)
    return {section: partial(_check_room, section) for section in sections}


def _check_room(stage: str, config: Config, run: RunDir) -> str | Doubt:
    """The workers of a stage, by its section of the config, fit the cluster."""
    section = getattr(config, stage)
    low, _ = worker_range(section.workers)
    accelerator = getattr(section, "accelerator_type", None)
    require_capacity(stage, low, section.gpus_per_worker, accelerator=accelerator)
    found = f"{workers_label(section.workers)} workers x {section.gpus_per_worker:g} GPU"
    if accelerator:
        found += f" on {accelerator}"
    if cluster_nodes() is None:
        return Doubt(f"{found}: only KubeRay knows what it may add; compare with maxReplicas")
    return found


def ask_nodes(config: Config, run: RunDir | None) -> tuple[list[NodeFacts], list[str]]:
    """(facts, addresses): of the nodes that are up, collected by a task on each that takes no resources, and
    of those that do not answer: Ray lists a node that died for a while.

    Raises:
        UserError: none answers, or one cannot run the task.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nonce, files = uuid.uuid4().hex, files_on_nodes(config)
    root = str(run.root) if run else None
    note = run.root / f".preflight-{nonce}" if run else None
    if note:
        write_text(note, nonce)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(node_facts)
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                address = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
                asking = task.options(scheduling_strategy=here)
                asked[asking.remote(address, root, nonce, files)] = address
        return _answers(asked)
    finally:
        if note:
            note.unlink()


def _answers(asked: dict[ObjectRef[NodeFacts], str]) -> tuple[list[NodeFacts], list[str]]:
    """What came within `ANSWER_SECONDS`, and the addresses of the others."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    nodes, silent = [], []
    for answer, address in asked.items():
        try:
            nodes.append(ray.get(answer, timeout=1))
        except RayTaskError as error:
            raise UserError(
                f"node {address}: cannot run a task ({first_line(error.cause)}); run its setup commands again"
            ) from None
        except RayError:
            silent.append(address)
    if not nodes:
        raise UserError(
            f"none of {', '.join(silent)} answers: is the cluster up? `ray status` shows its nodes"
        )
    return nodes, silent
