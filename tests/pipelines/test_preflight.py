"""Every broken situation is named before a GPU is taken, by its key, file or node; the sound one is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from dataclasses import replace

import pytest
import ray
from transformers import AutoModelForCausalLM

from bdpo.cluster.node_checks import NODE_CHECKS, SPARE_GIB, files_on_nodes
from bdpo.cluster.nodes import node_facts
from bdpo.cluster.preflight import Doubt, examine, expected_hours, measure_throughput
from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.models.tokenizer import load_tokenizer
from bdpo.storage.records import PACKAGES
from bdpo.storage.run_dir import RunDir
from pipelines.preflight import MAX_UPLOAD_MIB, check_upload, local_checks
from pipelines.runtime import cluster
from pipelines.runtime.admission import _answers
from pipelines.runtime.cluster import connect
from tests.support import ROOT
from tests.support.helpers import invented_pairs, save_model, tiny_config, tiny_qwen2, write_jsonl

PAIRS = 12


@pytest.fixture
def values(tmp_path, tiny_chat):
    """The plain values of a config with which nothing is wrong."""
    strongreject = tmp_path / "strongreject.csv"
    strongreject.write_text("category,source,forbidden_prompt\na,x,take the amber\n")
    config = tiny_config(
        tmp_path / "run",
        save_model(tmp_path / "model", tiny_chat),
        write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(PAIRS)),
        evaluate={"benchmarks": ["strongreject"], "strongreject": {"path": str(strongreject)}},
    )
    return config.model_dump(exclude={"attack"})


def local(values):
    """Finding by check, of everything that needs no cluster."""
    config = parse_config(values, "test")
    run = RunDir(config.run_dir)
    return {found.check: found for found in examine(local_checks(config, run), config, run)}


def levels(findings):
    return {found.check: found.level for found in findings.values()}


def test_nothing_is_wrong(values, tmp_path):
    findings = local(values)
    assert levels(findings) == dict.fromkeys(findings, "ok"), findings
    checks = {
        "model",
        "adapter",
        "adapters",
        "data",
        "benchmarks",
        "template",
        "batches",
        "storage",
        "judge",
        "search",
    }
    assert findings.keys() == checks
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("attack", "level", "named"),
    [
        ({"name": "best_of_n"}, "ok", "best_of_n on 1 requests of strongreject"),
        ({"name": "gcg", "forward_passes": 5}, "error", "attack.forward_passes=5"),
        ({"benchmark": "advbench"}, "error", "evaluate.advbench.path"),
        (
            {"name": "pair", "attacker": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}},
            "error",
            "attack.attacker.base_url",
        ),
    ],
)
def test_an_attack_is_looked_at_if_the_config_has_one(values, attack, level, named):
    assert "attack" not in local(values)
    found = local({**values, "attack": attack})["attack"]
    assert found.level == level
    assert named in found.text


def test_no_text_of_the_data_is_told(values):
    values["data"]["max_length"] = 100  # so that some are cut, and doubts told
    told = str(local(values))
    assert not any(word in told for word in ("amber", "basil", "cedar", "delta", "ember", "fern"))


def without_template(tmp_path):
    (tmp_path / "model" / "chat_template.jinja").unlink()


def truncated(tmp_path):
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def bos_twice(tmp_path):
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}" + template.read_text())


@pytest.mark.parametrize(
    ("check", "change", "damage", "named"),
    [
        ("model", {"model.name_or_path": "/nowhere"}, None, "model.name_or_path=/nowhere"),
        ("model", {}, without_template, "model.chat_template"),
        ("model", {}, truncated, "damaged weights"),
        ("data", {"data.path": "/gone.jsonl"}, None, "data.path=/gone.jsonl"),
        ("data", {"data.format": "auto", "data.path": "EMPTY"}, None, "is empty"),
        ("benchmarks", {"evaluate.strongreject.path": None}, None, "evaluate.strongreject.path"),
        ("benchmarks", {"evaluate.strongreject.path": "/gone.csv"}, None, "/gone.csv"),
        ("template", {}, bos_twice, "both write a BOS"),
        ("template", {"data.max_prompt_length": 8}, None, "prompt: longer than max_prompt_length ×10"),
        ("storage", {"run_dir": "FILE/run"}, None, "cannot be written"),
        ("search", {"tune.space": {"train.workers": [1, 2]}}, None, "train.workers is not searched"),
        ("search", {"tune.space": {"method.beta": [0.1, -1.0]}}, None, "method.beta"),
        ("search", {"tune.metric": "strongreject.speed"}, None, "tune.metric=strongreject.speed"),
    ],
)
def test_what_stops_a_run_is_an_error(values, tmp_path, check, change, damage, named):
    (tmp_path / "empty.jsonl").touch()
    for key, value in change.items():
        if isinstance(value, str):
            value = value.replace("EMPTY", str(tmp_path / "empty.jsonl"))
            value = value.replace("FILE", str(tmp_path / "pairs.jsonl"))
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[leaf] = value
    if damage:
        damage(tmp_path)
    found = local(values)[check]
    assert found.level == "error", found
    assert named in found.text
    assert "\n" not in found.text


@pytest.mark.parametrize(
    ("check", "change", "named"),
    [
        ("template", {"data": {"max_length": 48, "max_prompt_length": 47}}, "max_length=48 and may be cut"),
        ("batches", {"train": {"workers": 16}}, "some workers have no work"),
        ("batches", {"train": {"workers": [1, 16]}}, "a worker if there are 16, 8 if 1: some workers have"),
        ("batches", {"train": {"tokens_per_micro_batch": 64}}, "train.tokens_per_micro_batch=64"),
    ],
)
def test_what_may_be_meant_is_a_warning(values, check, change, named):
    for section, keys in change.items():
        values[section] = values[section] | keys
    found = local(values)[check]
    assert found.level == "warning", found
    assert named in found.text


def test_a_model_of_a_newer_transformers_is_a_warning(values, tmp_path):
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "99.0"}))
    found = local(values)["model"]
    assert found.level == "warning"
    assert "config.json is of transformers 99.0, installed is " in found.text


def test_a_judge_that_does_not_answer_stops_the_run(values):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        values["evaluate"] |= {"judge": {"name": "rubric", "model": "m", "base_url": url}}
        found = local(values)["judge"]
    assert (found.level, "no answer" in found.text) == ("error", True), found


def test_the_judge_of_the_sandbox_knows_nothing_of_real_prompts(values):
    values["evaluate"] |= {"judge": "sandbox"}
    found = local(values)["judge"]
    assert found.level == "error"
    assert "strongreject-0001 asks for nothing of the sandbox's world" in found.text


class TestNodes:
    """What nodes say of themselves; this machine is one of them."""

    @pytest.fixture
    def here(self, values, tmp_path, monkeypatch):
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".preflight-abc").write_text("abc")
        return node_facts("10.0.0.1", str(tmp_path / "run"), "abc", ())

    def judged(self, values, *nodes):
        config = parse_config(values, "test")
        return {
            found.check: found for found in examine(NODE_CHECKS, config, RunDir(config.run_dir), list(nodes))
        }

    def test_nothing_is_wrong(self, values, here):
        findings = self.judged(values, here, replace(here, address="10.0.0.2"))
        assert levels(findings) == dict.fromkeys(NODE_CHECKS, "ok"), findings
        assert set(here.versions) == {"python", *PACKAGES}

    @pytest.mark.parametrize(
        ("check", "other", "named"),
        [
            ("versions", lambda n: replace(n, versions=n.versions | {"torch": "1.0"}), "torch"),
            ("token", lambda n: replace(n, auth_mode=None), "RAY_AUTH_MODE=None"),
            ("shared storage", lambda n: replace(n, storage_error="cannot read it"), "s3://"),
        ],
    )
    def test_one_node_that_is_not_like_the_others(self, values, here, check, other, named):
        found = self.judged(values, here, replace(other(here), address="10.0.0.2"))[check]
        assert found.level == "error"
        assert "10.0.0.2" in found.text
        assert named in found.text

    def test_a_node_that_sees_another_folder(self, values, tmp_path, here):
        (tmp_path / "elsewhere").mkdir()
        other = node_facts("10.0.0.2", str(tmp_path / "elsewhere"), "abc", ())
        assert "does not see" in self.judged(values, here, other)["shared storage"].text

    def test_a_judge_without_its_key(self, values, here, monkeypatch):
        judge = {"name": "rubric", "model": "m", "base_url": "http://host/v1"}
        values["evaluate"] |= {"judge": judge | {"api_key_env": "JUDGE_KEY_OF_TESTS"}}
        assert "JUDGE_KEY_OF_TESTS is not set on 10.0.0.1" in self.judged(values, here)["judge's key"].text

    def test_a_node_without_a_file_of_the_config(self, values, tmp_path, here):
        config = parse_config(values, "test")
        gone = str(tmp_path / "gone.csv")
        other = node_facts("10.0.0.2", str(tmp_path / "run"), "abc", [*files_on_nodes(config), gone])
        found = self.judged(values, here, other)["files"]
        assert found.level == "error"
        assert f"node 10.0.0.2 has no {gone};" in found.text

    def test_files_of_the_hub_of_a_bucket_and_of_the_cache_are_no_matter_of_nodes(self, values, monkeypatch):
        model, csv = values["model"]["name_or_path"], values["evaluate"]["strongreject"]["path"]
        values["evaluate"] |= {"xstest": {"path": "s3://bucket/xstest.csv"}, "adapter": "owner/adapter"}
        assert files_on_nodes(parse_config(values, "test")) == [model, csv]
        monkeypatch.setenv("BDPO_CACHE", model)
        assert files_on_nodes(parse_config(values, "test")) == [csv]

    @pytest.mark.parametrize(
        ("script", "gib"),
        [
            ("echo 81920; echo 46080", (80.0, 45.0)),
            ("echo '[N/A]'; echo 81920", (80.0,)),
            ("echo 81920; exit 9", ()),
        ],
    )
    def test_gpus_are_as_the_driver_says_if_it_does(self, tmp_path, monkeypatch, script, gib):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        assert node_facts("10.0.0.1", None, "abc", ()).gpu_gib == gib
        tool.chmod(0o644)  # there, and not to be run
        monkeypatch.setenv("PATH", str(tool.parent))
        assert node_facts("10.0.0.1", None, "abc", ()).gpu_gib == ()

    def test_a_gpu_that_is_too_small(self, values, here):
        values["train"] |= {"gpus_per_worker": 1.0}
        small, large = (replace(here, gpu_gib=(80.0, gib)) for gib in (1e-6, 80.0))
        assert self.judged(values, here)["GPU memory"].level == "warning"  # none is up
        assert self.judged(values, here, large)["GPU memory"].level == "ok"
        assert self.judged(values, large, small)["GPU memory"].level == "error"

    @pytest.mark.parametrize(("offload", "each"), [("cpu", 16 + 12), (None, 12)])
    def test_a_node_without_memory_for_what_is_kept_there(self, values, here, offload, each):
        """By hand, bytes a trained parameter: 16 are offloaded (float32 gradient, moments, copy), and a
        checkpoint has 12 (two moments and a copy)."""
        values["train"] |= {"gpus_per_worker": 1.0, "workers": 4, "offload": offload}
        assert self.judged(values, here)["host memory"].level == "ok"  # without GPU nothing runs there
        model = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"])
        part = each * sum(p.numel() for p in model.parameters()) / 4 / 2**30
        two = replace(here, gpu_gib=(80.0, 80.0), memory_gib=2.01 * part)
        assert self.judged(values, two)["host memory"].level == "ok"
        small = replace(two, address="10.0.0.2", memory_gib=1.99 * part)
        assert self.judged(values, two, small)["host memory"].level == "warning"
        found = self.judged(values, small)["host memory"]
        assert (found.level, "10.0.0.2" in found.text) == ("error", True)

    def test_training_may_land_on_gpus_that_are_too_small(self, values, here):
        """Where the config vouches for the memory of those that it means."""
        values["train"] |= {"gpus_per_worker": 1.0, "gpu_memory": 80.0}
        mixed = replace(here, gpu_gib=(80.0, 1e-6))
        found = self.judged(values, mixed)["GPU memory"]
        assert (found.level, "train.accelerator_type" in found.text) == ("warning", True)
        values["train"] |= {"accelerator_type": "H100"}
        assert self.judged(values, mixed)["GPU memory"].level == "ok"
        values["train"] |= {"gpu_memory": None}
        found = self.judged(values, mixed)["GPU memory"]
        assert (found.level, "train.gpu_memory" in found.text) == ("warning", True)

    def test_scratch_for_the_part_of_a_checkpoint_that_is_written_there(self, values, here):
        values["train"] |= {"gpus_per_worker": 0.5, "workers": 8, "zero_stage": 3}
        # float32: a copy of each parameter and two moments; two GPUs have four of the eight workers
        part = sum(p.numel() for p in tiny_qwen2().parameters()) * 12 / 2**30 / 2
        node = replace(here, gpu_gib=(80.0, 80.0), scratch_gib=SPARE_GIB + 1.01 * part)
        assert self.judged(values, node)["scratch"].level == "ok"
        node = replace(node, scratch_gib=SPARE_GIB + 0.99 * part)
        found = self.judged(values, here, node)["scratch"]
        assert (found.level, node.address in found.text) == ("warning", True)
        head = replace(node, gpu_gib=())  # where nothing is trained
        assert self.judged(values, head)["scratch"].level == "ok"
        assert self.judged(values, replace(head, scratch_gib=1.5))["scratch"].level == "warning"


@pytest.mark.ray
def test_nodes_that_do_not_answer_are_left_out_and_named():
    """Of real tasks: one whose process dies, one that fails, one that answers."""
    connect()
    dies = ray.remote(max_retries=0)(lambda: os._exit(1))
    fails = ray.remote(max_retries=0)(lambda: 1 / 0)
    answers = ray.remote(max_retries=0)(lambda: "facts")
    asked = {dies.remote(): "10.0.0.1", answers.remote(): "10.0.0.2"}
    assert _answers(asked) == (["facts"], ["10.0.0.1"])
    with pytest.raises(UserError, match=r"none of 10\.0\.0\.1 answers"):
        _answers({dies.remote(): "10.0.0.1"})
    with pytest.raises(UserError, match=r"node 10\.0\.0\.3: cannot run a task \(division by zero\)"):
        _answers({fails.remote(): "10.0.0.3"})


class TestTime:
    def test_hours_are_tokens_over_throughput(self, values):
        values["train"] |= {"num_train_epochs": 2, "workers": 2, "gradient_checkpointing": True}
        values["score"] |= {"workers": [1, 4]}
        config = parse_config(values, "test")
        chat, rows = load_tokenizer(config.model), invented_pairs(PAIRS)
        lengths = []
        for row in rows[:10]:
            prompt = chat.prompt_ids([{"role": "user", "content": row["prompt"]}])
            responses = (chat.response_ids(row[side])[: 128 - len(prompt)] for side in ("chosen", "rejected"))
            lengths.append(len(prompt) + sum(map(len, responses)))
        each = sum(lengths) / 10
        steps, trained = 4, 4 * 8 * each  # two epochs of 12 pairs, 8 a step
        told = expected_hours(config, RunDir(config.run_dir), 7.0)
        assert isinstance(told, str)
        assert f"{PAIRS * each / 1e6:.3g} M tokens to score" in told
        assert f"{trained / 1e6:.3g} M to train in {steps} steps" in told
        assert f"{PAIRS * each / 7 / 4 / 3600:.2g} h to score" in told
        assert f"{4 * trained / 7 / 2 / 3600:.2g} h to train" in told

    def test_without_a_throughput_no_hours_are_made_up(self, values):
        config = parse_config(values, "test")
        told = expected_hours(config, RunDir(config.run_dir), None)
        assert isinstance(told, Doubt)
        assert " h " not in told.text

    def test_a_measurement_is_a_throughput(self, values):
        assert measure_throughput(parse_config(values, "test"), "cpu", seconds=0.2) > 0


H100 = {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}

L40S = {"CPU": 16, "GPU": 1, "accelerator_type:L40S": 1}


class TestRoom:
    """Workers against the nodes that a cluster can have, without one."""

    @pytest.fixture
    def of(self, monkeypatch):
        def of(*nodes):
            monkeypatch.setattr(cluster, "cluster_nodes", lambda: list(nodes))

        return of

    def test_room_is_counted_node_by_node(self, of):
        of((1, {"CPU": 64}), (2, {"CPU": 4, "GPU": 8}))
        cluster.require_capacity("train", 8, 1)  # 4 CPUs on each node with GPUs
        with pytest.raises(UserError, match=r"9 workers x 1 CPU \+ 1 GPU do not fit .* room for 8"):
            cluster.require_capacity("train", 9, 1)
        with pytest.raises(UserError, match="room for 0"):
            cluster.require_capacity("train", 1, 16)
        cluster.require_capacity("score", 32, 0.5, cpus_per_worker=0.25)

    def test_an_accelerator_is_had_where_it_is(self, of):
        of((1, {"CPU": 0}), (2, H100), (8, L40S))
        cluster.require_capacity("train", 16, 1, accelerator="H100")
        cluster.require_capacity("score", 24, 1)
        with pytest.raises(UserError, match=r"17 workers .* on H100 do not fit"):
            cluster.require_capacity("train", 17, 1, accelerator="H100")

    def test_what_an_autoscaler_can_add_counts(self, tmp_path, monkeypatch):
        shutil.copy(ROOT / "cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
        monkeypatch.setenv("HOME", str(tmp_path))
        nodes = cluster.cluster_nodes()
        assert sum(count * resources.get("GPU", 0) for count, resources in nodes) == 2 * 8 + 8
        cluster.require_capacity("train", 16, 1, accelerator="H100")
        with pytest.raises(UserError, match="25 workers"):
            cluster.require_capacity("score", 25, 1)

    def test_on_kubernetes_nothing_is_refused_that_may_come(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("RAY_CLUSTER_NAME", "bdpo-x")
        cluster.require_capacity("train", 999, 1)


class TestUpload:
    """Packed by Ray itself."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "project"
        (folder / "bdpo").mkdir(parents=True)
        (folder / "bdpo" / "code.py").write_text("x = 1\n")
        shutil.copy(ROOT / ".rayignore", folder)
        return folder

    def test_data_models_results_and_secrets_stay(self, folder):
        kept = check_upload(folder)
        for name in (
            "runs/a/x.json",
            ".venv/lib/y.py",
            "model.safetensors",
            "pairs.parquet",
            ".env",
            "a.pem",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("z" * 1000)
        assert check_upload(folder) == kept

    def test_a_repository_beside_the_code_is_not_counted_since_ray_leaves_it_out(self, folder):
        (folder / ".rayignore").unlink()
        kept = check_upload(folder)
        (folder / ".git" / "objects").mkdir(parents=True)
        (folder / ".git" / "objects" / "pack").write_bytes(bytes(2**20 * (MAX_UPLOAD_MIB + 1)))
        assert check_upload(folder) == kept

    @pytest.mark.parametrize("name", ["auth_token", "deep/api_key", "credentials"])
    def test_a_file_called_like_a_secret_is_refused(self, folder, name):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("z")
        with pytest.raises(UserError, match=f"{name}: looks like a secret"):
            check_upload(folder)

    def test_too_much_is_refused_and_the_largest_named(self, folder):
        (folder / "model.bin").write_bytes(os.urandom(2**20) * (MAX_UPLOAD_MIB + 1))
        with pytest.raises(UserError, match=r"the largest is model\.bin"):
            check_upload(folder)

    def test_this_project_is_small(self):
        files, mib = re.match(r"(\d+) files, ([\d.]+) MiB", check_upload(ROOT)).groups()
        assert int(files) > 50
        assert float(mib) < 5
