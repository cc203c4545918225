"""The whole pipeline with its run folder on a real S3 server, killed on the way."""

from __future__ import annotations

import csv
import json
import shutil
import time

import pyarrow.parquet as pq
import pytest

from bdpo.data.pairs import read_pairs
from bdpo.scoring.reference import ReferenceScorer
from bdpo.scoring.scores import read_scores
from bdpo.storage import paths
from bdpo.storage.cache import local_copy
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import write_bytes
from bdpo.storage.run_dir import RunDir
from tests.support.commands import kill_with_cluster, start_alone
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.s3_server import SECRET
from tests.support.training import launch

PAIRS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_chat):
    """A model folder, pairs, one of them bad, and two benchmarks."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", tiny_chat)
    write_jsonl(folder / "pairs.jsonl", [*invented_pairs(PAIRS), {"prompt": "x", "chosen": None}])
    (folder / "strongreject.csv").write_text("category,source,forbidden_prompt\na,x,take the amber\n")
    (folder / "xstest.csv").write_text("id,prompt,type,label,focus,note\n1,plant a fern,t,safe,,\n")
    return folder


def config_of(run_dir, inputs):
    return tiny_config(
        run_dir,
        inputs / "model",
        inputs / "pairs.jsonl",
        score={"shard_rows": 2},
        # A checkpoint is committed a second or two after its step, and long before the last one.
        train={"save_steps": 10, "num_train_epochs": 20},
        evaluate={
            "strongreject": {"path": str(inputs / "strongreject.csv")},
            "xstest": {"path": str(inputs / "xstest.csv")},
        },
    )


def start(stage, config_file, *arguments):
    # The workers of its own cluster have the key of the bucket: that of the session was started without.
    # Ray kills workers when the machine runs out of memory, whoever took it.
    arguments = f"pipelines.{stage}", *arguments, "--config", config_file
    return start_alone("-m", *arguments, RAY_memory_monitor_refresh_ms="0")


def command(stage, config_file, *arguments):
    process = start(stage, config_file, *arguments)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert SECRET not in out + err
    return out


def kill_when(process, there):
    """kill -9 of the driver, and of the cluster with it, as soon as `there` is true."""
    while process.poll() is None and not there():
        time.sleep(0.3)  # the server of the bucket is a process of this machine
    assert process.poll() is None, process.communicate()
    kill_with_cluster(process)


def scores_of(run):
    """The rows of all shards in a run folder, read by pyarrow alone."""
    shards = [pq.read_table(shard.open("rb")) for shard in paths.sorted_glob(run.scores, "part-*")]
    return [row for shard in shards for row in shard.to_pylist()]


def objects(run):
    """Name -> (ETag, time) of all objects of a run, its report and config aside."""
    found = run.root.fs.find(run.root.path, detail=True)
    names = {name.removeprefix(run.root.path + "/"): info for name, info in found.items()}
    return {
        name: (info["ETag"], info["LastModified"])
        for name, info in names.items()
        if not name.startswith(("report/", "config.yaml"))
    }


def test_the_whole_pipeline_on_object_storage(inputs, bucket, tmp_path):
    """Killed in scoring, a shard damaged, killed in training, run to the end, run again; an experiment on it.

    Judges: a scorer in this process, and a training of the same scores in a local folder, without Ray.
    """
    remote, local = RunDir(f"{bucket}/{tmp_path.name}/run"), RunDir(tmp_path / "run")
    file = tmp_path / "remote.yaml"
    file.write_text(config_of(remote.root, inputs).to_yaml())

    kill_when(start("run", file), lambda: len(paths.sorted_glob(remote.scores, "part-*")) >= 3)
    before = paths.sorted_glob(remote.scores, "part-*")
    assert not (remote.scores / "manifest.json").exists()
    damaged, *whole = before
    content = bytearray(damaged.read_bytes())
    content[40] ^= 1
    write_bytes(damaged, bytes(content))
    written = {shard.name: shard.stat().st_mtime for shard in whole}

    begun = remote.train / "begun.json"

    def committed():
        # `read_text` asks once: the command may replace the file between two requests.
        return begun.exists() and json.loads(paths.read_text(begun)).get("committed")

    kill_when(start("run", file), committed)
    assert written == {shard.name: shard.stat().st_mtime for shard in whole}
    assert scores_of(remote) == expected_scores(inputs, remote)
    assert not remote.has_model()

    out = command("run", file)
    assert f"{PAIRS} kept" in out
    for name in ("base", "trained"):
        assert json.loads((remote.eval(name) / "summary.json").read_text())["valid"]
        assert pq.read_table((remote.eval(name) / "scores.parquet").open("rb")).num_rows == 2
    assert json.loads((remote.report / "summary.json").read_text())["data"]["kept"] == PAIRS
    assert (remote.report / "mi.png").stat().st_size > 5000
    assert len((remote.private / "quarantine.jsonl").read_text().splitlines()) == 1
    assert not (remote.root / ".lock").exists()
    recoveries = json.loads((remote.train / "manifest.json").read_text())["recoveries"]
    (resumed_from,) = [note["step"] for note in recoveries if "step" in note]
    assert resumed_from > 0

    done = objects(remote)
    command("run", file)
    assert objects(remote) == done
    for name in done:
        assert SECRET.encode() not in (remote.root / name).read_bytes(), name

    for part in ("data", "scores"):
        shutil.copytree(local_copy(remote.root / part), local.root / part)
    alone = config_of(local.root, inputs)
    pq.write_table(read_scores(alone, local), local.root / "scores.parquet")
    launch([alone], alone.train.workers)
    weights = "model.safetensors"
    assert (remote.model / weights).read_bytes() == (local.model / weights).read_bytes()
    assert steps(remote) == steps(local)

    command("experiment", file, "displacement", "experiment.seeds=[0]")
    after = objects(remote)
    assert {name: after[name] for name in after if "experiments/" not in name} == done
    folder = remote.root / "experiments" / "displacement"
    rows = list(csv.DictReader((folder / "displacement.csv").read_text().splitlines()))
    assert {(row["arm"], row["pairs"]) for row in rows if row["group"] == "all"} == {
        ("dpo", str(PAIRS)),
        ("bdpo", str(PAIRS)),
    }
    assert all(float(row["change"]) != 0 for row in rows)  # the models are trained
    assert (folder / "displacement-ches.png").stat().st_size > 5000
    assert "Change of log π(y_w | x)" in (folder / "report.html").read_text()


def expected_scores(inputs, run):
    scorer = ReferenceScorer(config_of(run.root, inputs), "cpu")
    shards = [scorer.score(read_pairs(run.pairs, first, 2)) for first in range(0, PAIRS, 2)]
    return [row for shard in shards for row in shard.to_pylist()]


def steps(run):
    rows = MetricsLog(run.metrics).read()
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
