"""The Kubernetes manifests: KubeRay's fields, and what must never be in them. Needs no cluster.

Kustomize itself is not run: what its files name is looked up here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kuberay"
CLUSTER = {"ray.io/cluster": "beit3-ray"}


def _closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


# The fields of ray.io/v1 that these manifests may use. Source: KubeRay's CRD reference, 1.6.
_ANY: dict[str, Any] = {}
_PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_CLUSTER = _closed(
    rayVersion={"const": "2.60.0"},
    authOptions=_closed(mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_closed(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=_ANY,
        securityContext=_ANY,
        image={"type": "string"},
        env=_ANY,
        envFrom=_ANY,
        volumeMounts=_ANY,
    ),
    headGroupSpec=_closed(serviceType={"type": "string"}, rayStartParams=_PARAMS, template=_ANY)
    | {"required": ["rayStartParams", "template"]},
    workerGroupSpecs={
        "type": "array",
        "items": _closed(
            groupName={"type": "string"},
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            idleTimeoutSeconds=_COUNT,
            rayStartParams=_PARAMS,
            template=_ANY,
        )
        | {"required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"]},
    },
) | {"required": ["headGroupSpec"]}
_JOB = _closed(
    clusterSelector=_PARAMS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypoint={"type": "string"},
    runtimeEnvYAML={"type": "string"},
    submitterPodTemplate=_ANY,
)


def _objects() -> list[dict[str, Any]]:
    names = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
    return [o for path in names for o in yaml.safe_load_all(path.read_text())]


def _of(kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in _objects() if o["kind"] == kind}


def _pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec, wherever it stands."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from _pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pods(value)


@pytest.fixture(scope="module")
def ray() -> dict[str, Any]:
    return _of("RayCluster")["beit3-ray"]["spec"]


def test_rays_objects_have_kuberays_fields(ray: dict[str, Any]) -> None:
    import jsonschema

    jsonschema.validate(ray, _CLUSTER)
    job = _of("RayJob")["pretrain"]["spec"]
    jsonschema.validate(job, _JOB)
    assert job["clusterSelector"] == CLUSTER
    with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
        jsonschema.validate(ray | {"autoscalerOptions": {"idleTimeout": 5}}, _CLUSTER)


def test_groups_start_at_zero_and_grow(ray: dict[str, Any]) -> None:
    assert ray["enableInTreeAutoscaling"]
    groups = {g["groupName"]: g for g in ray["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert (group["minReplicas"], group["replicas"]) == (0, 0) and group["maxReplicas"] > 0
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    assert ray["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_everybody_asks_for_the_token(ray: dict[str, Any]) -> None:
    assert ray["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    (pod,) = _pods(_of("RayJob")["pretrain"])
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    secret = {"secretKeyRef": {"name": "ray-token", "key": "auth_token"}}
    assert env["RAY_AUTH_TOKEN"]["valueFrom"] == secret


def test_nothing_is_open_to_the_world(ray: dict[str, Any]) -> None:
    kinds = {o["kind"] for o in _objects()}
    assert not kinds & {"Ingress", "Secret", "ClusterRole", "ClusterRoleBinding", "RoleBinding"}
    for service in _of("Service").values():
        assert service["spec"]["type"] == "ClusterIP"
    assert ray["headGroupSpec"]["serviceType"] == "ClusterIP"
    text = "\n".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    assert not re.search(r"NodePort|LoadBalancer|hostPort|hostNetwork|hostPath|hostPID", text)


def test_no_pod_is_privileged(ray: dict[str, Any]) -> None:
    contexts = [c["securityContext"] for pod in _pods(_objects()) for c in pod["containers"]]
    contexts.append(ray["autoscalerOptions"]["securityContext"])
    assert len(contexts) >= 9
    for context in contexts:  # what the namespace's `restricted` level asks for
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "privileged" not in context
    labels = _of("Namespace")["beit3-ray"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_only_the_head_may_call_kubernetes() -> None:
    accounts = _of("ServiceAccount")
    mounted = {n for n, a in accounts.items() if a.get("automountServiceAccountToken", True)}
    assert mounted == {"beit3-head"}
    for pod in _pods(_objects()):
        assert pod.get("serviceAccountName") in accounts or not pod["automountServiceAccountToken"]


def test_no_pod_gets_the_services_as_environment() -> None:
    """The service `mlflow` would set MLFLOW_PORT, which its start script would take."""
    assert all(pod["enableServiceLinks"] is False for pod in _pods(_objects()))


def test_images_are_pinned_and_every_pod_has_limits() -> None:
    named = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["images"]
    tags = {image["name"]: image["newTag"] for image in named}
    for pod in _pods(_objects()):
        for container in pod["containers"]:
            image = container["image"]
            tag = tags.get(image) or image.partition(":")[2]
            assert re.fullmatch(r"[0-9]+\.[0-9]+[\w.-]*", str(tag)), image
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert {"cpu", "memory"} <= set(limits) and {"cpu", "memory"} <= set(requests)


def test_secrets_are_references() -> None:
    for pod in _pods(_objects()):
        for container in pod["containers"]:
            for entry in container.get("env", []):
                if re.search(r"TOKEN|PASSWORD|SECRET|KEY", entry["name"]):
                    assert set(entry["valueFrom"]) == {"secretKeyRef"}


def test_everything_is_closed_but_what_is_listed() -> None:
    policies = _of("NetworkPolicy")
    closed = policies.pop("deny-all")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        spec = policy["spec"]
        for rule in spec.get("ingress", []):
            assert rule["from"], name
            assert not any("ipBlock" in peer for peer in rule["from"]), name
        for rule in spec.get("egress", []):
            assert rule["to"], name
            for peer in rule["to"]:
                if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]
                    assert {p["port"] for p in rule["ports"]} <= {80, 443}
    ports = {
        port["port"] for rule in policies["job-api"]["spec"]["ingress"] for port in rule["ports"]
    }
    assert ports == {8265}


def test_what_policies_select_is_there() -> None:
    """A selector that matches no pod would let nothing through, and say nothing."""
    apps = {
        o["spec"]["template"]["metadata"]["labels"]["app"]
        for kind in ("Deployment", "StatefulSet")
        for o in _of(kind).values()
    }
    template = _of("RayJob")["pretrain"]["spec"]["submitterPodTemplate"]
    apps.add(template["metadata"]["labels"]["app"])
    for policy in _of("NetworkPolicy").values():
        labels = policy["spec"]["podSelector"].get("matchLabels", {})
        assert not labels or labels.get("app") in apps or labels["ray.io/cluster"] == "beit3-ray"


def test_kustomize_names_every_file_and_object() -> None:
    top = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {path.name for path in FOLDER.glob("*.yaml")}
    listed = set(top["resources"])
    assert files - listed == {"kustomization.yaml", "pretrain-job.yaml"}  # the job, by itself
    made: set[str] = set()
    for name in listed - files:
        folder = (FOLDER / name).resolve()
        inner = yaml.safe_load((folder / "kustomization.yaml").read_text())
        assert inner["generatorOptions"]["disableNameSuffixHash"]
        for generated in inner["configMapGenerator"]:
            made.add(generated["name"])
            assert all((folder / file).is_file() for file in generated.get("files", []))
    used = {
        volume["configMap"]["name"]
        for pod in _pods(_objects())
        for volume in pod.get("volumes", [])
        if "configMap" in volume
    }
    assert used and used <= made


def test_an_entrypoint_is_one_plain_command() -> None:
    """KubeRay pastes it unquoted into the submitter's `bash -c "if ...; then ray job submit ... --
    ENTRYPOINT ; fi ; ..."`: what a shell operator cuts off would run in that pod."""
    for name, job in _of("RayJob").items():
        entrypoint = job["spec"]["entrypoint"]
        assert not re.search(r"[;&|<>()`$#!*?\\\n\"']", entrypoint), name
        assert entrypoint.startswith("python "), name  # `cd`, `source`, ... end with their process


def test_the_job_runs_a_command_that_there_is() -> None:
    from pipelines import config, pretrain

    job = _of("RayJob")["pretrain"]["spec"]
    _, script, *options = job["entrypoint"].split()
    images = (ROOT / "infra" / "docker").glob("Dockerfile.*")
    (folder,) = {re.findall(r"^WORKDIR (.*)$", image.read_text(), re.M)[-1] for image in images}
    assert script == f"{folder}/pipelines/pretrain.py"
    assert (ROOT / script.removeprefix(f"{folder}/")).is_file()
    read = config.cli(pretrain.PRESETS, description="", args=options)
    assert read.train.workers == 8 and read.train.gpus_per_worker == 1
    given = yaml.safe_load(job["runtimeEnvYAML"])
    assert given == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}
    priced = set(re.findall(r"(\w+)=PRICE", job["runtimeEnvYAML"]))
    cluster = _of("RayCluster")["beit3-ray"]["spec"]
    assert priced == {"head", *(group["groupName"] for group in cluster["workerGroupSpecs"])}


def test_the_images_run_scripts_from_anywhere() -> None:
    """The job's folder is Ray's own: the package must be installed, not found beside the script."""
    for image in (ROOT / "infra" / "docker").glob("Dockerfile.*"):
        assert re.search(r"^RUN pip install .*--editable \.$", image.read_text(), re.M), image.name
