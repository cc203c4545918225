"""What a cluster on AWS is made from: cluster.yaml, the image, the upload of a job, and the page.

The judge is Ray's own reading of a cluster file; it is seen to refuse one that is broken.
"""

from __future__ import annotations

import copy
import json
import re
from fnmatch import fnmatchcase
from importlib.metadata import version

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support import ROOT
from tests.support.deploy import configs_of, pinned


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def check_cluster(config):
    """As `ray up` reads it, and what this project asks of it beyond that."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    text = json.dumps(prepared)
    assert "0.0.0.0" not in text
    assert re.fullmatch(pinned(rf"rayproject/ray:{version('ray')}-py311-cu\d+"), prepared["docker"]["image"])
    options = prepared["docker"]["run_options"]
    assert {"--env RAY_AUTH_MODE=token", "--env RAY_USAGE_STATS_ENABLED=0"} <= set(options)
    (scratch,) = (option.rpartition(":")[2] for option in options if option.startswith("--volume"))
    for variable in ("TMPDIR", "BDPO_CACHE", "HF_HOME"):
        assert any(option.startswith(f"--env {variable}={scratch}") for option in options), variable
    assert "~/.ray/auth_token" in prepared["file_mounts"]
    assert any("pip install" in line and "bdpo[s3]" in line for line in prepared["setup_commands"])
    start = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--disable-usage-stats" in start
    types = prepared["available_node_types"]
    head = types[prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    for node in types.values():
        settings = node["node_config"]
        assert settings["MetadataOptions"]["HttpTokens"] == "required"
        assert settings["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        # Left out, Ray makes a security group open to the world and a role for all of S3 and EC2.
        assert settings["SecurityGroupIds"]
        assert settings["IamInstanceProfile"]
        assert all(disk["Ebs"]["Encrypted"] for disk in settings["BlockDeviceMappings"])
    gpus = {name: node["resources"].get("GPU", 0) for name, node in types.items()}
    spot = {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]}
    assert 8 in gpus.values()
    assert spot
    assert all(gpus[name] == 1 for name in spot)
    assert all(node["min_workers"] == 0 for name, node in types.items() if gpus[name])


def patterns(file):
    lines = (ROOT / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class TestClusterYaml:
    def test_ray_up_takes_it(self, cluster):
        check_cluster(cluster)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda c: c.update(head_node_type="nosuch"),
            lambda c: c.update(instances=3),
            lambda c: c["available_node_types"]["train"].pop("resources"),
            lambda c: c["available_node_types"]["head"].update(resources={"CPU": 16}),
            lambda c: c["available_node_types"]["score"]["resources"].update(GPU=0.5),
            lambda c: c["available_node_types"]["score"]["node_config"].pop("SecurityGroupIds"),
            lambda c: c["available_node_types"]["score"]["node_config"].pop("InstanceMarketOptions"),
            lambda c: c["available_node_types"]["train"]["node_config"]["MetadataOptions"].pop("HttpTokens"),
            lambda c: c.pop("head_start_ray_commands"),  # Ray's own listen on every address
            lambda c: c["docker"]["run_options"].remove("--env RAY_AUTH_MODE=token"),
            lambda c: c["docker"]["run_options"].remove("--env BDPO_CACHE=/scratch/bdpo"),
            lambda c: c["docker"]["run_options"].remove("--env RAY_USAGE_STATS_ENABLED=0"),
            lambda c: c["docker"].update(image="rayproject/ray:latest"),
            lambda c: c["docker"].update(image=c["docker"]["image"].partition("@")[0]),
            lambda c: c.update(setup_commands=["pip install ~/bdpo"]),  # which cannot read the bucket
        ],
    )
    def test_a_broken_one_is_refused(self, cluster, damage):
        damage(cluster)
        with pytest.raises((AssertionError, ValueError, KeyError, jsonschema.ValidationError)):
            check_cluster(cluster)

    def test_the_image_can_read_the_bucket(self):
        (install,) = re.findall(
            r"^RUN pip install .*", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE
        )
        assert ".[s3]" in install

    def test_every_image_is_of_the_tested_ray(self):
        for file in ("cluster.yaml", "deploy/Dockerfile"):
            tags = re.findall(r"rayproject/ray:(\S+)", (ROOT / file).read_text())
            assert tags
            assert all(tag.startswith(f"{version('ray')}-py311-cu") for tag in tags)

    def test_the_image_is_built_from_a_digest(self):
        text = (ROOT / "deploy/Dockerfile").read_text()
        (image,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
        assert image.endswith("@${RAY_DIGEST}")
        assert re.search(r"^ARG RAY_DIGEST$", text, re.MULTILINE)  # without a default: a build has to name it

    def test_the_image_leaves_out_what_an_upload_leaves_out(self):
        ignored = set(patterns(".dockerignore"))
        for pattern in [*patterns(".gitignore"), *patterns(".rayignore")]:
            plain = pattern.strip("/")
            anchored = pattern.startswith("/")
            assert any(
                fnmatchcase(f"**/{plain}", known) or (anchored and plain == known) for known in ignored
            ), pattern


class TestPage:
    """docs/cluster.md, as far as it can be followed without an account."""

    @pytest.fixture
    def commands(self):
        return "".join(
            re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
        )

    def test_every_command_has_a_config_that_can_be_read(self, commands):
        configs = configs_of(commands)
        assert len(configs) == commands.count("--config ")
        assert {config.model.name_or_path for config in configs} == {"sandbox", "Qwen/Qwen2-7B-Instruct"}

    def test_training_is_kept_on_nodes_that_the_cluster_has(self, commands, cluster):
        offered = {name for node in cluster["available_node_types"].values() for name in node["resources"]}
        wanted = {config.train.accelerator_type for config in configs_of(commands)} - {None}
        assert wanted
        assert {f"accelerator_type:{name}" for name in wanted} <= offered

    def test_every_file_that_a_preset_names_is_fetched_or_carried(self, commands):
        for config in configs_of(commands):
            for file in (config.evaluate.strongreject.path, config.evaluate.xstest.path):
                assert file == "sandbox" or re.search(rf"curl .*/{re.escape(file)}$", commands, re.MULTILINE)

    def test_every_start_of_ray_uploads_nothing_about_usage_and_keeps_its_token_to_itself(self):
        text = (ROOT / "docs" / "cluster.md").read_text()
        starts = [
            block
            for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
            if re.search(r"^ray (start|up)\b", block, re.MULTILINE)
        ]
        assert len(starts) == 2
        for block in starts:
            before = re.split(r"^ray (?:start|up)\b", block, flags=re.MULTILINE)[0]
            assert "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0\n" in before
            assert "(umask 077; ray get-auth-token --generate" in before
            assert "chmod 600 ~/.ray/auth_token" in before

    def test_every_module_and_file_is_there(self, commands):
        for module in re.findall(r"python -m (\S+)", commands):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
        for file in re.findall(r"\b(?:deploy/)?[\w-]+\.yaml", commands):
            assert (ROOT / file).is_file() or (ROOT / "pipelines" / "configs" / file).is_file(), file
