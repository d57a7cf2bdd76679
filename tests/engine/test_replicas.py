"""Threads that share a batch give what one thread gives for the whole, or are not used."""

import copy
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from raydistill.config import Student as StudentConfig
from raydistill.data.views import Preprocessing
from raydistill.engine import loop
from raydistill.engine.loop import distill_loop
from raydistill.engine.replicas import Replicas, replicas_of
from raydistill.engine.workers import Worker
from raydistill.models.student import build_student

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """Logits and features of a small network; `middle` stands between its convolution and its pooling."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.conv, self.middle, self.linear = nn.Conv2d(3, 6, 3), nn.Sequential(*middle), nn.Linear(6, 4)
        self.preprocessing = Preprocessing(9, (0, 0, 0), (1, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.middle(self.conv(images)).mean((2, 3))
        return self.linear(features), features


class Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


def outcome(network: nn.Module, run, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers after one batch."""
    logits, features = run(images)
    weight_V1 = 1 + torch.arange(len(images))[:, None]  # each image counts differently
    sum((o * weight_V1 * torch.arange(o.shape[1]).cos()).sum() for o in (logits, features)).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    found = {"logits": logits, "features": features, **gradients, **dict(network.named_buffers())}
    return {name: value.detach() for name, value in found.items()}


def compare(network: nn.Module, threads: int, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """With one thread in double precision, which leaves no room for luck. Gives what was compared."""
    alone, images = network.double().train(), images.double()
    shared = copy.deepcopy(alone)
    expected, found = outcome(alone, alone, images), outcome(shared, Replicas(shared, threads), images)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-9, msg=name)
    return found


@given(threads=st.integers(2, 4), extra=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=15)
@pytest.mark.parametrize(
    "middle",
    [
        (),
        (nn.BatchNorm2d(6), nn.ReLU()),
        (nn.BatchNorm2d(6, affine=False), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, momentum=0.4, eps=0.1)),
        (nn.BatchNorm2d(6, track_running_stats=False),),
        (nn.GroupNorm(2, 6), nn.ReLU()),
    ],
)  # fmt: skip
def test_shares_of_a_batch_give_the_whole_ones_outputs_gradients_and_statistics(middle, threads, extra, seed):
    torch.manual_seed(seed)
    network = Network(*copy.deepcopy(middle))
    compared = compare(network, threads, 1 + torch.rand(2 * threads + extra, 3, 9, 9))
    of_training = {f"gradient of {name}" for name, _ in network.named_parameters()} | dict(
        network.named_buffers()
    ).keys()
    assert compared.keys() == {"logits", "features"} | of_training


def test_four_threads_give_equal_bits_however_they_are_scheduled():
    """Each share has its place in every sum: threads that come in another order change no bit."""

    class Late(nn.Module):
        """Lets the threads come to batch norm in an order of chance."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            threading.Event().wait(random.random() / 500)
            return x

    torch.manual_seed(0)
    network, images = Network(Late(), nn.BatchNorm2d(6), nn.ReLU(), Late(), nn.BatchNorm2d(6)), torch.rand(13, 3, 9, 9)
    runs = []
    for _ in range(12):
        own = copy.deepcopy(network).train()
        runs.append(outcome(own, Replicas(own, 4), images))
    for run in runs[1:]:
        assert all(torch.equal(value, runs[0][name]) for name, value in run.items())


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_vit"])
def test_networks_of_timm_do_too(model):
    torch.manual_seed(0)
    student = build_student(StudentConfig(model=f"timm:{model}", size=64), 5)
    nn.init.normal_(student.classifier.weight)
    assert replicas_of(student, 2) is not None
    compare(student, 2, torch.rand(12, 3, 64, 64))


def test_fixed_statistics_stay_fixed():
    student = build_student(StudentConfig(model="timm:test_resnet", size=32), 5)
    student.freeze_body()
    before = {name: value.double() for name, value in student.named_buffers()}
    compared = compare(student, 3, torch.rand(9, 3, 32, 32))
    assert all(torch.equal(compared[name].double(), value) for name, value in before.items())
    assert sum(name.startswith("gradient of") for name in compared) == 2  # the classifier's weight and bias


def test_autocast_reaches_the_threads():
    network = Network(nn.BatchNorm2d(6)).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = Replicas(network, 2)(torch.rand(8, 3, 9, 9))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert network.conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("odd", [nn.Dropout(0.1), nn.Dropout2d(0.5), Centred()])
def test_a_network_that_depends_on_chance_or_on_the_batch_elsewhere_has_no_replicas(odd):
    torch.manual_seed(3)
    before, network = torch.get_rng_state(), Network(nn.BatchNorm2d(6), odd)
    torch.set_rng_state(before)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert replicas_of(network, 2) is None
    assert torch.equal(before, torch.get_rng_state())  # the run draws what it would have drawn
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    assert replicas_of(Network(nn.BatchNorm2d(6)), 2) is not None


class Failing(nn.Module):
    """Fails for the share that holds the marked image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x == 7).any()):
            raise MemoryError("this share alone")
        return x


@pytest.mark.parametrize("marked", [0, 5])
def test_a_share_that_fails_ends_the_batch_with_its_own_error(marked):
    network = Network(nn.BatchNorm2d(6))
    network.conv = nn.Sequential(Failing(), network.conv)
    images = torch.rand(6, 3, 9, 9)
    images[marked] = 7
    replicas = Replicas(network, 2)
    with pytest.raises(MemoryError, match="this share alone"):
        replicas(images)
    assert len(replicas(torch.rand(6, 3, 9, 9))[0]) == 6  # the threads are free again


@pytest.mark.parametrize("threads", [2, 5])
def test_an_interrupt_leaves_no_thread_waiting(threads):
    """One that comes when some shares have begun and others have not, which then never do."""
    replicas = Replicas(Network(nn.BatchNorm2d(6)), threads)
    pool, begun = replicas._pool, []

    def interrupted(call, *shares):
        begun.extend(pool.submit(call, *share) for share in list(zip(*shares, strict=True))[1:])
        raise KeyboardInterrupt

    replicas._pool = SimpleNamespace(map=interrupted)
    with pytest.raises(KeyboardInterrupt):
        replicas(torch.rand(3 * threads, 3, 9, 9))
    assert all(isinstance(share.exception(timeout=60), KeyboardInterrupt) for share in begun)


@pytest.mark.parametrize("weights", [{}, {"crd_weight": 0.5}])
def test_training_with_two_threads_follows_training_with_one(tiny_set, weights, monkeypatch):
    monkeypatch.setattr(loop, "student_precision", lambda student, replicas, *_: ("fp32", replicas))  # as if faster
    records = [
        distill_loop(
            tiny_set.job(
                f"{threads} threads {len(weights)}", loss={"projection_dim": 8, **weights}, distill={"epochs": 2}
            ),
            Worker(0, 1, "cpu", threads, lambda step: False),
        )
        for threads in (1, 2)
    ]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-2)


def test_networks_of_transformers_which_keep_their_outputs_have_none():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3, layer_type="basic")
    network = Network(nn.BatchNorm2d(6))
    network.inner = ResNetForImageClassification(config)
    assert replicas_of(network, 2) is None
