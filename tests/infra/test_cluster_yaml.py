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
from collections.abc import Iterator
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
    # The group is apply.py's, by its id. Ray makes none, and adds no rule to it.
    assert "security_group" not in cluster["provider"]
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == [cluster["metadata"]["security_group"]]
        assert "NetworkInterfaces" not in node["node_config"]


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
        (disk,) = config["disks"]
        assert disk["autoDelete"]
        kind = f"zones/{gcp['provider']['availability_zone']}/diskTypes/pd-balanced"
        assert disk["initializeParams"]["diskType"] == kind
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


@pytest.fixture
def ec2(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of a mock of EC2 in the file's region."""
    moto = pytest.importorskip("moto")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the new key pair goes
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EC2", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        import boto3

        yield boto3.client("ec2", region_name=written["provider"]["region"])


def _bootstrapped(text: str) -> dict[str, Any]:
    """What `ray up` makes of the file before it launches anything."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))


def _pasted(text: str, printed: str) -> str:
    """The file, with the lines that apply.py printed for it in place of its own."""
    lines = re.findall(r"^  (\w+: &\w+) (.+)$", printed, re.M)
    assert len(lines) == 5
    for name, value in lines:
        text, found = re.subn(rf"(?m)^  {name} .*$", f"  {name} {value}", text)
        assert found == 1, name
    return text


@pytest.mark.parametrize("own_vpc", [False, True])
def test_a_mock_of_ec2_launches_the_nodes(
    ec2: Any, aws_apply: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_vpc: bool
) -> None:
    """Key pair, security group and instances, by the code that `ray up` and the autoscaler run."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    (vpc,) = (v["VpcId"] for v in ec2.describe_vpcs()["Vpcs"])
    if own_vpc:
        vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(
            VpcId=vpc, CidrBlock="10.9.0.0/24", AvailabilityZone="us-west-2a"
        )["Subnet"]["SubnetId"]
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    before = {g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]}
    aws_apply.main(
        aws_apply.Account(
            bucket="our-bucket",
            region=ec2.meta.region_name,
            ssh_from="203.0.113.7/32",
            vpc=vpc if own_vpc else "",
            key_name="ours",
        )
    )
    image = ec2.describe_images()["Images"][0]["ImageId"]
    text = re.sub(r"ami-SET-ME\S*", image, _pasted(FILE.read_text(), capsys.readouterr().out))
    config = _bootstrapped(text)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for node in config["available_node_types"].values():
        provider.create_node(copy.deepcopy(node["node_config"]), {}, 1)
    groups = {g["GroupId"]: g for g in ec2.describe_security_groups()["SecurityGroups"]}
    launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    (made,) = set(groups) - before  # apply.py's alone: Ray made none
    assert {g["GroupId"] for i in launched for g in i["SecurityGroups"]} == {made}
    assert {i["VpcId"] for i in launched} == {groups[made]["VpcId"]} == {vpc}
    outside = [r for r in groups[made]["IpPermissions"] if r["IpRanges"] or r["Ipv6Ranges"]]
    assert [(r["FromPort"], r["ToPort"]) for r in outside] == [(22, 22)]
    assert [r["CidrIp"] for r in outside[0]["IpRanges"]] == ["203.0.113.7/32"]
    assert [i["InstanceType"] for i in launched] == ["m7i.4xlarge", "m7i.4xlarge", "g6e.48xlarge"]
    assert [i.get("InstanceLifecycle") for i in launched] == [None, "spot", "spot"]
    assert config["auth"]["ssh_private_key"] == str(tmp_path / ".ssh" / "ours.pem")
    assert {i["KeyName"] for i in launched} == {"ours"}
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 8


def test_efas_lines_launch_in_a_subnet_of_their_own(ec2: Any, aws_apply: Any) -> None:
    """Uncommented, as docs/operations.md says."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    account = aws_apply.Account(bucket="b", region=ec2.meta.region_name, ssh_from="203.0.113.7/32")
    group = aws_apply.make_group(account)
    zone = [{"Name": "availability-zone", "Values": ["us-west-2a"]}]
    (public,) = ec2.describe_subnets(Filters=zone)["Subnets"]
    private = ec2.create_subnet(
        VpcId=public["VpcId"], CidrBlock="172.31.240.0/24", AvailabilityZone="us-west-2a"
    )["Subnet"]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=private, MapPublicIpOnLaunch={"Value": True})
    (lines,) = re.findall(r"^ +# NetworkInterfaces:\n(?: +# .*\n)+", FILE.read_text(), re.M)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    text = FILE.read_text().replace(lines, lines.replace("# ", ""))
    text = text.replace("sg-SET-ME", group).replace("subnet-SET-ME", private)
    config = yaml.safe_load(re.sub(r"ami-SET-ME\S*", image, text))
    nodes = {name: node["node_config"] for name, node in config["available_node_types"].items()}
    del nodes["gpu"]["SecurityGroupIds"]
    for name in ("head", "cpu"):
        nodes[name]["SubnetIds"] = [public["SubnetId"]]
    config = _bootstrapped(yaml.safe_dump(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for node in config["available_node_types"].values():
        del node["node_config"]["IamInstanceProfile"]  # of no account
        provider.create_node(copy.deepcopy(node["node_config"]), {}, 1)
    launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    where = {(i["InstanceType"], i["NetworkInterfaces"][0]["SubnetId"]) for i in launched}
    assert where == {("m7i.4xlarge", public["SubnetId"]), ("g6e.48xlarge", private)}


def test_without_the_groups_id_nothing_starts(ec2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = ec2.describe_security_groups()["SecurityGroups"]
    with pytest.raises(AssertionError):
        _bootstrapped(FILE.read_text())
    said = capsys.readouterr()
    assert "configured SecurityGroupIds" in said.out + said.err
    assert ec2.describe_security_groups()["SecurityGroups"] == before
    assert not ec2.describe_instances()["Reservations"]


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
        node["node_config"] |= {
            "ImageId": image,
            "IamInstanceProfile": {"Arn": profile["Arn"]},
            "SecurityGroupIds": [group],
        }
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
