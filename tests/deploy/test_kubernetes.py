"""The Kubernetes manifests, rendered by kubectl and checked against the schemas of Kubernetes."""

import os
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import psycopg
import pytest
import yaml
from tests.deploy.deploy_support import (
    DEPLOY,
    USER_ID,
    assert_settings,
    check,
    program,
    stop_grace_s,
)

from fidelora.jobs.job import new_job
from fidelora.jobs.sql import SqlStore
from fidelora.recipe import Recipe

FOLDER = DEPLOY / "kubernetes"
VERSION = "1.34"  # the oldest release of Kubernetes that the project supported in November 2026
OVERLAYS = ["cpu", "cuda"]
PATHS = [*OVERLAYS, "db-upgrade", "keys"]


@lru_cache
def documents(name: str) -> list[dict[str, Any]]:
    """Return the objects of an overlay, or of a file that is applied on its own."""
    if name not in OVERLAYS:
        return [yaml.safe_load((FOLDER / f"{name}.yaml").read_text())]
    kubectl = program("kubectl", "kubectl 1.21 or later")
    overlay = str(FOLDER / "overlays" / name)
    return list(yaml.safe_load_all(check(kubectl, "kustomize", overlay)))


def objects(name: str, kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in documents(name) if one["kind"] == kind}


def pods(name: str) -> list[dict[str, Any]]:
    single = [one["spec"] for one in documents(name) if one["kind"] == "Pod"]
    templates = [
        one["spec"]["template"]["spec"]
        for one in documents(name)
        if one["kind"] in ("Deployment", "Job")
    ]
    return [*single, *templates]


@pytest.mark.parametrize("name", PATHS)
def test_objects_satisfy_the_schemas_of_kubernetes(name):
    schemas = pytest.importorskip("kubernetes_validate")
    for one in documents(name):
        if one["kind"] != "ScaledObject":  # of KEDA
            schemas.validate(one, VERSION, strict=True)


@pytest.mark.parametrize("name", PATHS)
def test_pods_have_no_rights_and_a_read_only_root(name):
    for pod in pods(name):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == USER_ID
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["image"].startswith("registry.example.com/fidelora:")


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_use_existing_settings_and_may_finish(name):
    (shared,) = objects(name, "ConfigMap").values()
    for pod in pods(name):
        (container,) = pod["containers"]
        own = {one["name"]: one["value"] for one in container["env"]}
        assert_settings(shared["data"] | own)
        assert pod["terminationGracePeriodSeconds"] >= 60 + stop_grace_s(own)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_have_probes_and_disruption_budgets(name):
    deployments = objects(name, "Deployment")
    assert deployments.keys() == {"fidelora-server", "fidelora-worker"}
    for one in deployments.values():
        (container,) = one["spec"]["template"]["spec"]["containers"]
        paths = {
            probe: container[probe]["httpGet"]["path"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        }
        assert paths == {
            "startupProbe": "/health",
            "livenessProbe": "/health",
            "readinessProbe": "/ready",
        }
        (budget,) = (
            budget
            for budget in objects(name, "PodDisruptionBudget").values()
            if budget["spec"]["selector"] == one["spec"]["selector"]
        )
        assert budget["spec"].keys() & {"minAvailable", "maxUnavailable"}
    labels = deployments["fidelora-server"]["spec"]["template"]["metadata"]["labels"]
    for service in objects(name, "Service").values():
        assert service["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_browsers_stay_with_one_server(name):
    services = objects(name, "Service")
    assert {name: one["spec"].get("sessionAffinity") for name, one in services.items()} == {
        "fidelora": None,
        "fidelora-page": "ClientIP",
    }


def test_a_bucket_replaces_the_shared_volume(tmp_path):
    kubectl = program("kubectl", "kubectl 1.21 or later")
    parts = {
        "resources": [os.path.relpath(FOLDER / "overlays" / "cuda", tmp_path)],
        "components": [os.path.relpath(FOLDER / "components" / "object-store", tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    found = list(yaml.safe_load_all(check(kubectl, "kustomize", str(tmp_path))))
    (shared,) = (one["data"] for one in found if one["kind"] == "ConfigMap")
    assert_settings(shared)
    assert shared["FIDELORA_OBJECT_STORE"] == "s3://fidelora"
    assert not [one for one in found if one["kind"] == "PersistentVolumeClaim"]
    deployments = [one for one in found if one["kind"] == "Deployment"]
    assert len(deployments) == 2
    for one in deployments:
        assert one["spec"]["template"]["spec"]["volumes"][0] == {"name": "shared", "emptyDir": {}}
    schemas = pytest.importorskip("kubernetes_validate")
    for one in found:
        if one["kind"] != "ScaledObject":
            schemas.validate(one, VERSION, strict=True)


def test_workers_on_gpus_are_scaled_to_zero_and_back():
    (scaled,) = objects("cuda", "ScaledObject").values()
    workers = objects("cuda", "Deployment")[scaled["spec"]["scaleTargetRef"]["name"]]
    assert "replicas" not in workers["spec"]  # applying the manifest again must not change it
    (container,) = workers["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {one["name"]: one["value"] for one in container["env"]}["DEVICE"] == "cuda:0"
    assert scaled["spec"]["minReplicaCount"] == 0
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "postgresql"
    assert trigger["metadata"]["connectionFromEnv"] == "FIDELORA_STORE_URL"
    assert {"secretRef": {"name": "fidelora"}} in container["envFrom"]


def test_the_query_for_scaling_counts_unfinished_requests(postgres_url):
    file = FOLDER / "overlays" / "cuda" / "scaled-object.yaml"
    (trigger,) = yaml.safe_load(file.read_text())["spec"]["triggers"]
    store = SqlStore(postgres_url)

    def count() -> int:
        with psycopg.connect(postgres_url) as connection:
            row = connection.execute(trigger["metadata"]["query"]).fetchone()
        assert row is not None
        return int(row[0])

    try:
        assert count() == 0
        now = datetime.now(UTC)
        for _ in range(3):
            store.add(new_job((Recipe(prompt="a ball"),), now))
        assert count() == 3
        job = store.claim("worker", None, 60)
        assert job is not None
        assert count() == 3
        store.stop(job.id, job.epoch)
        assert count() == 2
    finally:
        store.close()
