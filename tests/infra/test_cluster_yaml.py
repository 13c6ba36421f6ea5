"""The cluster file: Ray's own validation, and what must never be in it. Needs no network."""

from __future__ import annotations

import copy
import re
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


def test_nodes_install_this_project_at_its_pins(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    mounts = cluster["file_mounts"]
    for name in [p.rstrip("*") for p in packages] + ["pyproject.toml"]:
        assert mounts[f"~/beit3-ray/{name}"] == name
        assert (ROOT / name).exists()
    assert f"~/beit3-ray/{project['project']['readme']}" in mounts
    (torch,) = [d for d in project["project"]["dependencies"] if d.startswith("torch==")]
    commands = cluster["setup_commands"]
    assert any(f"pip install --quiet {torch} " in command for command in commands)
    assert any(command.endswith("pip install --quiet .") for command in commands)


def test_docker_is_off(cluster: dict[str, Any]) -> None:
    assert cluster["docker"] == {}


def test_the_file_at_the_root_is_this_one() -> None:
    link = ROOT / "ray_cluster.yaml"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == FILE.resolve()


def test_a_mock_of_ec2_launches_the_nodes(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for kind, node in config["available_node_types"].items():
            name = f"profile-{kind}"
            profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
            node["node_config"] |= {"ImageId": image, "IamInstanceProfile": {"Arn": profile["Arn"]}}
        config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for node in config["available_node_types"].values():
            provider.create_node(copy.deepcopy(node["node_config"]), {}, 1)
        launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert [i["InstanceType"] for i in launched] == ["m7i.4xlarge", "m7i.4xlarge", "g6e.48xlarge"]
    assert [i.get("InstanceLifecycle") for i in launched] == [None, "spot", "spot"]
    assert config["auth"]["ssh_private_key"] == str(tmp_path / ".ssh" / "beit3-ray.pem")
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 8
