"""What a cluster is made from: cluster.yaml, the KubeRay manifest, the image, the upload of a job.

The judges are Ray's own reading of a cluster file, Kubernetes' published schemas for pods, and the fields
that KubeRay 1.5's API reference gives a RayJob; each is seen to refuse a file that is broken.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from importlib.metadata import version

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from bdpo.config import load_config
from bdpo.errors import UserError
from tests.support import ROOT

KUBERNETES = "1.34"


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def rayjob():
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


def check_cluster(config):
    """As `ray up` reads it, and what this project asks of it beyond that."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    text = json.dumps(prepared)
    assert "0.0.0.0" not in text
    assert f"rayproject/ray:{version('ray')}-py311-cu" in prepared["docker"]["image"]
    options = prepared["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (scratch,) = (option.rpartition(":")[2] for option in options if option.startswith("--volume"))
    for variable in ("TMPDIR", "BDPO_CACHE", "HF_HOME"):
        assert any(option.startswith(f"--env {variable}={scratch}") for option in options), variable
    assert "~/.ray/auth_token" in prepared["file_mounts"]
    assert any("pip install" in line and "bdpo[s3]" in line for line in prepared["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in " ".join(prepared["head_start_ray_commands"])
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


def configs_of(commands):
    """The config of every command line with `--config`, as the command would read it, overrides and all."""
    found = []
    for line in commands.replace("\\\n", " ").replace('"', " ").splitlines():
        words = shlex.split(line, comments=True)
        if "--config" in words:
            file, *rest = words[words.index("--config") + 1 :]
            found.append(load_config(ROOT / file, [word for word in rest if not word.startswith("--")]))
    return found


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
            lambda c: c["docker"].update(image="rayproject/ray:latest"),
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


class Template(yaml.SafeLoader):
    """CloudFormation's YAML: what is behind `!Ref` and its like is read as if they were not there."""


Template.add_multi_constructor(
    "!",
    lambda loader, _, node: (
        loader.construct_sequence(node)
        if isinstance(node, yaml.SequenceNode)
        else loader.construct_scalar(node)
    ),
)


class TestAccount:
    """deploy/aws.yaml: what cluster.yaml names of an account, and no more rights than that."""

    @pytest.fixture
    def stack(self):
        return yaml.load((ROOT / "deploy" / "aws.yaml").read_text(), Template)

    def properties(self, stack, kind):
        return [r["Properties"] for r in stack["Resources"].values() if r["Type"] == f"AWS::{kind}"]

    def test_it_makes_the_profiles_that_the_nodes_want(self, stack, cluster):
        wanted = {
            node["node_config"]["IamInstanceProfile"]["Name"]
            for node in cluster["available_node_types"].values()
        }
        made = self.properties(stack, "IAM::InstanceProfile")
        assert {profile["InstanceProfileName"] for profile in made} == wanted
        assert all(profile["Roles"][0] in stack["Resources"] for profile in made)

    def test_only_the_nodes_of_this_cluster_are_ended(self, stack, cluster):
        statements = [
            statement
            for role in self.properties(stack, "IAM::Role")
            for policy in role.get("Policies", [])
            for statement in policy["PolicyDocument"]["Statement"]
            if "ec2:TerminateInstances" in statement["Action"]
        ]
        tagged = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster["cluster_name"]}}
        assert [statement["Condition"] for statement in statements] == [tagged]

    def test_nothing_is_open_to_the_world(self, stack):
        assert "0.0.0.0" not in json.dumps(stack)
        (bucket,) = self.properties(stack, "S3::Bucket")
        assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
        (group,) = self.properties(stack, "EC2::SecurityGroup")
        assert [rule["CidrIp"] for rule in group["SecurityGroupIngress"]] == ["SshFrom"]
        allowed = stack["Parameters"]["SshFrom"]["AllowedPattern"]
        assert re.fullmatch(allowed, "203.0.113.7/32")
        assert not any(re.fullmatch(allowed, wide) for wide in ("0.0.0.0/0", "10.0.0.0/8", "203.0.113.7"))


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

    def test_every_module_and_file_is_there(self, commands):
        for module in re.findall(r"python -m (\S+)", commands):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
        for file in re.findall(r"\b(?:deploy/)?[\w-]+\.yaml", commands):
            assert (ROOT / file).is_file() or (ROOT / "pipelines" / "configs" / file).is_file(), file


def an_object(required, **fields):
    """A JSON schema that knows these fields alone."""
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


TEXT, NUMBER, FLAG, TEXTS = (
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
    {"type": "object", "additionalProperties": {"type": "string"}},
)

# Of the API reference of ray.io/v1: the fields that a RayJob of one's own cluster may have. Pods are {}: they
# have a schema of their own.
GROUP = {"rayStartParams": TEXTS, "template": {}}

RAYJOB = an_object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object"},
    spec=an_object(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        backoffLimit=NUMBER,
        activeDeadlineSeconds=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        rayClusterSpec=an_object(
            ["headGroupSpec"],
            rayVersion=TEXT,
            authOptions=an_object(["mode"], mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=an_object(
                [],
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds=NUMBER,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            headGroupSpec=an_object(["template"], serviceType=TEXT, enableIngress=FLAG, **GROUP),
            workerGroupSpecs={
                "type": "array",
                "items": an_object(
                    ["groupName", "template"],
                    groupName=TEXT,
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                    numOfHosts=NUMBER,
                    **GROUP,
                ),
            },
        ),
    ),
)


def check_rayjob(job):
    """KubeRay's fields, Kubernetes' pods, and what this project asks of both."""
    jsonschema.validate(job, RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}
    for name, group in groups.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            limits = container["resources"]["limits"]
            params = group["rayStartParams"]
            assert float(params.get("num-gpus", 0)) == float(limits.get("nvidia.com/gpu", 0))
            assert int(params["num-cpus"]) in (0, int(limits["cpu"]))
            (scratch,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "scratch")
            places = {variable["name"]: variable["value"] for variable in container["env"]}
            assert all(places[name].startswith(scratch) for name in ("TMPDIR", "BDPO_CACHE", "HF_HOME"))
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    assert groups["head"]["serviceType"] == "ClusterIP"
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    (training,) = configs_of(job["spec"]["entrypoint"])
    offered = json.loads(json.loads(groups["train"]["rayStartParams"]["resources"]))
    assert f"accelerator_type:{training.train.accelerator_type}" in offered


class TestRayJob:
    def test_the_manifest_is_valid(self, rayjob):
        check_rayjob(rayjob)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda j: j.update(kind="RayCluster"),
            lambda j: j["spec"].update(entryPoint="x"),
            lambda j: j["spec"].update(backoffLimit="2"),
            lambda j: j["spec"]["rayClusterSpec"].pop("headGroupSpec"),
            lambda j: j["spec"]["rayClusterSpec"].pop("authOptions"),
            lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(groupname="x"),
            lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"].replace("H100", "A100")),
            lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"].replace("run_dir", "rundir")),
            lambda j: first_container(j)["env"].pop(1),
            lambda j: first_container(j).update(comand=["x"]),
            lambda j: first_container(j)["resources"]["limits"].update({"nvidia.com/gpu": "4"}),
            lambda j: first_container(j)["env"].append({"name": "X", "values": "1"}),
        ],
    )
    def test_a_broken_one_is_refused(self, rayjob, damage):
        damage(rayjob)
        with pytest.raises((AssertionError, KeyError, UserError, jsonschema.ValidationError)):
            check_rayjob(rayjob)


def first_container(job):
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return worker["template"]["spec"]["containers"][0]
