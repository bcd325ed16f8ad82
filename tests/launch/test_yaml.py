"""What the recipes describe in YAML, against the real schemas of Kubernetes and JobSet; and what it runs."""

import pathlib
import re
import subprocess

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
KUBERNETES = "1.33"
ARGS = (
    "--config=configs/decoder.py:size=B",
    "--config.sample_prompts=('a \"b\" \\\\c',)",
    "--workdir=gs://b/${X} $(Y)",
    "a$$b $$(HOME) c$",
    "two\nlines\tand\ra tab \n",
    "-n",
    "",
)
TPU = ("--name=gpt", "--image=i", "--accelerator=tpu-v5p-slice", "--topology=4x4x8", "--slices=2")
GPU = ("--gpu", "--name=gpt", "--image=i", "--accelerator=nvidia-h100-80gb", "--hosts=2")


def known(part, whole):
    """Whether everything in `part` is in `whole`, which may have defaults besides."""
    if isinstance(part, dict):
        return all(key in whole and known(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(known, part, whole))
    return part == whole


def check(document):
    """Raises unless a JobSet has exactly the fields and types that its schema and that of Kubernetes know."""
    model = JobsetV1alpha2JobSet.from_dict(document)
    assert known(document, model.to_dict())  # what the model does not know is left out of it
    for job in document["spec"]["replicatedJobs"]:
        template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def as_kubernetes(argument, variables):
    """What a container gets for an argument: $$ is $, and $(NAME) the value of a variable, if there is one."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), argument)


def jobset(launch, *options):
    done = launch("gke.sh", "submit", *options, "--", *ARGS)
    assert done.status == 0, done.error
    assert done.commands == [["kubectl", "create", "--filename=-"]]
    return yaml.safe_load(done.input)


@pytest.mark.parametrize("options", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("mount", [(), ("--mount=gs://data",)], ids=["streamed", "mounted"])
def test_jobsets_fit_the_schemas(options, mount, launch):
    document = jobset(launch, *options, *mount)
    check(document)
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert [v["csi"]["volumeAttributes"]["bucketName"] for v in pod["spec"].get("volumes", []) if "csi" in v] == (
        ["data"] if mount else []
    )
    assert ("metadata" in pod) == bool(mount)
    arguments = [as_kubernetes(a, {"Y": "y", "HOME": "h"}) for a in pod["spec"]["containers"][0]["args"]]
    assert arguments == ["imagegpt_jax.train", *ARGS]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicatedJob"), []),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completion"), 2),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "arg"), ["x"]),
    ],
)
def test_the_schemas_would_notice(path, value, launch):
    document = jobset(launch, *TPU)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises((ValueError, AssertionError, kubernetes_validate.ValidationError)):
        check(document)


def test_words_that_yaml_takes_for_something_else_stay_words(launch):
    options = ("--name=no", "--image=1.5", "--accelerator=on", "--topology=2x2", "--service_account=12", "--mount=0x10")
    document = jobset(launch, *options)
    check(document)
    assert document["metadata"]["name"] == "no"
    gpu = ("--gpu", "--hosts=2", *(o for o in options if not o.startswith("--topology")))
    check(jobset(launch, *gpu))


def test_a_name_is_short_enough_for_those_that_follow_from_it(launch):
    name = "n" * 40
    document = jobset(launch, *TPU, f"--name={name}", "--slices=256")
    (job,) = document["spec"]["replicatedJobs"]
    last = f"{name}-{job['name']}-255-{job['template']['spec']['completions'] - 1}-abcde"  # the pod's name
    assert len(last) <= 63


def test_pods_on_the_network_of_the_node_mount_as_their_own_service_account(launch):
    for options in (TPU, GPU):
        (job,) = jobset(launch, *options, "--mount=data")["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        (volume,) = [v["csi"]["volumeAttributes"] for v in pod["volumes"] if "csi" in v]
        assert ("hostNetworkPodKSA" in volume) == pod.get("hostNetwork", False)
        assert volume.get("hostNetworkPodKSA", "true") == "true"


def test_a_jobset_of_the_same_name_is_an_error(launch):
    done = launch("gke.sh", "submit", *TPU, "--", *ARGS, AS_KUBECTL='[ "$1" != create ]')
    assert done.status == 1


def test_a_slice_has_a_pod_for_each_host_and_all_of_its_chips(launch):
    (job,) = jobset(launch, *TPU)["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4 * 4 * 8 // 4
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_gpu_pods_are_told_where_the_first_one_is(launch):
    (job,) = jobset(launch, *GPU)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    environment = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"] == "gpt-node-0-0.gpt:8476"
    assert environment["JAX_NUM_PROCESSES"] == "2"
    assert "job-completion-index" in environment["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]


def test_a_dry_run_prints_the_jobset_that_a_real_one_submits(launch):
    real = launch("gke.sh", "submit", *TPU, "--", *ARGS)
    dry = launch("gke.sh", "submit", "--dry_run", *TPU, "--", *ARGS)
    assert not dry.commands
    first, _, rest = dry.output.partition("\n")
    assert first == "kubectl create --filename=-"
    assert rest == real.input


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_runs_the_program_on_every_node(nodes, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nenv | grep ^JAX_ | sort\n')
    python.chmod(0o755)
    environment = {
        **{name: str(value) for name, value in task["envs"].items()},
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    bare = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True)
    assert bare.returncode == 2
    assert bare.stderr.startswith("error: nothing to run")
    environment["ARGS"] = "--config=x --workdir='gs://b/a run'"
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, check=True)
    program, variables = ["-m", "imagegpt_jax.train", "--config=x", "--workdir=gs://b/a run"], []
    if nodes > 1:
        variables = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"]
    assert done.stdout.splitlines() == program + variables


def test_the_image_holds_what_the_recipes_run():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["python", "-m"]' in lines
    kept = (LAUNCH.parent / ".dockerignore").read_text().splitlines()
    assert {"!imagegpt_jax", "!configs", "!tools", "!pyproject.toml", "!README.md", "!LICENSE"} <= set(kept)
    (weights,) = re.findall(r"convert_lpips.py .*--output=(\S+)", "\n".join(lines))
    assert f"--config.loss.lpips_weights={weights}" in (LAUNCH / "README.md").read_text()
