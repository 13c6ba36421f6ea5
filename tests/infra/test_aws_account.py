"""infra/iam: what the script makes in a mock of AWS, and what its policies let through.

moto knows neither conditions nor EC2's resources, so policies are evaluated here. S3's are put to
the requests that the store really makes: a gate before moto's S3 answers 403 where a policy denies.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest

NUMBER = "123456789012"
BUCKET = "our-bucket"
CONTEXT = {
    "aws:RequestedRegion": "us-west-2",
    "aws:SecureTransport": "true",
    "s3:TlsVersion": "1.3",
}


@pytest.fixture
def account(aws_apply: Any) -> Any:
    return aws_apply.Account(bucket=BUCKET, region="us-west-2", ssh_from="203.0.113.7/32")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A mock of AWS in this process, and boto3 to ask it."""
    moto = pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        import boto3

        yield boto3


# -- a small evaluator -----------------------------------------------------------------------------

_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": lambda wanted, found: found == wanted,
    "ArnEquals": lambda wanted, found: fnmatch.fnmatchcase(found, wanted),
    "Bool": lambda wanted, found: found == wanted,
    "NumericLessThan": lambda wanted, found: float(found) < float(wanted),
}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _applies(
    statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]
) -> bool:
    for operator, keys in statement.get("Condition", {}).items():
        for key, wanted in keys.items():
            found = context.get(key)
            if found is None or not any(_OPERATORS[operator](w, found) for w in _list(wanted)):
                return False
    return any(fnmatch.fnmatchcase(action, a) for a in _list(statement["Action"])) and any(
        fnmatch.fnmatchcase(resource, r) for r in _list(statement["Resource"])
    )


def allowed(
    policies: list[dict[str, Any]], action: str, resource: str, context: Mapping[str, str] = CONTEXT
) -> bool:
    """Whether the policies together allow it: some statement does, and none denies it."""
    effects = {
        statement["Effect"]
        for policy in policies
        for statement in policy["Statement"]
        if _applies(statement, action, resource, context)
    }
    return effects == {"Allow"}


# -- S3 --------------------------------------------------------------------------------------------


def _s3_action(method: str, key: str, query: Mapping[str, Any]) -> str:
    """The permission that a request needs. Source: AWS's table of actions for Amazon S3."""
    if method == "POST" and "delete" in query:
        return "s3:DeleteObject"
    if not key:
        return {"GET": "s3:ListBucket", "HEAD": "s3:ListBucket", "PUT": "s3:CreateBucket"}[method]
    if method == "DELETE":
        return "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
    return {"GET": "s3:GetObject", "HEAD": "s3:GetObject"}.get(method, "s3:PutObject")


class Gate:
    """A WSGI application: moto's S3 behind a policy."""

    def __init__(self, inner: Any, policies: list[dict[str, Any]]) -> None:
        self.inner, self.policies = inner, policies
        self.seen: set[str] = set()
        self.denied: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        bucket, _, key = unquote(environ["PATH_INFO"]).lstrip("/").partition("/")
        query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        action = _s3_action(environ["REQUEST_METHOD"], key, query)
        resource = f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")
        if action == "s3:DeleteObject" and not key:  # many at once: their names are in the body
            prefix = next(r for r in _list(self.policies[0]["Statement"][1]["Resource"]))
            resource = prefix.replace("*", "x")
        self.seen.add(action)
        if "HTTP_AUTHORIZATION" in environ and not allowed(self.policies, action, resource):
            self.denied.append(f"{action} {resource}")
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]
        return self.inner(environ, start)


@contextmanager
def _gate(policies: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    pytest.importorskip("moto")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    gate = Gate(DomainDispatcherApplication(create_backend_app), policies)
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    backend = s3_backends[NUMBER]["aws"]
    try:
        for name in (BUCKET, "another-bucket"):
            backend.create_bucket(name, "us-east-1")
        yield gate
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        s3_backends.reset()


def _policy(aws_apply: Any, account: Any, name: str) -> dict[str, Any]:
    return aws_apply.document(name, account, NUMBER)


def test_the_store_can_do_all_it_does_with_the_workers_policy(
    aws_apply: Any, account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.storage import Store

    policies = [_policy(aws_apply, account, name) for name in ("store-policy", "bucket-policy")]
    with _gate(policies, monkeypatch) as gate:
        store = Store(f"s3://{BUCKET}/beit3")
        store.check_writable()
        assert store.put_if_absent("images/a/_commits/0.json", b"{}")
        assert not store.put_if_absent("images/a/_commits/0.json", b"{}")
        store.write("runs/r/checkpoints/step-1/big", bytes(11 << 20))  # goes up in parts
        store.write("runs/r/stop.json", b"{}")
        assert store.exists("runs/r/stop.json")
        assert not store.exists("runs/r/ended.json")
        assert store.read("runs/r/stop.json") == b"{}"
        assert store.list("runs/r", recursive=True)
        store.delete("runs/r/checkpoints")
        store.delete("runs/r/stop.json")
        assert not store.exists("runs/r/stop.json")
    assert not gate.denied
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"} <= gate.seen


@pytest.mark.parametrize("uri", ["s3://another-bucket/beit3", f"s3://{BUCKET}/mlflow"])
def test_the_store_can_do_nothing_elsewhere(
    aws_apply: Any, account: Any, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    from pipelines.storage import Store, StoreError

    with (
        _gate([_policy(aws_apply, account, "store-policy")], monkeypatch) as gate,
        pytest.raises(StoreError, match="can't write there"),
    ):
        Store(uri).check_writable()
    assert gate.denied


def test_s3_policies_allow_their_folders_alone(aws_apply: Any, account: Any) -> None:
    worker = [_policy(aws_apply, account, "store-policy")]
    mlflow = [_policy(aws_apply, account, "mlflow-policy")]
    ours, theirs = f"arn:aws:s3:::{BUCKET}/beit3/x", f"arn:aws:s3:::{BUCKET}/mlflow/x"
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
        assert allowed(worker, action, ours) and not allowed(worker, action, theirs)
        assert allowed(mlflow, action, theirs) and not allowed(mlflow, action, ours)
    for action in ("s3:DeleteObjectVersion", "s3:PutBucketPolicy", "s3:DeleteBucket"):
        for resource in (ours, f"arn:aws:s3:::{BUCKET}"):
            assert not allowed(worker, action, resource)


def test_the_bucket_answers_by_tls_alone(aws_apply: Any, account: Any) -> None:
    policies = [_policy(aws_apply, account, name) for name in ("store-policy", "bucket-policy")]
    resource = f"arn:aws:s3:::{BUCKET}/beit3/x"
    assert allowed(policies, "s3:GetObject", resource)
    for change in ({"aws:SecureTransport": "false"}, {"s3:TlsVersion": "1.1"}):
        assert not allowed(policies, "s3:GetObject", resource, CONTEXT | change)


# -- EC2 -------------------------------------------------------------------------------------------

EC2 = f"arn:aws:ec2:us-west-2:{NUMBER}"
WORKER = {
    "aws:RequestTag/ray-cluster-name": "beit3-ray",
    "ec2:MetadataHttpTokens": "required",
    "ec2:InstanceProfile": f"arn:aws:iam::{NUMBER}:instance-profile/beit3-ray-worker",
}


def test_the_autoscaler_launches_and_ends_workers_of_its_cluster_alone(
    aws_apply: Any, account: Any
) -> None:
    head = [_policy(aws_apply, account, "autoscaler-policy")]
    own = CONTEXT | {"aws:ResourceTag/ray-cluster-name": "beit3-ray"}
    run, instance = "ec2:RunInstances", f"{EC2}:instance/*"
    assert allowed(head, run, instance, CONTEXT | WORKER)
    for key, value in {
        "aws:RequestTag/ray-cluster-name": "another",
        "ec2:MetadataHttpTokens": "optional",
        "ec2:InstanceProfile": f"arn:aws:iam::{NUMBER}:instance-profile/admin",
    }.items():
        assert not allowed(head, run, instance, CONTEXT | WORKER | {key: value})
    for part in ("subnet/s", "volume/*", "network-interface/*", "capacity-reservation/cr-1"):
        assert allowed(head, run, f"{EC2}:{part}")
    for key_name, key in (("", "beit3-ray"), ("ours", "ours")):
        keyed = dataclasses.replace(account, key_name=key_name)
        policies = [_policy(aws_apply, keyed, "autoscaler-policy")]
        assert allowed(policies, run, f"{EC2}:key-pair/{key}")
        assert not allowed(policies, run, f"{EC2}:key-pair/another")
    assert allowed(head, run, f"{EC2}:security-group/sg-1", own)
    assert not allowed(head, run, f"{EC2}:security-group/sg-1")
    assert allowed(head, "ec2:TerminateInstances", f"{EC2}:instance/i-1", own)
    assert not allowed(head, "ec2:TerminateInstances", f"{EC2}:instance/i-1")
    assert not allowed(head, "ec2:CreateTags", f"{EC2}:instance/i-1")  # no adopting of others
    to_ec2 = CONTEXT | {"iam:PassedToService": "ec2.amazonaws.com"}
    role = f"arn:aws:iam::{NUMBER}:role/beit3-ray"
    assert allowed(head, "iam:PassRole", f"{role}-worker", to_ec2)
    assert not allowed(head, "iam:PassRole", f"{role}-head", to_ec2)
    assert not allowed(head, "iam:PassRole", f"{role}-worker")


def test_the_autoscalers_policy_names_every_call_that_rays_provider_makes(
    aws_apply: Any, account: Any, aws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.autoscaler._private.aws.utils as utils
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    called: set[str] = set()
    resource = aws.resource

    def watched(*args: Any, **options: Any) -> Any:
        made = resource(*args, **options)
        made.meta.client.meta.events.register(
            "before-call.ec2.*", lambda model, **_: called.add(f"ec2:{model.name}")
        )
        return made

    monkeypatch.setattr(utils.boto3, "resource", watched)
    for cache in (utils.resource_cache, utils.client_cache):
        cache.cache_clear()
    ec2 = aws.client("ec2", region_name="us-west-2")
    node = {
        "ImageId": ec2.describe_images()["Images"][0]["ImageId"],
        "InstanceType": "m7i.4xlarge",
        "SubnetIds": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
    }
    settings = {"region": "us-west-2", "cache_stopped_nodes": False}
    provider = AWSNodeProvider(settings, "beit3-ray")
    provider.create_node(node, {}, 1)
    (name,) = provider.non_terminated_nodes({})
    provider.set_node_tags(name, {"ray-node-status": "up-to-date"})
    provider.internal_ip(name)
    provider.terminate_node(name)
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} <= called
    statements = _policy(aws_apply, account, "autoscaler-policy")["Statement"]
    assert called <= {action for s in statements for action in _list(s["Action"])}


# -- the script ------------------------------------------------------------------------------------


def test_no_policy_allows_everything_anywhere(aws_apply: Any, account: Any) -> None:
    for name in {p for policies in aws_apply.ROLES.values() for p in policies}:
        for statement in _policy(aws_apply, account, name)["Statement"]:
            assert not [a for a in _list(statement["Action"]) if "*" in a]
            if "*" in _list(statement["Resource"]):  # EC2 has no resource for these
                assert all(a.startswith("ec2:Describe") for a in _list(statement["Action"]))


def test_the_script_makes_it_all_and_may_run_again(
    aws_apply: Any, account: Any, aws: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        aws_apply.main(account)
    assert f"arn:aws:iam::{NUMBER}:instance-profile/beit3-ray-worker" in capsys.readouterr().out
    s3, iam = aws.client("s3", region_name="us-west-2"), aws.client("iam")
    closed = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert all(closed.values()) and len(closed) == 4
    assert s3.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    assert s3.get_bucket_encryption(Bucket=BUCKET)
    rules = {r["ID"]: r for r in s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]}
    uploads = rules["uploads-that-never-ended"]["AbortIncompleteMultipartUpload"]
    assert uploads == {"DaysAfterInitiation": 7}
    assert rules["old-runs"]["Status"] == "Disabled"  # nothing is deleted that nobody asked for
    assert rules["old-runs"]["Filter"] == {"Prefix": "beit3/runs/"}
    for kind, policies in aws_apply.ROLES.items():
        name = f"beit3-ray-{kind}"
        assert set(iam.list_role_policies(RoleName=name)["PolicyNames"]) == set(policies)
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name


def test_ssh_follows_the_address_and_a_wider_group_is_refused(
    aws_apply: Any, account: Any, aws: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ec2 = aws.client("ec2", region_name="us-west-2")
    group = aws_apply.make_group(account)
    moved = dataclasses.replace(account, ssh_from="198.51.100.0/24")
    assert aws_apply.make_group(moved) == group
    found = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    outside = [(r["FromPort"], r["IpRanges"]) for r in found if r["IpRanges"]]
    assert [(port, [x["CidrIp"] for x in ranges]) for port, ranges in outside] == [
        (22, ["198.51.100.0/24"])
    ]
    wide = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265}
    wide |= {"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[wide])
    with pytest.raises(SystemExit):
        aws_apply.make_group(moved)
    assert "8265" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"ssh_from": "0.0.0.0/0"}, {"ssh_from": "me"}, {"prefix": "/a"}])
def test_wrong_values_are_named(aws_apply: Any, wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        aws_apply.Account(**{"bucket": "b", "region": "r", "ssh_from": "203.0.113.7/32"} | wrong)


def test_every_document_is_json_without_anything_left_open(aws_apply: Any, account: Any) -> None:
    for path in aws_apply.HERE.glob("*.json"):
        assert "$" not in json.dumps(aws_apply.document(path.stem, account, NUMBER)), path.name
