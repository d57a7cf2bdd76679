"""The plan of resources: shares that add up to no more than there is, or a message with the sum (case C09)."""

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.cluster.plan import LEAST_SHARE, Plan, live_plan, plan_resources
from raydistill.config import Cluster, RunConfig
from raydistill.errors import ConfigError
from raydistill.graph import stage_named

SLACK = 1e-9
NO_TEACHER = {"kd_weight": 0, "alignment_weight": 0, "uniformity_weight": 0}
machines = st.integers(1, 8) | st.integers(1, 64)
workers = st.integers(0, 8) | st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda pair: tuple(sorted(pair)))
actors = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda pair: tuple(sorted(pair)))


def config_of(workers_: object = 1, actors_: object = (1, 4), fresh: bool = False, teacher: bool = True) -> RunConfig:
    return RunConfig.model_validate(
        {
            "images": {"path": "x"},
            "teacher": {} if teacher else None,
            "loss": {} if teacher else NO_TEACHER,
            "views": {"per_image": "fresh" if fresh else 8},
            "distill": {"num_workers": workers_},
            "cluster": {"teacher_actors": actors_},
        }
    )


def fewest_workers(plan: Plan) -> int:
    return plan.train_workers[0] if isinstance(plan.train_workers, tuple) else plan.train_workers


def assert_fits(plan: Plan, config: RunConfig) -> None:
    """At most as many CPUs and GPUs as there are, in every phase, with as many actors as the plan allows."""
    together = config.views.per_image == "fresh" and config.loss.needs_teacher
    fewest, most = plan.teacher_actors
    train = fewest_workers(plan)
    assert fewest == (config.cluster.teacher_actors[0] if config.loss.needs_teacher else 0)
    assert fewest <= most <= max(fewest, config.cluster.teacher_actors[1])
    if config.loss.needs_teacher:
        beside_cpus, beside_gpus = (train * plan.train_cpus, train * plan.train_gpus) if together else (0, 0)
        assert most * plan.teacher_cpus + plan.load_cpus + beside_cpus <= plan.cpus + SLACK
        assert most * plan.teacher_gpus + beside_gpus <= plan.gpus + SLACK
    assert train * plan.train_cpus <= plan.cpus + SLACK
    assert train * plan.train_gpus <= plan.gpus + SLACK
    assert 0 < plan.decode_cpus <= plan.cpus
    for share in (plan.load_cpus, plan.teacher_cpus, plan.train_cpus):
        assert LEAST_SHARE - SLACK <= share <= 1


@settings(max_examples=500)
@given(cpus=machines, workers_=workers, actors_=actors, fresh=st.booleans(), teacher=st.booleans())
def test_on_cpus_the_shares_add_up_or_the_message_has_the_sum(cpus, workers_, actors_, fresh, teacher):
    config = config_of(workers_, actors_, fresh, teacher)
    train = workers_[0] if isinstance(workers_, tuple) else workers_
    in_teach = (actors_[0] + 1 + (train if fresh else 0)) if teacher else 1
    parts = max(in_teach, train, 1)
    try:
        plan = plan_resources(config, float(cpus), 0.0, cpus)
    except ConfigError as error:
        assert parts * LEAST_SHARE > cpus
        needs, has = re.search(r"needs at least ([\d.]+) CPUs .* has ([\d.]+)", str(error)).groups()
        assert float(needs) > float(has) == cpus
        return
    assert parts * LEAST_SHARE <= cpus
    assert_fits(plan, config)
    assert plan.teacher_gpus == plan.train_gpus == 0


@settings(max_examples=500)
@given(
    cpus=machines, gpus=st.integers(1, 8), workers_=workers, actors_=actors, fresh=st.booleans(), teacher=st.booleans()
)
def test_on_gpus_the_shares_add_up_or_the_message_has_the_sum(cpus, gpus, workers_, actors_, fresh, teacher):
    config = config_of(workers_, actors_, fresh, teacher)
    try:
        plan = plan_resources(config, float(cpus), float(gpus), cpus)
    except ConfigError as error:
        needs, has = re.search(r"needs (?:at least )?([\d.]+) (?:C|G)PUs .* has ([\d.]+)", str(error)).groups()
        assert float(needs) > float(has)
        return
    assert_fits(plan, config)
    assert not teacher or plan.teacher_gpus > 0
    assert (plan.train_gpus > 0) == (fewest_workers(plan) > 0)


@settings(max_examples=500)
@given(cpus=machines, cores=machines, workers_=workers, actors_=actors, fresh=st.booleans())
def test_threads_do_not_outnumber_the_cores_where_there_are_enough(cpus, cores, workers_, actors_, fresh):
    try:
        plan = plan_resources(config_of(workers_, actors_, fresh), float(cpus), 0.0, cores)
    except ConfigError:
        return
    train = fewest_workers(plan)
    assert plan.teacher_threads >= 1
    assert plan.train_threads >= 1
    assert train * plan.train_threads <= max(cores, train)
    most = plan.teacher_actors[1]
    assert most * plan.teacher_threads <= max(cores, most)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("workers_", [0, 1])
def test_the_defaults_fit_a_laptop_of_two_cpus(fresh, workers_):
    config = config_of(workers_, fresh=fresh)
    assert_fits(plan_resources(config, 2.0, 0.0, 2), config)


def test_one_gpu_serves_a_teacher_and_a_student_with_fresh_views():
    config = config_of(1, fresh=True)
    assert_fits(plan_resources(config, 8.0, 1.0, 8), config)


def test_more_cpus_mean_more_teachers_up_to_the_limit():
    counts = [plan_resources(config_of(1, (1, 6)), float(cpus), 0.0, cpus).teacher_actors[1] for cpus in range(1, 17)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 6


@pytest.mark.parametrize("workers_", [0, 3, (1, 4)])
@pytest.mark.parametrize("gpus", [0.0, 8.0])
def test_the_plan_in_words_has_a_line_for_every_stage(workers_, gpus):
    lines = plan_resources(config_of(workers_), 16.0, gpus, 16).describe()
    for stage in ("prepare", "teach", "distill"):
        assert sum(line.startswith(stage) for line in lines) == 1


@settings(max_examples=300)
@given(cpus=machines, gpus=st.integers(0, 8), actors_=actors, judged=st.booleans())
def test_generators_fit_beside_their_feeder_and_their_judge_or_the_message_has_the_sum(cpus, gpus, actors_, judged):
    tree = config_of(1, (1, 1)).model_dump()
    tree["cluster"]["generator_actors"] = actors_
    tree["generate"] = {"pipeline": "owner/name", "filter": {"agreement": judged}}
    try:
        plan = plan_resources(RunConfig.model_validate(tree), float(cpus), float(gpus), cpus)
    except ConfigError as error:
        needs, has = re.search(r"needs (?:at least )?([\d.]+) .*has ([\d.]+)", str(error)).groups()
        assert float(needs) > float(has)
        return
    fewest, most = plan.generator_actors
    assert fewest == actors_[0] <= most
    beside = LEAST_SHARE * (1 + judged)
    if gpus:  # more nodes may come, so the fewest have to fit now
        judge = min(plan.generator_gpus, plan.teacher_gpus) if judged else 0
        assert fewest * plan.generator_gpus + judge <= gpus + SLACK
        assert fewest * plan.generator_cpus + beside <= cpus + SLACK
    else:
        assert most * plan.generator_cpus + beside <= cpus + SLACK
        assert most <= max(fewest, cpus)
    assert LEAST_SHARE - SLACK <= plan.generator_cpus <= 1


def test_on_two_cpus_two_generators_run_at_once():
    tree = config_of(0, (1, 4)).model_dump()
    tree["generate"] = {"pipeline": "owner/name", "filter": {"agreement": True}}
    plan = plan_resources(RunConfig.model_validate(tree), 2.0, 0.0, 2)
    assert plan.generator_actors == (1, 2)
    assert "generate: 1 to 2 generator actors of 0.75 CPU" in plan.describe()


class Head:
    """A Ray cluster's head that runs no work, alone until work asks for more."""

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"memory": 1e9}

    @staticmethod
    def nodes() -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {}}]


def test_a_cluster_of_a_head_alone_is_planned_for_what_it_may_grow_to(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", Head)
    tree = config_of(1, (1, 8)).model_dump() | {"generate": {"pipeline": "owner/name"}}
    tree["cluster"] |= {"address": "auto", "generator_actors": (0, 6)}
    with pytest.raises(ConfigError, match=r"has 0; .*cluster\.grows_to=\{CPU: 48, GPU: 6\}"):
        live_plan(RunConfig.model_validate(tree))
    tree["cluster"]["grows_to"] = {"CPU": 48, "GPU": 6}
    plan = live_plan(RunConfig.model_validate(tree))
    assert (plan.cpus, plan.gpus, plan.teacher_gpus) == (48, 6, 1)
    assert plan.teacher_actors == (1, 6)
    assert plan.generator_actors == (1, 6)


def test_generators_on_cpus_are_as_many_as_the_cores_of_all_nodes():
    tree = config_of(0, (1, 1)).model_dump() | {"generate": {"pipeline": "owner/name"}}
    tree["cluster"]["generator_actors"] = (1, 40)
    assert plan_resources(RunConfig.model_validate(tree), 16.0, 0.0, 4).generator_actors == (1, 16)


def test_one_machine_trains_in_this_process_and_a_cluster_on_a_worker():
    alone = config_of("auto")
    joined = alone.model_copy(update={"cluster": Cluster(address="auto")})
    assert (alone.train_workers, joined.train_workers) == (0, 1)
    assert plan_resources(alone, 2, 0, 2).describe()[-1] == "distill: in this process, 2 threads"
    assert plan_resources(joined, 2, 0, 2).describe()[-1] == "distill: 1 worker of 1 CPU, 2 threads each"
    distill = stage_named("distill")
    assert (distill.needs_ray(alone), distill.needs_ray(joined)) == (False, True)
    assert (config_of(1).train_workers, config_of(0).train_workers) == (1, 0)
