"""Manifests against Kubernetes' own schemas, and against what its API says beyond them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.job import Job, Tasks
from cluster.submission import Part, make_chain, plan_kubernetes
from common.cluster_settings import ClusterConfig
from common.config import PROJECT_ROOT
from common.errors import UsageError

CONFIG = PROJECT_ROOT / "configs" / "sd15.toml"
OUT, RUN = Path("/shards/laion"), Path("/runs/One run_1")
SETTINGS: dict[str, Any] = {
    "system": "kubernetes", "image": "registry/anytext2-distill:1",
    "volumes": {"/shards": "shards", "/runs": "my.runs"},
    "cpus": 4, "threads": 2, "memory": "32G", "batch_seconds": 60, "retries": 5,
}  # fmt: skip
OLDEST, NEWEST = "1.33", kubernetes_validate.latest_version()


def plan(tasks: Tasks | None = None, *more: str, run: Path | None = RUN, **changes: Any) -> list[Part]:
    options = ["--config", str(CONFIG), "--annotations", "/data/a.json", "--out", str(OUT), *more]
    chain = make_chain(options, options[:2], out=OUT, jobs=Path("/j"), run=run, run_jobs=Path("/j"))
    settings = ClusterConfig.model_validate({**SETTINGS, **changes})
    return plan_kubernetes(settings, chain, tasks or Tasks(num_tasks=16), CONFIG, "0102-030405")


def documents(part: Part) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(part.text))


def job_of(part: Part) -> dict[str, Any]:
    (found,) = [document for document in documents(part) if document["kind"] == "Job"]
    return found


def main_of(part: Part) -> dict[str, Any]:
    (container,) = job_of(part)["spec"]["template"]["spec"]["containers"]
    return container  # type: ignore[no-any-return]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_processes": 8, "gpus": 1},
        {
            "gpus": 0,
            "service_account": "me",
            "node_selector": {"gpu": "h100"},
            "secret": "s3",
            "volumes": {"/": "all"},
        },
    ],
)
def test_every_manifest_fits_the_schema(version: str, changes: dict[str, Any]) -> None:
    for part in plan(**changes):
        for document in documents(part):
            kubernetes_validate.validate(document, version, strict=True)


def test_a_schema_is_really_looked_at() -> None:
    job = job_of(plan()[0])
    job["spec"]["podFailurePolicy"]["rules"][1]["action"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, OLDEST, strict=True)


def test_the_rules_of_failure_stand_in_order_and_can_be_reached() -> None:
    for part in plan():
        spec = job_of(part)["spec"]
        rules = spec["podFailurePolicy"]["rules"]
        assert [rule["action"] for rule in rules] == ["Ignore", "FailJob", "FailIndex"]
        assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert [rule["onExitCodes"]["values"] for rule in rules[1:]] == [[2], [3]]
        assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {main_of(part)["name"]}
        # What the API asks for: FailIndex needs both of these, a policy of failures the last.
        assert (spec["completionMode"], spec["backoffLimitPerIndex"]) == ("Indexed", 5)
        assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_pods_learn_how_many_they_are_and_have_time_to_commit() -> None:
    array = plan(Tasks(num_tasks=16, throttle=4))[0]
    spec = job_of(array)["spec"]
    assert (spec["completions"], spec["parallelism"]) == (16, 4)
    assert main_of(array)["command"][-2:] == ["--num-tasks", "16"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    assert {entry["value"] for entry in main_of(array)["env"]} == {"2"}
    assert main_of(array)["resources"]["limits"] == {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": 1}


def test_training_is_one_pod_with_its_ranks_by_torchrun() -> None:
    one, many = plan()[2], plan(train_processes=8)[2]
    assert main_of(one)["command"][:3] == ["python", "pipeline.py", "train"]
    assert main_of(many)["command"][:4] == ["torchrun", "--standalone", "--nproc-per-node=8", "pipeline.py"]
    limits = main_of(many)["resources"]["limits"]
    assert limits == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": 8}
    assert job_of(many)["spec"]["completions"] == 1


def test_the_configuration_goes_along_unchanged() -> None:
    part = plan()[0]
    config = documents(part)[0]
    assert config["data"]["config.toml"].strip() == CONFIG.read_text().strip()
    command = main_of(part)["command"]
    mounted = {mount["mountPath"]: mount["name"] for mount in main_of(part)["volumeMounts"]}
    place = Path(command[command.index("--config") + 1])
    assert (place.name, mounted[str(place.parent)]) == ("config.toml", "config")
    volumes = {volume["name"]: volume for volume in job_of(part)["spec"]["template"]["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"] == job_of(part)["metadata"]["name"]


def test_every_mount_has_its_volume_and_names_are_those_of_kubernetes() -> None:
    for part in plan():
        job = job_of(part)
        volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
        mounts = main_of(part)["volumeMounts"]
        assert {mount["name"] for mount in mounts} == volumes
        for name in (*volumes, job["metadata"]["name"]):
            assert name.replace("-", "").isalnum()
            assert name == name.lower()
        assert len(job["metadata"]["name"]) <= 63 - len("-99999")


def test_a_set_or_run_that_would_be_lost_with_its_pod_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--out /shards/laion lies in no folder of cluster.volumes.*; --upload URL"
    ):
        plan(volumes={"/other": "other"})
    with pytest.raises(UsageError, match=r"--out /runs/One run_1 lies in no folder of cluster.volumes.*share$"):
        plan(volumes={"/shards": "shards"})
    with pytest.raises(UsageError, match="cluster.image is empty"):
        plan(image="")


def test_shards_are_copied_to_a_bucket_with_the_credentials_of_a_secret() -> None:
    part = plan(None, "--upload", "s3://bucket/laion", secret="s3")[0]
    command = main_of(part)["command"]
    assert command[command.index("--upload") + 1] == "s3://bucket/laion"
    assert main_of(part)["envFrom"] == [{"secretRef": {"name": "s3"}}]


def test_equal_names_of_two_submissions_do_not_meet() -> None:
    job = Job(command="train", options=(), folder=RUN, jobs=Path("/j"))
    assert job.name == "train-one-run-1"
    assert replace(job, suffix="-7").name != job.name
