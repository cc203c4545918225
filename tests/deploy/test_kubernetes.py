"""The KubeRay manifest and the network policy.

The judges are Kubernetes' published schemas, and the fields that KubeRay 1.5's API reference gives a RayJob;
each is seen to refuse a file that is broken.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version

import jsonschema
import kubernetes_validate
import pytest
import yaml

from bdpo.errors import UserError
from tests.support import ROOT
from tests.support.deploy import configs_of, pinned

KUBERNETES = "1.34"


@pytest.fixture
def rayjob():
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


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

TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"

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
        submitterPodTemplate={},
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
                securityContext={},
                env={"type": "array"},
                volumeMounts={"type": "array"},
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


def check_pod(template):
    """Kubernetes' own schema, and a pod that can do no more than it has to."""
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True)
    spec = template["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"]
    assert template["metadata"]["labels"] == {"app": "bdpo"}  # by which the network policy finds it
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        check_container(container, volumes)
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # Ray's sessions
        assert re.fullmatch(pinned("REGISTRY/bdpo"), container["image"])
        assert TOKEN not in {mount["mountPath"] for mount in container["volumeMounts"]}


def check_container(container, volumes):
    """Nothing of the image can be written: what is written has a volume."""
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    places = {variable["name"]: variable["value"] for variable in container["env"]}
    assert places["RAY_USAGE_STATS_ENABLED"] == "0"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {places["HOME"], places["TMPDIR"]} <= mounted


def check_autoscaler(options, head):
    """KubeRay puts it beside Ray on the head. It alone has a token of the Kubernetes API."""
    volumes = {volume["name"]: volume for volume in head["spec"]["volumes"]}
    check_container(options, set(volumes))
    (token,) = (mount for mount in options["volumeMounts"] if mount["mountPath"] == TOKEN)
    sources = volumes[token["name"]]["projected"]["sources"]
    assert [next(iter(source)) for source in sources] == ["serviceAccountToken", "configMap", "downwardAPI"]


def check_rayjob(job):
    """KubeRay's fields, Kubernetes' pods, and what this project asks of both."""
    jsonschema.validate(job, RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}
    check_pod(job["spec"]["submitterPodTemplate"])
    check_autoscaler(cluster["autoscalerOptions"], groups["head"]["template"])
    for group in groups.values():
        check_pod(group["template"])
        for container in group["template"]["spec"]["containers"]:
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
            lambda j: first_container(j).update(image="REGISTRY/bdpo:0.1.0"),
            lambda j: first_container(j)["volumeMounts"].pop(0),
            lambda j: first_container(j)["volumeMounts"].pop(1),
            lambda j: first_container(j)["securityContext"].pop("readOnlyRootFilesystem"),
            lambda j: first_worker(j)["spec"].pop("automountServiceAccountToken"),
            lambda j: first_worker(j)["metadata"]["labels"].update(app="other"),
            lambda j: j["spec"]["submitterPodTemplate"]["spec"].pop("automountServiceAccountToken"),
            lambda j: j["spec"]["rayClusterSpec"]["autoscalerOptions"]["volumeMounts"].pop(),
            lambda j: first_container(j)["resources"]["limits"].update({"nvidia.com/gpu": "4"}),
            lambda j: first_container(j)["env"].append({"name": "X", "values": "1"}),
        ],
    )
    def test_a_broken_one_is_refused(self, rayjob, damage):
        damage(rayjob)
        with pytest.raises((AssertionError, KeyError, ValueError, UserError, jsonschema.ValidationError)):
            check_rayjob(rayjob)


class TestNetworkPolicy:
    @pytest.fixture
    def policy(self):
        return yaml.safe_load((ROOT / "deploy" / "network-policy.yaml").read_text())

    def test_it_is_valid_and_is_about_the_pods_of_the_job(self, policy, rayjob):
        kubernetes_validate.validate(policy, KUBERNETES, strict=True)
        assert policy["spec"]["podSelector"]["matchLabels"] == first_worker(rayjob)["metadata"]["labels"]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]

    def test_the_world_reaches_nothing_and_is_reached_by_https_alone(self, policy):
        assert all("ipBlock" not in peer for rule in policy["spec"]["ingress"] for peer in rule["from"])
        assert all(rule.get("from") for rule in policy["spec"]["ingress"])
        assert all(rule.get("to") for rule in policy["spec"]["egress"])
        wide = [rule for rule in policy["spec"]["egress"] if any("ipBlock" in peer for peer in rule["to"])]
        assert [{port["port"] for port in rule["ports"]} for rule in wide] == [{443, 6443}]
        assert all("169.254.0.0/16" in peer["ipBlock"]["except"] for rule in wide for peer in rule["to"])


def first_worker(job):
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]


def first_container(job):
    return first_worker(job)["spec"]["containers"][0]
