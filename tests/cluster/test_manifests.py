"""The manifests against the schemas of their readers: KubeRay's definitions and Ray's cluster launcher."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler._private.util
import yaml

from engine.passes.speed import ray_metrics
from tests.support import ROOT

MANIFESTS = ROOT / "cluster" / "manifests"
KUBERAY = MANIFESTS / "kuberay"
SCHEMAS = Path(__file__).parent / "schemas"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def strict(schema: Any) -> Any:
    """The schema as Kubernetes' strict validation reads it: unknown fields are errors, ``int-or-string`` is either."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return schema
    if (
        schema.get("type") == "object"
        and isinstance(schema.get("properties"), dict)
        and "additionalProperties" not in schema
    ):
        schema["additionalProperties"] = False
    return schema


def definition(kind: str) -> jsonschema.Draft7Validator:
    """A validator of KubeRay's v1 of a kind; it accepts the metadata that Kubernetes defines for every object."""
    document = yaml.safe_load(gzip.decompress((SCHEMAS / f"ray.io_{kind}.yaml.gz").read_bytes()))
    (version,) = [one for one in document["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def problems(validator: jsonschema.Draft7Validator, document: Any) -> list[str]:
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in validator.iter_errors(document)]


@pytest.fixture(scope="module")
def ray_cluster_definition() -> jsonschema.Draft7Validator:
    return definition("rayclusters")


@pytest.fixture(scope="module")
def ray_cluster() -> Any:
    return read(KUBERAY / "raycluster.yaml")


def groups(document: Any) -> dict[str, Any]:
    spec = document["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def test_the_ray_cluster_fits_kuberays_schema(ray_cluster: Any, ray_cluster_definition: Any) -> None:
    assert problems(ray_cluster_definition, ray_cluster) == []


def test_the_ray_job_fits_kuberays_schema() -> None:
    assert problems(definition("rayjobs"), read(KUBERAY / "rayjob.yaml")) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "authOptions", "mode"], "tokens"),
        (["spec", "headGroupSpec", "rayStartParam"], {}),
        (["spec", "workerGroupSpecs", 0, "replicas"], "many"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "livenessProb"], {}),
    ],
)
def test_the_check_sees_mistakes(ray_cluster: Any, ray_cluster_definition: Any, path: list[Any], value: Any) -> None:
    wrong = copy.deepcopy(ray_cluster)
    node = wrong
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    assert problems(ray_cluster_definition, wrong) != []


def test_the_job_brings_the_cluster_of_the_other_file(ray_cluster: Any) -> None:
    assert read(KUBERAY / "rayjob.yaml")["spec"]["rayClusterSpec"] == ray_cluster["spec"]


def test_the_jobs_command_stays_one_word_in_the_submitters_shell() -> None:
    words = shlex.split(read(KUBERAY / "rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["bash", "-c"] and len(words) == 3


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_labels_that_kuberay_sets_are_not_set_here(name: str) -> None:
    assert "app.kubernetes.io/name" not in (KUBERAY / f"{name}.yaml").read_text()
    spec = read(KUBERAY / f"{name}.yaml")["spec"]
    spec = spec.get("rayClusterSpec", spec)
    wanted = read(KUBERAY / "monitoring.yaml")["spec"]["selector"]["matchLabels"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert wanted.items() <= group["template"]["metadata"]["labels"].items()


def test_the_option_of_a_state_that_outlives_the_head_fits(ray_cluster: Any, ray_cluster_definition: Any) -> None:
    patched = copy.deepcopy(ray_cluster)
    patched["spec"] |= read(KUBERAY / "gcs-fault-tolerance.yaml")["spec"]
    assert problems(ray_cluster_definition, patched) == []


def test_all_pods_have_limits_probes_and_metrics(ray_cluster: Any) -> None:
    for name, group in groups(ray_cluster).items():
        (container,) = group["template"]["spec"]["containers"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
        assert container["livenessProbe"]["exec"] and container["readinessProbe"]["exec"], name
        assert "metrics" in [port["name"] for port in container["ports"]]
    assert (
        groups(ray_cluster)["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    )


def test_the_cluster_scales_needs_a_token_and_has_the_pinned_ray(ray_cluster: Any) -> None:
    spec = ray_cluster["spec"]
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned is not None and spec["rayVersion"] == pinned[1]
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("name", ["local", "aws"])
def test_the_launchers_files_fit_rays_schema(name: str) -> None:
    config = read(MANIFESTS / f"{name}.yaml")
    # What the launcher makes of it before it looks; of AWS without asking AWS for the machines' sizes.
    launcher = ray.autoscaler._private.util
    launcher.validate_config((launcher.prepare_config if name == "local" else launcher.fillout_defaults)(config))


def test_the_launchers_check_sees_mistakes() -> None:
    config = read(MANIFESTS / "aws.yaml")
    with pytest.raises(jsonschema.ValidationError):
        ray.autoscaler._private.util.validate_config(config | {"idle_minutes": 3})


@pytest.mark.parametrize("name", ["local", "aws"])
def test_the_launchers_clusters_need_a_token_and_keep_their_dashboard_local(name: str) -> None:
    config = read(MANIFESTS / f"{name}.yaml")
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
        assert name != "local" or command.startswith(". /opt/clearsep/.venv/bin/activate && "), "ray is nowhere else"
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_aws_gpu_machines_are_spot_and_come_with_the_work() -> None:
    worker = read(MANIFESTS / "aws.yaml")["available_node_types"]["gpu-spot"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_image_contains_all_code() -> None:
    packages = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages is not None
    lines = (MANIFESTS / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    wanted = {name.partition(".")[0] for name in json.loads(packages[1])}
    assert wanted | {"clearsep.py", "pyproject.toml", "requirements.lock"} <= copied
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied <= allowed


def test_the_cpu_image_drops_gpu_packages_from_the_lock() -> None:
    (line,) = [line for line in (MANIFESTS / "Dockerfile").read_text().splitlines() if line.strip().startswith("sed ")]
    command = line.strip().removesuffix("\\").replace(" > cpu.txt", "")
    text = subprocess.check_output(["sh", "-c", command], text=True, cwd=ROOT)
    lines = [line for line in text.splitlines() if line.strip()]
    assert all(re.match(r"[A-Za-z0-9_.\-\[\]]+==[^ ]+( ;.*)?$", line) for line in lines), lines
    names = [line.partition("==")[0] for line in lines]
    assert {"torch", "torchaudio", "ray"} <= set(names)
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_board_shows_our_metrics_and_no_others() -> None:
    board = json.loads((MANIFESTS / "grafana.json").read_text())
    expressions = " ".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", []))
    named = set(re.findall(r"ray_(clearsep_\w+?)(?:_total)?\b", expressions))
    assert named == ray_metrics.COUNTERS.keys() | ray_metrics.GAUGES.keys()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
