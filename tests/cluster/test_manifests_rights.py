"""The rights that the manifests give: each check is shown the manifests, and mistakes in them that it must see."""

from __future__ import annotations

import copy
import ipaddress
import re
from typing import Any

import pytest
import yaml

from tests.cluster.test_manifests import KUBERAY, MANIFESTS, read

PATHS = {"/tmp", "/dev/shm", "/home/ray"}
"""Folders that a node writes to; everything else of its file system is read-only."""
PORTS = {"submit": 8265, "metrics": 8080}


def pods(name: str, document: Any) -> dict[str, Any]:
    """The pod templates of a manifest by their group."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return found | ({"submitter": spec["submitterPodTemplate"]} if name == "rayjob" else {})


def pod_problems(name: str, document: Any) -> list[str]:
    accounts = {one["metadata"]["name"]: one for one in yaml.safe_load_all((KUBERAY / "access.yaml").read_text())}
    options = document["spec"].get("rayClusterSpec", document["spec"])["autoscalerOptions"]
    problems = [f"autoscaler: {text}" for text in container_problems(options, {"/tmp", "/home/ray"})]
    for group, template in pods(name, document).items():
        spec, security = template["spec"], template["spec"]["securityContext"]
        wants_token = group == "head"  # its autoscaler asks for pods
        if spec.get("automountServiceAccountToken") is not wants_token:
            problems.append(f"{group}: token")
        if accounts[spec["serviceAccountName"]]["automountServiceAccountToken"] is not wants_token:
            problems.append(f"{group}: account")
        if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
            problems.append(f"{group}: root")
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            problems.append(f"{group}: seccomp")
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            problems.append(f"{group}: host")
        if template.get("metadata", {}).get("labels", {}).get("app") != "clearsep":
            problems.append(f"{group}: no network policy")
        empty = {volume["name"] for volume in spec["volumes"] if volume.keys() == {"name", "emptyDir"}}
        for container in spec["containers"]:
            wanted = PATHS - {"/dev/shm"} if group == "submitter" else PATHS
            problems += [f"{group}: {text}" for text in container_problems(container, wanted)]
            if not {mount["name"] for mount in container["volumeMounts"]} <= empty:
                problems.append(f"{group}: volumes")
    return problems


def container_problems(container: Any, wanted: set[str]) -> list[str]:
    security, problems = container.get("securityContext", {}), []
    if security.get("readOnlyRootFilesystem") is not True:
        problems.append("writable")
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        problems.append("privileges")
    if security.get("capabilities") != {"drop": ["ALL"]}:
        problems.append("capabilities")
    if {mount["mountPath"] for mount in container.get("volumeMounts", [])} != wanted:
        problems.append("folders to write to")
    return problems


def network_problems(policy: Any) -> list[str]:
    spec, problems = policy["spec"], []
    if (policy["apiVersion"], policy["kind"]) != ("networking.k8s.io/v1", "NetworkPolicy"):
        problems.append("kind")
    if spec["podSelector"] != {"matchLabels": {"app": "clearsep"}} or "Ingress" not in spec["policyTypes"]:
        problems.append("it is not of the cluster's pods")
    for rule in spec["ingress"]:
        peers, ports = rule.get("from", []), {port["port"] for port in rule.get("ports", [])}
        if not peers or any(not peer.get("podSelector", {}).get("matchLabels") for peer in peers):
            problems.append("anybody")
        others = [peer for peer in peers if peer != {"podSelector": spec["podSelector"]}]
        if others and (len(ports) != 1 or not ports <= set(PORTS.values())):
            problems.append("others reach ports of Ray")
    return problems


def dockerfile_problems(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    problems = [] if lines[:3] == ["ARG BASE", "FROM ${BASE}", "ARG BASE"] else ["the base has a default or none"]
    guard = re.fullmatch(r'RUN case "\$BASE" in (\S+)\) ;; \*\) .*exit 1 ;; esac', lines[3])
    if guard is None or guard[1] != "*@sha256:*":
        problems.append("a base without digest is built")
    return problems + ([] if "USER ray" in lines else ["root"])


def aws_problems(config: Any) -> list[str]:
    """Without a group of the node's own, Ray's launcher makes one that opens SSH to the whole internet."""
    nodes = config["available_node_types"]
    problems = [name for name, node in nodes.items() if not node["node_config"].get("SecurityGroupIds")]
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        ranges = [one["CidrIp"] for one in rule.get("IpRanges", [])]
        problems += [one for one in ranges if ipaddress.ip_network(one).num_addresses > 1]
    return problems


HEAD = ("headGroupSpec", "template", "spec")
CPU = ("workerGroupSpecs", 1, "template", "spec")
POD_MISTAKES: list[tuple[tuple[Any, ...], Any, str]] = [
    ((*CPU, "automountServiceAccountToken"), True, "cpu: token"),
    ((*CPU, "serviceAccountName"), "clearsep-head", "cpu: account"),
    ((*HEAD, "automountServiceAccountToken"), False, "head: token"),
    ((*CPU, "securityContext", "runAsNonRoot"), False, "root"),
    ((*HEAD, "securityContext", "runAsUser"), 0, "root"),
    ((*CPU, "securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccomp"),
    ((*HEAD, "hostNetwork"), True, "host"),
    ((*CPU[:-1], "metadata", "labels"), {}, "cpu: no network policy"),
    ((*CPU, "containers", 0, "securityContext", "readOnlyRootFilesystem"), False, "writable"),
    ((*HEAD, "containers", 0, "securityContext", "allowPrivilegeEscalation"), True, "head: privileges"),
    ((*HEAD, "containers", 0, "securityContext", "capabilities"), {"drop": []}, "head: capabilities"),
    ((*HEAD, "containers", 0, "volumeMounts"), [{"name": "shm", "mountPath": "/dev/shm"}], "head: folders to write to"),
    ((*HEAD, "volumes", 1), {"name": "scratch", "hostPath": {"path": "/tmp"}}, "head: volumes"),
    (("autoscalerOptions", "securityContext"), {}, "autoscaler: writable"),
]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_pods_have_no_more_rights_than_they_need(name: str) -> None:
    assert pod_problems(name, read(KUBERAY / f"{name}.yaml")) == []


@pytest.mark.parametrize(("path", "value", "problem"), POD_MISTAKES)
def test_the_check_of_pods_sees_mistakes(path: tuple[Any, ...], value: Any, problem: str) -> None:
    wrong = read(KUBERAY / "raycluster.yaml")
    change(wrong["spec"], path, value)
    assert problem in " / ".join(pod_problems("raycluster", wrong))


def test_the_check_of_pods_sees_the_submitters_mistakes() -> None:
    wrong = read(KUBERAY / "rayjob.yaml")
    change(wrong["spec"], ("submitterPodTemplate", "spec", "automountServiceAccountToken"), True)
    assert pod_problems("rayjob", wrong) == ["submitter: token"]


def change(node: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def test_only_the_clusters_pods_reach_rays_ports() -> None:
    policy = read(KUBERAY / "network.yaml")
    assert network_problems(policy) == []
    named = [port for template in pods("", read(KUBERAY / "raycluster.yaml")).values() for port in ports_of(template)]
    assert set(PORTS.values()) <= set(named)
    monitored = read(KUBERAY / "monitoring.yaml")["spec"]["podMetricsEndpoints"]
    assert [endpoint["port"] for endpoint in monitored] == ["metrics"]


def ports_of(template: Any) -> list[int]:
    return [port["containerPort"] for one in template["spec"]["containers"] for port in one["ports"]]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("podSelector",), {"matchLabels": {"app": "other"}}),
        (("policyTypes",), ["Egress"]),
        (("ingress", 0), {}),
        (("ingress", 0, "from", 0), {"podSelector": {}}),
        (("ingress", 1, "ports"), []),
        (("ingress", 1, "ports", 0, "port"), 6379),
        (("ingress", 2, "from", 0, "podSelector"), {}),
        (("ingress", 2, "from"), [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
    ],
)
def test_the_check_of_the_network_sees_mistakes(path: tuple[Any, ...], value: Any) -> None:
    wrong = read(KUBERAY / "network.yaml")
    change(wrong["spec"], path, value)
    assert network_problems(wrong) != []


def test_the_image_is_built_on_a_digest_only() -> None:
    text = (MANIFESTS / "Dockerfile").read_text()
    assert dockerfile_problems(text) == []
    for right, wrong in (
        ("FROM ${BASE}", "FROM python:3.11-slim-bookworm"),
        ("ARG BASE\nFROM", "ARG BASE=python:3.11-slim-bookworm\nFROM"),
        ("*@sha256:*)", "*)"),
        ("exit 1 ;; esac", "true ;; esac"),
        ("USER ray", "USER root"),
    ):
        assert right in text
        assert dockerfile_problems(text.replace(right, wrong)) != [], wrong


def test_aws_machines_are_in_a_security_group_of_ones_own() -> None:
    config = read(MANIFESTS / "aws.yaml")
    assert aws_problems(config) == []
    for name in config["available_node_types"]:
        wrong = copy.deepcopy(config)
        del wrong["available_node_types"][name]["node_config"]["SecurityGroupIds"]
        assert aws_problems(wrong) == [name]
    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    config["provider"]["security_group"] = {"IpPermissions": [rule]}
    assert aws_problems(config) == ["0.0.0.0/0"]
