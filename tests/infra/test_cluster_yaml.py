"""The cluster file: Ray's own validation, and what must never be in it. Needs no network."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "infra" / "ray_cluster.yaml"

_SECRETS = (
    r"A[KS]IA[A-Z0-9]{12}",  # an AWS access key
    r"(?i)secret_?(access_?)?key",
    r"(?i)passw(or)?d",
    r"-----BEGIN",
    r"RAY_AUTH_TOKEN\b",
    r"\b[0-9a-f]{32,}\b",  # a token in hex
    r"[A-Za-z0-9+/]{40,}={0,2}(?![\w./-])",  # ... or base64
    r"://[^/\s]*:[^/\s]*@",  # a URL with a password
)


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The file as it stands."""
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def cluster(written: dict[str, Any]) -> dict[str, Any]:
    """The file as `ray up` sees it, with Ray's defaults; validated."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(written)
    validate_config(prepared)
    return prepared


def _starts(cluster: dict[str, Any], kind: str) -> list[str]:
    return [c for c in cluster[f"{kind}_start_ray_commands"] if "ray start" in c]


def test_an_unknown_key_fails_the_validation(written: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config(prepare_config(written | {"idle_minutes": 5}))


def test_workers_start_at_zero_and_idle_ones_go(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert all(node["min_workers"] == 0 for node in types.values())
    assert {name: node["max_workers"] for name, node in types.items()} == {
        "head": 0,
        "cpu": 16,
        "gpu": 8,
    }
    assert cluster["max_workers"] == 16 + 8
    assert cluster["idle_timeout_minutes"] == 5


def test_workers_are_spot_and_the_head_is_not(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    for name in ("cpu", "gpu"):
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_every_node_has_a_disk_and_a_profile(cluster: dict[str, Any]) -> None:
    for node in cluster["available_node_types"].values():
        (disk,) = node["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 200
        assert disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"]
        assert node["node_config"]["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::")


def test_the_head_takes_no_tasks(cluster: dict[str, Any]) -> None:
    assert cluster["head_node_type"] == "head"
    assert cluster["available_node_types"]["head"]["resources"]["CPU"] == 0
    (start,) = _starts(cluster, "head")
    assert "--num-cpus=0" in start
    assert "--num-gpus=0" in start


def test_the_dashboard_stays_on_loopback(cluster: dict[str, Any]) -> None:
    (start,) = _starts(cluster, "head")
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]
    for kind in ("head", "worker"):
        for command in _starts(cluster, kind):
            assert "0.0.0.0" not in command
            assert "--ray-client-server-port" not in command
    assert "--dashboard-host" not in _starts(cluster, "worker")[0]


def test_only_ssh_is_open_to_the_world(cluster: dict[str, Any]) -> None:
    # Ray's own rules are the group itself and SSH; the file adds none, and names no other group.
    assert cluster["provider"]["security_group"] == {"GroupName": "beit3-ray"}
    for node in cluster["available_node_types"].values():
        assert not {"SecurityGroupIds", "NetworkInterfaces"} & set(node["node_config"])

    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    public = [
        (rule["FromPort"], rule["ToPort"])
        for rule in _create_default_inbound_rules({"sg-0"})
        if rule.get("IpRanges")
    ]
    assert public == [(22, 22)]


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    for kind in ("head", "worker"):
        (start,) = _starts(cluster, kind)
        assert "RAY_AUTH_MODE=token" in start
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_there_is_no_secret_in_the_file() -> None:
    text = FILE.read_text()
    for pattern in _SECRETS:
        assert not re.search(pattern, text), pattern
    assert set(re.findall(r"arn:aws:iam::(\d+):", text)) == {"0" * 12}


def test_what_a_user_sets_stands_at_the_top(written: dict[str, Any]) -> None:
    text = FILE.read_text()
    top = text[: text.index("# ---- the cloud")]
    assert "SET-ME" in top
    rest = [line for line in text[len(top) :].splitlines() if "SET-ME" in line]
    assert all(line.lstrip().startswith("#") for line in rest), "EFA's, which is off"
    assert written["provider"]["region"] == written["metadata"]["region"]


def test_the_file_for_gcp_has_the_same_shape(written: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    gcp = yaml.safe_load((ROOT / "infra" / "ray_cluster_gcp.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(gcp)))
    ours, theirs = written["available_node_types"], gcp["available_node_types"]
    for name, node in theirs.items():
        for field in ("min_workers", "max_workers"):
            assert node[field] == ours[name][field]
        config = node["node_config"]
        assert config["tags"]["items"] == ["beit3-ray"]  # the firewall's rules go by it
        assert config["disks"][0]["autoDelete"]
        spot = config.get("scheduling", {}).get("provisioningModel")
        assert spot == (None if name == "head" else "SPOT")
    assert (
        theirs["head"]["node_config"]["serviceAccounts"]
        != (theirs["cpu"]["node_config"]["serviceAccounts"])
    )
    for field in ("head_start_ray_commands", "worker_start_ray_commands", "idle_timeout_minutes"):
        assert gcp[field] == written[field]
    missing = set(written["file_mounts"]) - set(gcp["file_mounts"])
    assert missing == {"~/beit3-ray/infra/logs/fluent-bit.yaml"}  # ships to S3
    assert theirs["gpu"]["resources"]["GPU"] == 8


def test_nodes_install_this_project_at_its_pins(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    mounts = cluster["file_mounts"]
    for name in [p.rstrip("*") for p in packages] + ["pyproject.toml"]:
        assert mounts[f"~/beit3-ray/{name}"] == name
        assert (ROOT / name).exists()
    assert f"~/beit3-ray/{project['project']['readme']}" in mounts
    commands = cluster["setup_commands"]
    (locked,) = [command for command in commands if "--require-hashes" in command]
    for kind in ("cpu", "cuda"):
        assert kind in locked
        name = f"infra/requirements-{kind}.lock"
        assert mounts[f"~/beit3-ray/{name}"] == name
        assert (ROOT / name).exists()
    assert any(command.endswith("pip install --quiet --no-deps .") for command in commands)
    assert commands.index(locked) < len(commands) - 1


def test_docker_is_off(cluster: dict[str, Any]) -> None:
    assert cluster["docker"] == {}


def test_the_file_at_the_root_is_this_one() -> None:
    link = ROOT / "ray_cluster.yaml"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == FILE.resolve()


def test_a_mock_of_ec2_launches_the_nodes(
    cluster: dict[str, Any], aws_apply: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Key pair, security group and instances, by the code that `ray up` and the autoscaler run."""
    moto = pytest.importorskip("moto")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the new key pair goes
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EC2", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    region = cluster["provider"]["region"]
    config = copy.deepcopy(cluster)
    with moto.mock_aws():
        import boto3
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam")
        account = aws_apply.Account(bucket="b", region=region, ssh_from="203.0.113.7/32")
        group = aws_apply.make_group(account)
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for kind, node in config["available_node_types"].items():
            name = f"profile-{kind}"
            profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
            node["node_config"] |= {"ImageId": image, "IamInstanceProfile": {"Arn": profile["Arn"]}}
        config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for node in config["available_node_types"].values():
            provider.create_node(copy.deepcopy(node["node_config"]), {}, 1)
        rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]
        launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert {g["GroupId"] for i in launched for g in i["SecurityGroups"]} == {group}
    outside = [r for r in rules["IpPermissions"] if r["IpRanges"] or r["Ipv6Ranges"]]
    assert [(r["FromPort"], r["ToPort"]) for r in outside] == [(22, 22)]
    assert [r["CidrIp"] for r in outside[0]["IpRanges"]] == ["203.0.113.7/32"]
    assert [i["InstanceType"] for i in launched] == ["m7i.4xlarge", "m7i.4xlarge", "g6e.48xlarge"]
    assert [i.get("InstanceLifecycle") for i in launched] == [None, "spot", "spot"]
    assert config["auth"]["ssh_private_key"] == str(tmp_path / ".ssh" / "beit3-ray.pem")
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 8


@pytest.mark.slow
def test_ray_up_launches_the_head_and_knocks_at_its_door(
    written: dict[str, Any], aws_apply: Any, s3_server: str, tmp_path: Path
) -> None:
    """The command itself against a mock of EC2, up to SSH, which a mock has not."""
    import boto3

    config, region = copy.deepcopy(written), written["provider"]["region"]
    ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam")
    account = aws_apply.Account(bucket="b", region=region, ssh_from="203.0.113.7/32")
    group = aws_apply.make_group(account)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    for kind, node in config["available_node_types"].items():
        profile = iam.create_instance_profile(InstanceProfileName=f"up-{kind}")["InstanceProfile"]
        node["node_config"] |= {"ImageId": image, "IamInstanceProfile": {"Arn": profile["Arn"]}}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0")
    log = tmp_path / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "up", "--yes", "--no-config-cache", file],
            env=os.environ | {"HOME": str(tmp_path)},
            cwd=ROOT,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "SSH" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    (head,) = launched  # workers are the autoscaler's, which runs on the head
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-node-type"] == "head" and tags["ray-cluster-name"] == "beit3-ray"
    assert head["InstanceType"] == "m7i.4xlarge"
    assert [g["GroupId"] for g in head["SecurityGroups"]] == [group]
