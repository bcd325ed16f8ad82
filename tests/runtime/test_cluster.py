"""Which of how many processes this one is, by what launchers set in the environment."""

import os

import pytest

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import cluster, distributed


@pytest.fixture
def variables(monkeypatch):
    """Sets the environment of a launcher, without what this machine's may have."""
    for name in os.environ:
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_")):
            monkeypatch.delenv(name)

    def use(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return use


SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        (EXPLICIT, cluster.Cluster("10.0.0.1:8476", 4, 3)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM, cluster.Cluster("node07:61444", 16, 11, (3,))),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # The only process of a node has all of its devices.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, cluster.Cluster("node07:61444", 16, 11)),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, cluster.Cluster("node07:61444", 16, 11)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, cluster.Cluster("a:1", 16, 11, (3,))),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            cluster.Cluster("10.96.0.1:62624", 4, 1, (1,)),
        ),
        (OPEN_MPI | EXPLICIT, cluster.Cluster("10.0.0.1:8476", 4, 3)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_the_environment_says_which_process_this_is(values, expected, variables):
    variables(**values)
    assert cluster.find() == expected


def test_hosts_of_tpu_slices_are_found_as_jax_does(variables, monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    assert cluster.find() is None  # chips, and no metadata server
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    variables(TPU_SKIP_MDS_QUERY="true", TPU_WORKER_HOSTNAMES="a,b,c,d", TPU_WORKER_ID="2", **slices)
    assert cluster.find() == cluster.Cluster("localhost:8482", 8, 6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS is set without the rest"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID is set without"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "process 4 of 4 is not possible"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "write host:port"),
        (OPEN_MPI, "a process of Open MPI"),
        ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "an indexed Kubernetes job"),
    ],
)
def test_half_an_environment_is_an_error_that_says_what_to_set(values, words, variables):
    variables(**values)
    with pytest.raises(UserError, match=words) as error:
        cluster.find()
    assert "JAX_" in str(error.value)


def test_a_process_that_may_have_others_is_known_at_once(variables, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not cluster.may_have_others()
    variables(TPU_ML_PLATFORM="JAX")  # of JAX itself
    assert not cluster.may_have_others()
    variables(SLURM_JOB_ID="7")
    assert cluster.may_have_others()
    variables(JAX_NUM_PROCESSES="1")
    assert not cluster.may_have_others()
    variables(JAX_NUM_PROCESSES="2")
    assert cluster.may_have_others()


def test_alone_nothing_happens(variables, tmp_path):
    with distributed.distributed_context(), distributed.failing_jointly():
        distributed.assert_equal(config={"a": 1})
        distributed.wait_for_file(tmp_path / "not there")
        assert distributed.is_main_process()
    with pytest.raises(UserError, match="as it is"), distributed.distributed_context():
        raise UserError("as it is")
