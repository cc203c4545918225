"""A run as users run it on a cluster: jobs, a bucket, the token, and nodes that die in every stage.

One cluster of process groups for all of it: a head without CPUs, and nodes that are killed as a machine
dies. The S3 server is real. What is planted (a secret in the nodes' environment, a word in every text of
the data) is looked for in all that a job shows.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import requests
import yaml

from bdpo.errors import UserError
from bdpo.sandbox import sandbox_folder
from bdpo.storage.paths import storage_path, write_bytes
from bdpo.storage.run_dir import RunDir
from pipelines.status import run_status
from tests.support.helpers import tiny_config, write_jsonl
from tests.support.ray_nodes import nodes, wait_until
from tests.support.s3_server import SECRET

HARM = "plantedharmfultext"

PAIRS, STEPS, ITEMS = 160, 240, 32


@pytest.fixture(scope="module")
def config(tmp_path_factory, bucket):
    """The sandbox with a word planted in every text, small, its pairs and results in the bucket."""
    folder, world = tmp_path_factory.mktemp("jobs"), sandbox_folder()
    rows = [json.loads(line) for line in (world / "pairs.jsonl").open()]
    texts = ("prompt", "chosen", "rejected")
    planted = [row | {key: f"{row[key]} {HARM} ." for key in texts} for row in rows]
    pairs = storage_path(f"{bucket}/inputs/pairs.jsonl", "data.path")
    write_bytes(pairs, write_jsonl(folder / "pairs.jsonl", planted).read_bytes())
    benchmarks = {}
    for name, column in (("strongreject", "forbidden_prompt"), ("xstest", "prompt")):
        with (world / f"{name}.csv").open() as source, (folder / f"{name}.csv").open("w") as copy:
            reader = csv.DictReader(source)
            writer = csv.DictWriter(copy, reader.fieldnames)
            writer.writeheader()
            writer.writerows(row | {column: f"{row[column]} {HARM} ."} for row in reader)
        benchmarks[name] = {"path": str(folder / f"{name}.csv")}
    values = tiny_config(
        folder / "run",
        "sandbox",
        pairs,
        score={"workers": [1, 8], "shard_rows": 2, "tokens_per_batch": 64},
        train={"workers": 2, "max_steps": STEPS, "save_steps": 20, "max_failures": 3},
        evaluate={
            "judge": {"name": "sandbox"},
            "limit": ITEMS,
            "batch_size": 1,
            "workers": [1, 8],
            "max_new_tokens": 24,  # enough for an answer that is looked for afterwards
            **benchmarks,
        },
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
        return {stage.stage: stage.as_json() for stage in run_status(RunDir(run_dir))}
    except UserError:
        return {}


def progress_in(metrics):
    """The metrics, once the progress of the driver is among them."""
    names = (f"ray_bdpo_stage_{name}" for name in ("done", "total", "per_second"))
    return metrics if all(re.search(rf"^{name}{{.*stage=", metrics, re.MULTILINE) for name in names) else ""


class Finished(NamedTuple):
    """What a job printed, and what the nodes' Prometheus endpoints said while it trained."""

    logs: str
    metrics: str


@pytest.fixture(scope="module")
def finished(cluster, config):
    """The whole run, submitted as a job; in each of its stages all its nodes die, and another joins."""
    run_dir = yaml.safe_load(config.read_text())["run_dir"]

    def when(reached):
        def seen():
            now = state(run_dir)
            return job.poll() is not None or (now and reached(now))

        wait_until(seen, "progress", seconds=1800, every=2)  # its requests cost half a core otherwise
        assert job.poll() is None, job.stdout.read()

    first = cluster.add(cpus=2)
    with cluster.submitting("python", "-m", "pipelines.run", "--config", str(config)) as job:
        when(lambda now: now["score"]["rows"] >= 20)
        cluster.kill(first)
        rows = state(run_dir)["score"]["rows"]
        spare = cluster.add(cpus=2)
        when(lambda now: now["train"]["checkpoints"] >= 1)
        cluster.kill(spare)
        steps = state(run_dir)["train"]["steps"]
        metrics = wait_until(lambda: progress_in(cluster.metrics()), "progress in the metrics")
        another = cluster.add(cpus=2)
        when(lambda now: now["evaluate trained"]["answers"] >= 4)
        cluster.kill(another)
        answers = state(run_dir)["evaluate trained"]["answers"]
        cluster.add(cpus=2)
        logs, _ = job.communicate(timeout=1200)
    assert job.returncode == 0, logs
    # Each was killed at work: none of the stages was done by then.
    assert rows < PAIRS
    assert steps < STEPS
    assert answers < 2 * ITEMS
    return Finished(logs, metrics)


def test_a_run_survives_a_node_in_every_stage(finished, config):
    run_dir = yaml.safe_load(config.read_text())["run_dir"]
    stages = run_status(RunDir(run_dir))
    assert {stage.state for stage in stages} == {"done"}
    assert state(run_dir)["score"]["rows"] == state(run_dir)["prepare"]["pairs"]
    assert state(run_dir)["train"]["steps"] == STEPS


def test_its_logs_are_streamed(finished):
    for said in ("succeeded", "pairs", "scores", "training", "StrongReject"):
        assert said in finished.logs


def test_progress_and_training_are_on_the_dashboard(cluster, finished):
    assert progress_in(finished.metrics)
    runs = cluster.get("/api/train/v2/runs/v1").json()["train_runs"]
    assert [run["status"] for run in runs] == ["FINISHED"]


def test_submitted_again_it_does_nothing(cluster, finished, config, bucket):
    before = results(bucket)
    code, printed = cluster.submit("python", "-m", "pipelines.run", "--config", str(config))
    assert code == 0, printed
    assert "StrongReject" in printed
    assert results(bucket) == before


def test_the_preflight_of_a_sound_config_finds_no_error(cluster, finished, config):
    code, printed = cluster.submit("python", "-m", "pipelines.preflight", "--config", str(config))
    assert code == 0, printed
    assert "shared storage" in printed


def test_a_sweep_as_a_job(cluster, finished, config, bucket):
    overrides = ["tune.num_samples=2", "tune.rungs=[1.0]", "tune.max_over_refusal=1.0", "train.max_steps=4"]
    overrides += ["data.limit=40", "score.shard_rows=40", "evaluate.batch_size=16", "evaluate.workers=1"]
    overrides += ["train.workers=1"]
    overrides += [f"run_dir={bucket}/runs/sweep"]
    code, printed = cluster.submit("python", "-m", "tune.search", "--config", str(config), *overrides)
    assert code == 0, printed
    sweep = state(f"{bucket}/runs/sweep")["search"]
    assert (sweep["state"], sweep["completed"]) == ("done", 2)


def test_a_relative_run_dir_is_refused(cluster, finished, config):
    """It would go with the job's folder."""
    command = ("python", "-m", "pipelines.run", "--config", str(config), "run_dir=runs/lost")
    code, printed = cluster.submit(*command)
    assert code == 1  # of `ray job submit`, of a job that ended with 2
    assert "run_dir=runs/lost: a job runs in a folder of its own" in printed


def test_a_broken_config_is_named_before_anything_runs(cluster, finished, config, bucket):
    broken = {
        "data.path": "/gone.jsonl",
        "evaluate.strongreject.path": "/gone.csv",
        "train.workers": 99,
        "score.gpus_per_worker": 1,
        "evaluate.judge.name": "rubric",
        "evaluate.judge.model": "m",
        "evaluate.judge.base_url": "http://127.0.0.1:9/v1",
        "evaluate.judge.api_key_env": "NOT_SET_ANYWHERE",
        "run_dir": "s3://no-such-bucket/run",
    }
    overrides = [f"{key}={value}" for key, value in broken.items()]
    code, printed = cluster.submit("python", "-m", "pipelines.preflight", "--config", str(config), *overrides)
    assert code == 1  # of `ray job submit`, of a job that ended with 2
    told = "".join(printed.replace("│", " ").split())  # a table breaks its lines anywhere
    for named in (
        "/gone.jsonl",
        "/gone.csv",
        "99workers",
        "score:1workersx",
        "NOT_SET_ANYWHERE",
        "no-such-bucket",
    ):
        assert named in told
    assert "exit code 2" in printed


def test_a_secret_in_a_runtime_env_is_refused(cluster, finished, config):
    environment = json.dumps({"env_vars": {"HF_TOKEN": "of-no-use"}})
    command = ["python", "-m", "pipelines.preflight", "--config", str(config)]
    code, printed = cluster.submit(*command, options=["--runtime-env-json", environment])
    assert code == 1
    assert "runtime_env: env_vars.HF_TOKEN looks like a secret" in printed


def test_without_the_token_nothing_is_answered(cluster, tmp_path):
    """Neither a submit, nor a look at what runs."""
    jobs = cluster.get("/api/jobs/").json()
    for path in ("/api/jobs/", "/api/v0/actors", "/nodes?view=summary"):
        assert requests.get(cluster.url + path, timeout=60).status_code == 401
    (tmp_path / "token").write_text("another-token")
    code, printed = cluster.submit("true", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert code != 0
    assert "token authentication is enabled" in printed
    assert cluster.get("/api/jobs/").json() == jobs


SHOWN = """
    /api/jobs/ /api/v0/actors?detail=1 /api/v0/tasks?detail=1 /api/v0/workers?detail=1 /api/v0/nodes?detail=1
    /api/v0/runtime_envs?detail=1 /api/v0/placement_groups?detail=1 /api/v0/tasks/timeline /logical/actors
    /events /nodes?view=summary /nodes?view=details /api/cluster_status
    /api/train/v2/runs/v1
"""


def test_nothing_that_is_planted_is_shown(cluster, finished, bucket):
    """In logs, answers of the API and the bucket: no key, no text of the data, no answer of a model."""
    answers = {
        row["response"]
        for name, content in objects(bucket).items()
        if "/private/responses/" in name
        for row in pq.read_table(io.BytesIO(content)).to_pylist()
    }
    texts = [HARM, *(answer for answer in answers if answer and len(answer) > 20)]
    assert len(texts) > 3
    logs = [file for file in cluster.folder.glob("**/session_2*/logs/**/*") if file.is_file()]
    shown = {str(file): file.read_bytes() for file in logs}
    for path in SHOWN.split():
        shown[path] = cluster.get(path).content  # an error of the dashboard may show a text too
    shown["what the job printed"] = finished.logs.encode()
    shown["metrics"] = finished.metrics.encode()
    stored = objects(bucket)
    assert any(
        HARM.encode() in content for content in map(unpacked, stored.values())
    )  # it is looked for well
    public = {
        name: unpacked(stored[name])
        for name in stored
        if not re.search("/private/|/data/pairs/|/inputs/", name)
    }
    for name, content in {**shown, **public}.items():
        assert not any(text.encode() in content for text in texts), name
    for name, content in {**shown, **stored}.items():
        assert SECRET.encode() not in content, name


def objects(bucket):
    """Name and content of every object."""
    return {
        str(file): file.read_bytes() for file in storage_path(bucket, "bucket").rglob("*") if file.is_file()
    }


def results(bucket):
    """What a run made, the report and the record of the last command aside."""
    return {
        name: content
        for name, content in objects(bucket).items()
        if not re.search(r"/report/|config\.yaml$|\.lock$", name)
    }


def unpacked(content):
    """The rows of a Parquet file as text; anything else as it is."""
    if content[:4] != b"PAR1":
        return content
    return repr(pq.read_table(io.BytesIO(content)).to_pylist()).encode()
