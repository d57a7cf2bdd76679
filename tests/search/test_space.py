"""Search spaces: what a file may say, what is refused and how, and what trials get."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config import RunConfig, overlay
from raydistill.errors import ConfigError
from raydistill.search.space import Distribution, Space, read_space

SPACES = sorted(Path(__file__).parents[2].glob("tune_spaces/*.yaml"))
JOB = RunConfig.model_validate({"images": {"path": "x"}, "generate": {"pipeline": "p"}})


@pytest.fixture
def space(tmp_path):
    def read(text: str, job: RunConfig = JOB) -> Space:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return read_space(str(path), job)

    return read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss.temprature: {log: [1, 9]}", r"loss.temprature: unknown key; did you mean loss.temperature\?"),
        ("loss.temperature: {log: [0.5, 9], float: [1, 2]}", "give one of float, log, int, categorical and fixed"),
        ("loss.temperature: {}", "give one of"),
        ("loss.temperature: {lgo: [1, 2]}", "lgo"),
        ("distill.clip_norm: {log: null}", "distill.clip_norm: log needs two bounds"),
        ("distill.clip_norm: {float: null, step: 1}", "float needs two bounds"),
        ("distill.clip_norm: {categorical: null}", "categorical needs a list of choices"),
        ("distill.num_workers: {categorical: [0, 2]}", "distill.num_workers may not differ between trials"),
        ("distill: {categorical: {one: {num_workers: 0}, two: {num_workers: 2}}}", "num_workers may not differ"),
        ("loss.temperature: {log: [1, 2]}\ndistill.num_workers: {fixed: 2}", "num_workers may not differ"),
        ("loss.temperature: {categorical: [" + "1, " * 1001 + "]}", "at most 1000 items"),
        ("loss.temperature: {log: [0, 9]}", "log needs bounds above 0"),
        ("loss.temperature: {float: [3, 2]}", r"\[3, 2\] is empty"),
        ("loss.temperature: {float: [-1, 9]}", "loss.temperature=-1.0: expected: number > 0"),
        ("distill.momentum: {float: [0, 2]}", "distill.momentum=2.0: expected: number ≥ 0 and ≤ 1"),
        ("loss.projection_head: {categorical: [linear, deep]}", "loss.projection_head='deep'"),
        ("loss.projection_dim: {float: [2.5, 9]}", "loss.projection_dim=2.5"),
        ("loss.projection_dim: {int: [2, 9], step: 0.5}", "whole number"),
        ("loss.temperature: {log: [1, 2], step: 1}", "step goes with float and int"),
        ("seed: {int: [0, 9]}", "seed may not differ between trials"),
        ("images.size: {int: [32, 64]}", "images.size may not differ between trials"),
        ("tune.trials: {int: [1, 2]}", "may not differ"),
        ("loss.temperature: {fixed: 2}", "nothing to search"),
        ("- loss.temperature", "has to be a mapping"),
        ("{}", "is a mapping from config keys"),
        ("loss: {categorical: {a: {kd_wieght: 1}}}", r"kd_wieght: unknown key; did you mean loss.kd_weight\?"),
        ("loss: {categorical: {none: {kd_weight: 0, task_weight: 0, alignment_weight: 0, uniformity_weight: 0}}}",
         "every weight under loss is 0"),
        ("loss.temperature: {log: [1, 2], when: {loss: kd}}", "not a categorical key above it"),
        ("loss.projection_head: {categorical: [linear]}\n"
         "loss.temperature: {log: [1, 2], when: {loss.projection_head: x}}",
         "not one of its choices"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_a_sentence(space, text, message):
    with pytest.raises(ConfigError, match=message):
        space(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such file; give a file, or one of generated, loss, losses"):
        read_space(str(tmp_path / "none.yaml"), JOB)


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
@pytest.mark.parametrize("seed", range(5))
def test_every_draw_of_the_spaces_that_come_with_it_is_a_config(path, seed):
    found = read_space(str(path), JOB)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(20):
        chosen = found.draw(study.ask())
        assert found.own(overlay(JOB, found.settings(chosen))) == chosen
    assert found == read_space(str(path), JOB)  # no trial has written into it


def test_there_are_the_five_that_the_readme_names():
    assert [p.stem for p in SPACES] == ["generated", "loss", "losses", "optimizer", "paper"]


NESTED = """
loss:
  categorical:
    kd: {kd_weight: 2, alignment_weight: 0, uniformity_weight: 0}
    dkd: {kd_weight: 0, alignment_weight: 0, uniformity_weight: 0, dkd_weight: 1}
loss.dkd_other_factor: {float: [1, 10], when: {loss: dkd}}
loss.temperature: {log: [1, 20]}
loss.dkd_target_factor: {fixed: 3, when: {loss: dkd}}
"""


@pytest.mark.parametrize("family", ["kd", "dkd"])
def test_a_key_is_there_when_its_condition_holds(space, family):
    found = space(NESTED)
    chosen = found.draw(
        optuna.trial.FixedTrial({"loss": family, "loss.temperature": 3.0, "loss.dkd_other_factor": 7.0})
    )
    config = overlay(JOB, found.settings(chosen))
    assert config.loss.terms == ("task", family)
    assert config.loss.temperature == 3.0
    assert ("loss.dkd_other_factor" in chosen) is (family == "dkd")
    assert config.loss.dkd_other_factor == (7.0 if family == "dkd" else JOB.loss.dkd_other_factor)
    assert config.loss.dkd_target_factor == (3.0 if family == "dkd" else JOB.loss.dkd_target_factor)


def test_the_jobs_own_values_are_those_that_the_space_holds(space):
    text = """
loss.temperature: {log: [1, 20]}
loss.kd_weight: {float: [2, 4]}
distill.clip_norm: {categorical: [null, 1.0]}
loss.projection_dim: {int: [64, 256], step: 64}
loss.alignment_weight: {float: [0, 2], step: 0.3}
loss.projection_head: {categorical: [linear, simclr]}
"""
    own = {"loss.temperature": 4.0, "distill.clip_norm": None, "loss.projection_dim": 128,
           "loss.projection_head": "simclr"}  # fmt: skip
    assert space(text).own(JOB) == own
    assert space(NESTED, overlay(JOB, {"loss": {"kd_weight": 2, "alignment_weight": 0, "uniformity_weight": 0}})).own(
        JOB
    ) == {"loss.temperature": 4.0}
    kd = overlay(JOB, {"loss": {"kd_weight": 2, "alignment_weight": 0, "uniformity_weight": 0}})
    assert space(NESTED, kd).own(kd) == {"loss": "kd", "loss.temperature": 4.0}


def test_of_families_that_a_job_agrees_with_the_fullest_is_its_own(space):
    text = """
loss:
  categorical:
    as_it_is: {}
    kd: {kd_weight: 1, alignment_weight: 0, uniformity_weight: 0}
    crd: {kd_weight: 1, alignment_weight: 0, uniformity_weight: 0, crd_weight: 1}
loss.crd_weight: {float: [0.5, 2], when: {loss: crd}}
"""
    kd = {"kd_weight": 1, "alignment_weight": 0, "uniformity_weight": 0}
    found = space(text)
    assert found.own(overlay(JOB, {"loss": kd})) == {"loss": "kd"}
    assert found.own(overlay(JOB, {"loss": {**kd, "crd_weight": 1}})) == {"loss": "crd", "loss.crd_weight": 1}
    # Another weight is the family's all the same, where the space can give it.
    assert found.own(overlay(JOB, {"loss": {**kd, "crd_weight": 0.7}})) == {"loss": "crd", "loss.crd_weight": 0.7}
    assert found.own(overlay(JOB, {"loss": {**kd, "crd_weight": 0.1}})) == {"loss": "kd"}
    assert found.own(JOB) == {"loss": "as_it_is"}


def test_a_section_within_a_section_is_laid_over_and_comes_back(space):
    text = """
generate:
  categorical:
    strict: {filter: {agreement: true, confidence: 0.5}}
    loose: {filter: {confidence: 0.1}}
generate.filter.contrast: {fixed: 2}
loss.temperature: {log: [1, 9]}
"""
    found = space(text)
    job = overlay(JOB, found.settings({"generate": "strict", "loss.temperature": 2.0}))
    filters = job.generate.filter
    assert (filters.agreement, filters.confidence, filters.contrast) == (True, 0.5, 2)
    assert found.own(job) == {"generate": "strict", "loss.temperature": 2.0}


def test_keys_of_earlier_stages_are_walked_through_beforehand(space):
    found = space(
        "views.per_image: {categorical: [2, 4]}\nviews.min_scale: {float: [0.2, 0.4], step: 0.2}\n"
        "loss.temperature: {log: [1, 2]}\ngenerate.share: {float: [0, 1]}"
    )
    assert found.shared() == [{"views.per_image": k, "views.min_scale": s} for k in (2, 4) for s in (0.2, 0.4)]
    assert space("loss.temperature: {log: [1, 2]}").shared() == [{}]
    with pytest.raises(ConfigError, match="each value needs a pass of the teacher"):
        space("views.min_scale: {float: [0.2, 0.4]}").shared()
    with pytest.raises(ConfigError, match="which does not change the stages"):
        space(
            "loss.projection_head: {categorical: [linear, two_layer]}\n"
            "views.per_image: {int: [1, 2], when: {loss.projection_head: linear}}"
        ).shared()
    with pytest.raises(ConfigError, match=r"views.flip: `when` names loss.projection_head"):
        space(
            "loss.projection_head: {categorical: [linear, two_layer]}\n"
            "views.flip: {fixed: 0, when: {loss.projection_head: linear}}"
        ).shared()


def test_a_grid_has_ends(space):
    assert space("loss.temperature: {float: [1, 2], step: 0.5}\nloss.projection_dim: {int: [2, 4]}").grid() == {
        "loss.temperature": [1.0, 1.5, 2.0], "loss.projection_dim": [2, 3, 4],
    }  # fmt: skip
    for text in ("loss.temperature: {log: [1, 2]}", NESTED):
        with pytest.raises(ConfigError, match="a grid needs a list of values"):
            space(text).grid()


def test_null_is_a_value_to_choose_and_to_fix(space):
    found = space("distill.clip_norm: {fixed: null}\nloss.temperature: {log: [1, 2]}")
    job = overlay(JOB, {"distill": {"clip_norm": 1.0}})
    assert overlay(job, found.settings({"loss.temperature": 1.5})).distill.clip_norm is None


def test_values_that_are_no_plain_ones(space):
    found = space("loss.kd_weight: {categorical: [1.0, [0.0, 2.0]]}")
    chosen = found.draw(optuna.trial.FixedTrial({"loss.kd_weight": "[0.0, 2.0]"}))
    assert overlay(JOB, found.settings(chosen)).loss.kd_weight == (0.0, 2.0)
    scheduled = overlay(JOB, {"loss": {"kd_weight": [0.0, 2.0]}})
    assert found.own(scheduled) == {"loss.kd_weight": "[0.0, 2.0]"}


@given(st.integers(1, 40), st.integers(1, 7), st.data())
def test_a_stepped_distribution_holds_what_it_lists_and_nothing_between(count, step, data):
    entry = Distribution.model_validate({"int": [3, 3 + count], "step": step})
    values = entry.values()
    assert values == list(range(3, 3 + count + 1, step))
    value = data.draw(st.integers(0, 50))
    assert entry.holds(value) == (value in values)
    assert json.loads(json.dumps(values)) == values


@pytest.mark.filterwarnings("ignore::UserWarning")  # Optuna's, of a high end that no step reaches
@given(st.integers(0, 99), st.integers(1, 60), st.integers(0, 200), st.integers(0, 9))
def test_what_is_drawn_in_steps_is_what_earlier_stages_run_for(low, step, width, seed):
    low, step, high = low / 100, step / 100, (low + step + width) / 100
    entry = Distribution.model_validate({"float": [low, high], "step": step})
    values = entry.values()
    assert values[0] == low
    assert values[-1] == optuna.distributions.FloatDistribution(low, high, step=step).high
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    assert entry.draw("views.min_scale", study.ask()) in values
    for index, value in enumerate(values):
        assert entry.exact(low + index * step) == value  # as a sampler adds it up
        assert entry.holds(value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Optuna's, of a value that it adds up itself
def test_three_tenths_are_three_tenths(space):
    found = space("views.min_scale: {float: [0.1, 0.35], step: 0.1}")
    assert found.entries["views.min_scale"].values() == [0.1, 0.2, 0.3]
    for drawn in (0.1 + 2 * 0.1, 0.3):
        assert found.draw(optuna.trial.FixedTrial({"views.min_scale": drawn})) == {"views.min_scale": 0.3}
        assert found.settings({"views.min_scale": drawn}) == {"views": {"min_scale": 0.3}}
    with pytest.raises(ConfigError, match=r"views.min_scale=1.1"):
        space("views.min_scale: {float: [0.1, 1.15], step: 0.1}")
    space("views.min_scale: {float: [0.1, 1.15], step: 0.3}")  # ends at 1.0


def test_all_keys_are_those_within_sections_too(space):
    text = """
distill: {categorical: {a: {precision: bf16}, b: {channels_last: false}}}
loss.temperature: {log: [1, 2]}
student: {fixed: {size: 32}}
"""
    expected = {"distill.precision", "distill.channels_last", "loss.temperature", "student.size"}
    assert space(text).all_keys() == expected


@pytest.mark.parametrize(
    ("text", "walk"),
    [
        ("distill.epochs: {int: [1, 1000000000000]}", "grid"),
        ("loss.temperature: {float: [1, 20], step: 1.0e-300}", "grid"),
        ("loss.projection_dim: {int: [4, 4000]}\ndistill.epochs: {int: [1, 4000]}", "grid"),
        ("teacher.batch_size: {int: [1, 2000000000]}", "shared"),
        ("teacher.size: {int: [8, 2048]}\nteacher.batch_size: {int: [1, 2048]}", "shared"),
    ],
)
def test_more_combinations_than_anybody_runs_are_refused_before_one_is_made(space, text, walk):
    found = space(text)
    with pytest.raises(ConfigError, match="more than 100,000 combinations of their values; give fewer values"):
        getattr(found, walk)()
