"""deploy/aws.yaml: what cluster.yaml names of an account, and no more rights than that.

The judges are cfn-lint (AWS' own schemas of resources and policies) and an evaluation of the policies.
"""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.support import ROOT
from tests.support.iam import is_allowed

TEMPLATE = ROOT / "deploy" / "aws.yaml"
ACCOUNT = "arn:${AWS::Partition}:ec2:${AWS::Region}:${AWS::AccountId}"
INSTANCE = f"{ACCOUNT}:instance/i-1"
OURS, FOREIGN = {"aws:ResourceTag/ray-cluster-name": "bdpo"}, {"aws:ResourceTag/ray-cluster-name": "other"}
LAUNCH = {"aws:RequestTag/ray-cluster-name": "bdpo", "ec2:MetadataHttpTokens": "required"}


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


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def stack():
    return yaml.load(TEMPLATE.read_text(), Template)


def properties(stack, kind):
    return [r["Properties"] for r in stack["Resources"].values() if r["Type"] == f"AWS::{kind}"]


@pytest.fixture
def head(stack):
    """The statements of the head's role: its own, and those of the bucket's policy."""
    role = stack["Resources"]["HeadRole"]["Properties"]
    own = [s for policy in role["Policies"] for s in policy["PolicyDocument"]["Statement"]]
    managed = [stack["Resources"][name]["Properties"] for name in role["ManagedPolicyArns"]]
    return own + [s for policy in managed for s in policy["PolicyDocument"]["Statement"]]


@pytest.fixture
def lint_all():
    """cfn-lint, which takes ten seconds to read the schemas of AWS."""
    from cfnlint.api import lint_all

    return lint_all


@pytest.mark.system
def test_cfn_lint_finds_no_fault(lint_all):
    assert [match for match in lint_all(TEMPLATE.read_text()) if match.rule.id[0] in "EW"] == []


@pytest.mark.system
def test_cfn_lint_finds_a_planted_one(lint_all):
    broken = TEMPLATE.read_text().replace("BlockPublicAcls: true", "BlockPublicAcl: true", 1)
    assert [match for match in lint_all(broken) if match.rule.id[0] == "E"]


def test_it_makes_the_profiles_that_the_nodes_name(stack, cluster):
    named = {
        node["node_config"]["IamInstanceProfile"]["Name"] for node in cluster["available_node_types"].values()
    }
    made = properties(stack, "IAM::InstanceProfile")
    assert {profile["InstanceProfileName"] for profile in made} == named
    assert all(profile["Roles"][0] in stack["Resources"] for profile in made)


class TestHead:
    """What the autoscaler on the head has to do is allowed; what a driver could do beyond that is not."""

    @pytest.mark.parametrize(
        ("action", "resource", "context"),
        [
            ("ec2:DescribeInstances", "*", {}),
            ("ec2:RunInstances", INSTANCE, LAUNCH),
            ("ec2:RunInstances", f"{ACCOUNT}:security-group/${{SecurityGroup}}", {}),
            ("ec2:RunInstances", f"{ACCOUNT}:subnet/subnet-1", {}),
            ("ec2:CreateTags", INSTANCE, {"ec2:CreateAction": "RunInstances"}),
            ("ec2:CreateTags", INSTANCE, OURS),  # a node's state, noted in its tags
            ("ec2:TerminateInstances", INSTANCE, OURS),
            ("iam:PassRole", "WorkerRole.Arn", {"iam:PassedToService": "ec2.amazonaws.com"}),
            ("s3:PutObject", "${Bucket.Arn}/runs/first/config.yaml", {}),
        ],
    )
    def test_its_work_is_allowed(self, head, action, resource, context):
        assert is_allowed(head, action, resource, context)

    @pytest.mark.parametrize(
        ("action", "resource", "context"),
        [
            ("ec2:TerminateInstances", INSTANCE, FOREIGN),
            ("ec2:TerminateInstances", INSTANCE, {}),
            # The tag of this cluster on an instance of somebody else would allow to terminate it.
            ("ec2:CreateTags", INSTANCE, {**FOREIGN, "aws:RequestTag/ray-cluster-name": "bdpo"}),
            ("ec2:CreateTags", INSTANCE, {"aws:RequestTag/ray-cluster-name": "bdpo"}),
            ("ec2:CreateTags", f"{ACCOUNT}:volume/vol-1", {"aws:RequestTag/ray-cluster-name": "bdpo"}),
            ("ec2:RunInstances", INSTANCE, {}),
            ("ec2:RunInstances", INSTANCE, {**LAUNCH, "ec2:MetadataHttpTokens": "optional"}),
            ("ec2:RunInstances", INSTANCE, {**LAUNCH, "aws:RequestTag/ray-cluster-name": "other"}),
            ("ec2:RunInstances", f"{ACCOUNT}:security-group/sg-1", {}),
            ("ec2:DescribeInstanceAttribute", "*", {}),
            # A role of more rights, or the workers' role for another service, would carry its rights over.
            ("iam:PassRole", "arn:aws:iam::1:role/admin", {"iam:PassedToService": "ec2.amazonaws.com"}),
            ("iam:PassRole", "WorkerRole.Arn", {"iam:PassedToService": "lambda.amazonaws.com"}),
            ("s3:DeleteBucket", "Bucket.Arn", {}),
            ("s3:GetObject", "arn:aws:s3:::other/secret", {}),
        ],
    )
    def test_nothing_else_is(self, head, action, resource, context):
        assert not is_allowed(head, action, resource, context)

    def test_the_evaluation_sees_the_way_round_a_condition(self, head):
        """With tags on every resource, a foreign instance is two calls from its end."""
        request = ("ec2:CreateTags", INSTANCE, {"aws:RequestTag/ray-cluster-name": "bdpo"})
        wide = [*head, {"Effect": "Allow", "Action": ["ec2:CreateTags"], "Resource": "*"}]
        assert is_allowed(wide, *request)

    def test_the_evaluation_refuses_what_it_does_not_know(self):
        statement = {"Effect": "Allow", "Action": "*", "Resource": "*", "Condition": {"StringLike": {}}}
        with pytest.raises(ValueError, match="StringLike"):
            is_allowed([statement], "s3:GetObject", "x", {})
        with pytest.raises(ValueError, match="NotAction"):
            is_allowed([{**statement, "NotAction": "x"}], "s3:GetObject", "x", {})


def test_the_bucket_takes_tls_alone(stack, head):
    (policy,) = properties(stack, "S3::BucketPolicy")
    assert policy["Bucket"] == "Bucket"
    both = [*head, *policy["PolicyDocument"]["Statement"]]
    request = ("s3:GetObject", "${Bucket.Arn}/runs/first/config.yaml")
    assert is_allowed(both, *request, {"aws:SecureTransport": "true"})
    assert not is_allowed(both, *request, {"aws:SecureTransport": "false"})
    assert not is_allowed(both, "s3:ListBucket", "Bucket.Arn", {"aws:SecureTransport": "false"})


def test_the_nodes_of_the_cluster_are_those_that_the_policies_are_about(cluster, stack):
    assert cluster["cluster_name"] == OURS["aws:ResourceTag/ray-cluster-name"]
    tags = {
        value
        for policy in stack["Resources"]["HeadRole"]["Properties"]["Policies"]
        for statement in policy["PolicyDocument"]["Statement"]
        for key, value in statement.get("Condition", {}).get("StringEquals", {}).items()
        if key.endswith("Tag/ray-cluster-name")
    }
    assert tags == {cluster["cluster_name"]}


def test_nothing_is_open_to_the_world(stack):
    assert "0.0.0.0" not in json.dumps(stack)
    (bucket,) = properties(stack, "S3::Bucket")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    (group,) = properties(stack, "EC2::SecurityGroup")
    assert [rule["CidrIp"] for rule in group["SecurityGroupIngress"]] == ["SshFrom"]
    allowed = stack["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.fullmatch(allowed, "203.0.113.7/32")
    assert not any(re.fullmatch(allowed, wide) for wide in ("0.0.0.0/0", "10.0.0.0/8", "203.0.113.7"))
