"""A run as users run it on a cluster: jobs, a bucket, the token, and nodes that die in every stage.

One cluster of process groups for all of it: a head without CPUs, and nodes that are killed as a machine
dies. The S3 server is real. What is planted (a secret in the nodes' environment, a word in every text of
the data) is looked for in all that a job shows.
"""

import csv
import json
import os

import pytest
import yaml
from helpers import tiny_config, write_jsonl
from ray_nodes import nodes, wait_until
from s3_server import SECRET

from bdpo.errors import UserError
from bdpo.runs import RunDir
from bdpo.sandbox import sandbox_folder
from bdpo.status import run_status

pytestmark = pytest.mark.ray

HARM = "plantedharmfultext"
PAIRS, STEPS, ITEMS = 240, 16, 16


@pytest.fixture(scope="module")
def config(tmp_path_factory, bucket):
    """The sandbox with a word planted in every text, small, its results in the bucket."""
    folder, world = tmp_path_factory.mktemp("jobs"), sandbox_folder()
    rows = [json.loads(line) for line in (world / "pairs.jsonl").open()]
    texts = ("prompt", "chosen", "rejected")
    write_jsonl(folder / "pairs.jsonl", [r | {key: f"{r[key]} {HARM} ." for key in texts} for r in rows])
    benchmarks = {}
    for name, column in (("strongreject", "forbidden_prompt"), ("xstest", "prompt")):
        with (world / f"{name}.csv").open() as source, (folder / f"{name}.csv").open("w") as planted:
            reader = csv.DictReader(source)
            writer = csv.DictWriter(planted, reader.fieldnames)
            writer.writeheader()
            writer.writerows(row | {column: f"{row[column]} {HARM} ."} for row in reader)
        benchmarks[f"{name}_path"] = str(folder / f"{name}.csv")
    values = tiny_config(
        folder / "run",
        "sandbox",
        folder / "pairs.jsonl",
        score={"workers": [1, 8], "shard_rows": 2, "tokens_per_batch": 64},
        train={"workers": 2, "max_steps": STEPS, "save_steps": 4, "max_failures": 3},
        evaluate={"judge": "sandbox", "limit": ITEMS, "batch_size": 1, "workers": [1, 8], **benchmarks},
    ).model_dump()
    values["data"]["limit"] = PAIRS
    values["run_dir"] = f"{bucket}/runs/first"
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def cluster(bucket):
    """The head alone; its environment, and so that of all its nodes, holds the key of the bucket."""
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    with nodes() as cluster:
        yield cluster


def state(run_dir):
    """Status by stage; nothing before the run folder is there."""
    try:
        return {stage["stage"]: stage for stage in run_status(RunDir(run_dir))}
    except UserError:
        return {}


@pytest.fixture(scope="module")
def finished(cluster, config):
    """The whole run, submitted as a job; a node dies in each of its stages, others join. Its logs."""
    run_dir = yaml.safe_load(config.read_text())["run_dir"]

    def when(reached):
        def seen():
            now = state(run_dir)
            return job.poll() is not None or (now and reached(now))

        wait_until(seen, "progress")
        assert job.poll() is None, job.stdout.read()

    first = cluster.add(cpus=2)
    with cluster.submitting("python", "-m", "pipelines.run", "--config", str(config)) as job:
        when(lambda now: now["score"]["rows"] >= 20)
        spare = cluster.add(cpus=2)
        cluster.kill(first)
        rows = state(run_dir)["score"]["rows"]
        when(lambda now: now["train"]["checkpoints"] >= 1)
        another = cluster.add(cpus=2)
        cluster.kill(spare)
        steps = state(run_dir)["train"]["steps"]
        when(lambda now: now["evaluate trained"]["answers"] >= 4)
        cluster.add(cpus=2)
        cluster.kill(another)
        answers = state(run_dir)["evaluate trained"]["answers"]
        logs, _ = job.communicate(timeout=600)
    assert job.returncode == 0, logs
    # Each was killed at work: none of the stages was done by then.
    assert rows < PAIRS
    assert steps < STEPS
    assert answers < 2 * ITEMS
    return logs


def test_a_run_survives_a_node_in_every_stage(finished, config):
    run_dir = yaml.safe_load(config.read_text())["run_dir"]
    stages = run_status(RunDir(run_dir))
    assert {stage["state"] for stage in stages} == {"done"}
    assert state(run_dir)["score"]["rows"] == state(run_dir)["prepare"]["pairs"]
    assert state(run_dir)["train"]["steps"] == STEPS


def test_its_logs_are_streamed(finished):
    for said in ("succeeded", "pairs", "scores", "training", "StrongReject"):
        assert said in finished
