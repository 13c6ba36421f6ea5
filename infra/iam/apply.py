"""Make what the cluster needs in an AWS account: bucket, roles, security group.

    python infra/iam/apply.py --bucket my-bucket --region us-west-2 --ssh-from 203.0.113.7/32
    python infra/iam/apply.py --bucket my-bucket --region us-west-2 --ssh-from 203.0.113.7/32 --show

Run it once, with credentials that may do all that; run it again after a change of the JSON files or
of your address. It adds and replaces what is its own, and deletes nothing but the SSH rules of the
cluster's group that name other addresses. It ends with the values for infra/ray_cluster.yaml.
"""

from __future__ import annotations

import ipaddress
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NoReturn

import boto3
import tyro
from botocore.exceptions import ClientError

HERE = Path(__file__).parent
ROLES = {
    "head": ("store-policy", "autoscaler-policy"),
    "worker": ("store-policy",),
    "mlflow": ("mlflow-policy",),
}


@dataclass(frozen=True)
class Account:
    """What to make, and for whom."""

    bucket: str
    """Name of the bucket; made if there is none. Give it to this project alone."""
    region: str
    ssh_from: str
    """Addresses that may log in by SSH, as a CIDR block, e.g. 203.0.113.7/32 for one."""
    prefix: str = "beit3"
    """Folder of the store in the bucket: the store is s3://BUCKET/PREFIX."""
    cluster: str = "beit3-ray"
    """`cluster_name` of infra/ray_cluster.yaml, whose security group has this name too."""
    key_name: str = ""
    """EC2 key pair of the cluster; empty for one of the cluster's name."""
    vpc: str = ""
    """VPC of the cluster; empty for the region's default one."""
    expire_runs: bool = False
    """Delete what is below PREFIX/runs, checkpoints above all, 180 days after it was written."""
    show: bool = False
    """Print the documents and make nothing."""

    def __post_init__(self) -> None:
        block = ipaddress.ip_network(self.ssh_from)  # a ValueError names what is wrong with it
        if block.prefixlen < 8:
            raise ValueError(f"ssh_from {self.ssh_from}: that is most of the internet")
        if not self.prefix or self.prefix != self.prefix.strip("/"):
            raise ValueError(f"prefix {self.prefix!r}: expected a folder, without / at its ends")


def document(name: str, account: Account, number: str) -> dict[str, Any]:
    """A JSON file beside this script with its values filled in.

    Args:
        number: The AWS account's number.
    """
    values = {
        "bucket": account.bucket,
        "prefix": account.prefix,
        "cluster": account.cluster,
        "key_name": account.key_name or account.cluster,
        "region": account.region,
        "account": number,
        "old_runs": "Enabled" if account.expire_runs else "Disabled",
    }
    return json.loads(Template((HERE / f"{name}.json").read_text()).substitute(values))


def make_bucket(account: Account, number: str) -> None:
    """The bucket: private, encrypted, versioned, TLS only, with its life-cycle rules."""
    s3, name = boto3.client("s3", region_name=account.region), account.bucket
    try:
        s3.head_bucket(Bucket=name, ExpectedBucketOwner=number)
    except ClientError as error:
        if error.response["Error"]["Code"] != "404":
            stop(
                f"bucket {name}: {error}. Names are worldwide: choose another, or check your rights"
            )
        where: Any = {"LocationConstraint": account.region}
        inside = {} if account.region == "us-east-1" else {"CreateBucketConfiguration": where}
        s3.create_bucket(Bucket=name, **inside)
    s3.put_public_access_block(
        Bucket=name,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        },
    )
    s3.put_bucket_ownership_controls(
        Bucket=name, OwnershipControls={"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    )
    s3.put_bucket_encryption(
        Bucket=name,
        ServerSideEncryptionConfiguration={
            "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
        },
    )
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    policy = json.dumps(document("bucket-policy", account, number))
    s3.put_bucket_policy(Bucket=name, Policy=policy)
    rules: Any = document("lifecycle", account, number)
    s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=rules)


def make_roles(account: Account, number: str) -> dict[str, str]:
    """A role and an instance profile of its name for each of ROLES; returns the profiles' ARNs."""
    iam = boto3.client("iam")
    trust = json.dumps(document("trust-policy", account, number))
    profiles = {}
    for kind, policies in ROLES.items():
        name = f"{account.cluster}-{kind}"
        with _unless("EntityAlreadyExists"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        for policy in policies:
            text = json.dumps(document(policy, account, number))
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
        with _unless("EntityAlreadyExists"):
            iam.create_instance_profile(InstanceProfileName=name)
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        if not profile["Roles"]:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        profiles[kind] = profile["Arn"]
    return profiles


def make_group(account: Account) -> str:
    """The security group: everything within it, SSH from `ssh_from`, nothing else; returns its id.

    Raises:
        SystemExit: there is one of that name that lets more in.
    """
    ec2 = boto3.client("ec2", region_name=account.region)
    vpc = account.vpc
    if not vpc:
        found = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        if not found:
            stop(f"{account.region} has no default VPC: give one by --vpc")
        vpc = found[0]["VpcId"]
    filters = [
        {"Name": "group-name", "Values": [account.cluster]},
        {"Name": "vpc-id", "Values": [vpc]},
    ]
    groups = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    if groups:
        group = groups[0]["GroupId"]
    else:
        tags = [{"Key": "ray-cluster-name", "Value": account.cluster}]
        group = ec2.create_security_group(
            GroupName=account.cluster,
            Description="Nodes of a Ray cluster: SSH from outside, everything among themselves",
            VpcId=vpc,
            TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
        )["GroupId"]
    inside: Any = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    version = ipaddress.ip_network(account.ssh_from).version
    source: Any = (
        {"IpRanges": [{"CidrIp": account.ssh_from}]}
        if version == 4
        else {"Ipv6Ranges": [{"CidrIpv6": account.ssh_from}]}
    )
    ssh: Any = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22} | source
    for rule in groups[0]["IpPermissions"] if groups else []:
        outside = {k: rule[k] for k in ("IpRanges", "Ipv6Ranges", "PrefixListIds") if rule.get(k)}
        if not outside:
            continue
        if (rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort")) != ("tcp", 22, 22):
            stop(f"security group {group} ({account.cluster}) lets more in than SSH: {rule}")
        old: Any = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22} | outside
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[old])
    for rule in (inside, ssh):
        with _unless("InvalidPermission.Duplicate"):
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    with _unless("InvalidPermission.Duplicate"):  # EFA asks for it; the way out is open anyway
        ec2.authorize_security_group_egress(GroupId=group, IpPermissions=[inside])
    return group


class _unless:
    """Leave out an AWS error of this code: what was to be made is there already."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        return isinstance(error, ClientError) and error.response["Error"]["Code"] == self.code


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(account: Account) -> None:
    number = boto3.client("sts", region_name=account.region).get_caller_identity()["Account"]
    if account.show:
        for path in sorted(HERE.glob("*.json")):
            print(f"# {path.name}\n{json.dumps(document(path.stem, account, number), indent=2)}")
        return
    make_bucket(account, number)
    profiles = make_roles(account, number)
    group = make_group(account)
    print(f"store              s3://{account.bucket}/{account.prefix}")
    print(f"security group     {group} ({account.cluster}), SSH from {account.ssh_from}")
    print("for infra/ray_cluster.yaml:")
    print(f"  region: &region {account.region}")
    print(f"  key_name: &key_name {account.key_name or account.cluster}")
    print(f"  head_profile_arn: &head_profile {profiles['head']}")
    print(f"  worker_profile_arn: &worker_profile {profiles['worker']}")
    print(f"  security_group: &group {group}")


if __name__ == "__main__":
    try:
        chosen = tyro.cli(Account, description=(__doc__ or "").split("\n")[0])
    except ValueError as wrong:
        stop(str(wrong))
    main(chosen)
