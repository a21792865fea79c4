"""Which rank, of how many, and where rank 0 is: from what launchers set, and what the command line says."""

import pytest

from parity.cluster.place import PlaceError, find, first_node

BY_HAND = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "1234",
           "PARITY_TOKEN": "secret"}  # fmt: skip
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0",
         "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}  # fmt: skip
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "moe-0.moe", "PARITY_TOKEN": "secret"}


def facts(place):
    return place.rank, place.ranks, place.local_rank, place.host, place.port


def test_the_variables_of_torchrun_say_it_all_and_the_port_is_the_one_after_its_own():
    assert facts(find(BY_HAND)) == (3, 8, 1, "10.0.0.5", 1235)


def test_in_a_slurm_step_rank_zero_is_on_the_first_node_and_the_port_comes_from_the_job():
    assert facts(find(SLURM)) == (5, 8, 1, "gpu007", 23457)
    assert find(SLURM).token == find({**SLURM, "SLURM_PROCID": "0"}).token
    assert find(SLURM).token != find({**SLURM, "SLURM_STEP_ID": "1"}).token


def test_without_a_list_of_nodes_slurms_launch_node_is_taken():
    assert find({k: v for k, v in SLURM.items() if k != "SLURM_JOB_NODELIST"}).host == "10.0.0.1"


def test_a_pod_of_an_indexed_job_is_one_rank():
    assert facts(find(KUBERNETES)) == (1, 2, 0, "moe-0.moe", 29501)


def test_torchrun_inside_of_slurm_inside_of_a_pod_is_torchrun():
    assert facts(find({**KUBERNETES, **SLURM, **BY_HAND})) == (3, 8, 1, "10.0.0.5", 1235)


def test_options_win_over_every_variable():
    assert facts(find(BY_HAND, rank=0, ranks=2, local_rank=0, host="other", port=99)) == (0, 2, 0, "other", 99)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],login", "gpu007"),
        ("a,b", "a"),
        ("a1", "a1"),
        ("rack[2,4]-node[01-03]", "rack2-node01"),
        ("node-[12]", "node-12"),
        ("tux[10-11].example.org,x", "tux10.example.org"),
    ],
)
def test_the_first_node_of_a_list_as_slurm_writes_it(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "RANK is not set: start this command under torchrun, srun"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"RANK": "one"}, "RANK='one' is no number"),
        ({"RANK": "-1"}, "RANK='-1' is no number"),
        ({"RANK": "8"}, "rank 8 of 8; ranks are counted from 0"),
        ({"MASTER_ADDR": None}, "where rank 0 is nobody says"),
        ({"MASTER_PORT": "65535"}, "port 65536: it must be 1 to 65535"),
        ({"PARITY_TOKEN": None}, "set PARITY_TOKEN to the same text"),
        ({"PARITY_TOKEN": None, "TORCHELASTIC_RUN_ID": "none"}, "set PARITY_TOKEN to the same text"),
    ],
    ids=str,
)
def test_what_is_missing_or_wrong_is_named(change, message):
    environment = {key: value for key, value in {**BY_HAND, **change}.items() if value is not None}
    with pytest.raises(PlaceError) as caught:
        find(environment)
    assert message in str(caught.value)


def test_ranks_of_one_host_need_no_token():
    for host in ("127.0.0.1", "localhost", "::1"):
        assert find({**BY_HAND, "MASTER_ADDR": host, "PARITY_TOKEN": ""}).token


def test_a_token_is_not_printed_with_the_place():
    assert "secret" not in repr(find(BY_HAND))
