"""Training of one network on several cores: each thread computes a share of the batch.

Threads inside each operation meet at its end, and on a busy machine wait for each other most of the time. Threads that
share a batch meet at batch norm alone. There they add up their sums, so statistics and gradients are those of the whole
batch, up to rounding. On an idle machine that costs a sixth more work, so what is faster is measured first.

Shapes: V images, C classes, E features of the student; B images of a share, K channels.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from raydistill.models.from_transformers import keeps_outputs
from raydistill.models.student import Student

Part = tuple[torch.Tensor, torch.Tensor]


class Replicas:
    """Runs a student on shares of a batch in as many threads, and gives what it gives for the whole batch."""

    def __init__(self, student: nn.Module, threads: int) -> None:
        self._student, self.threads = student, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="replica")

    def __call__(self, images_V3SS: torch.Tensor) -> Part:
        """Logits (V, C) and features (V, E)."""
        parameters = [p for p in self._student.parameters() if p.requires_grad]
        logits_VC, features_VE = _WholeBatch.apply(self, images_V3SS, *parameters)
        return logits_VC, features_VE

    def map(self, call: Callable[..., Any], *tensors: torch.Tensor) -> list[Any]:
        """The results of a call with a share of each tensor, in order."""
        return list(self._pool.map(call, *(tensor.tensor_split(self.threads) for tensor in tensors)))

    def forward(self, images_V3SS: torch.Tensor, meeting: _Meeting) -> list[Part]:
        device = images_V3SS.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def share(number: int, images_B3SS: torch.Tensor) -> Part:
            with meeting.attended(), torch.autocast(device, dtype, enabled), _SharedStatistics(meeting, number):
                logits_BC, features_BE = self._student(images_B3SS)
                return logits_BC, features_BE

        counters = [b for name, b in self._student.named_buffers() if name.endswith("num_batches_tracked")]
        before = [counter.clone() for counter in counters]
        # Each share has its own number: sums in another order would round otherwise from run to run.
        with meeting.attended():  # an interrupt here may leave shares that never begin
            parts = list(self._pool.map(share, range(self.threads), images_V3SS.tensor_split(self.threads)))
        for counter, old in zip(counters, before, strict=True):
            counter.copy_(torch.minimum(counter, old + 1))  # each thread has counted the batch
        return parts

    def backward(
        self, parts: Sequence[Part], meeting: _Meeting, gradients: Part, parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The gradient of each parameter; None if it has none."""

        def share(part: Part, *gradients: torch.Tensor) -> Sequence[torch.Tensor | None]:
            # Behind a frozen body features have no gradient.
            pairs = [pair for pair in zip(part, gradients, strict=True) if pair[0].requires_grad]
            with meeting.attended():
                return torch.autograd.grad([o for o, _ in pairs], parameters, [g for _, g in pairs], allow_unused=True)

        split = (gradient.tensor_split(self.threads) for gradient in gradients)
        with meeting.attended():
            shares = list(self._pool.map(share, parts, *split))
        return [None if of_one[0] is None else sum(of_one[1:], of_one[0]) for of_one in zip(*shares, strict=True)]


def replicas_of(student: Student, threads: int) -> Replicas | None:
    """Replicas, if they do what the student does. They do not if it draws random numbers, like dropout, looks at the
    whole batch elsewhere than in batch norm, or keeps what it computes."""
    if keeps_outputs(student):
        return None
    size = student.preprocessing.size
    images = torch.rand(2 * threads, 3, size, size, generator=torch.Generator().manual_seed(0))
    alone, together = (copy.deepcopy(student).train() for _ in range(2))
    before = torch.get_rng_state()
    with torch.no_grad():
        expected, found = alone(images), Replicas(together, threads)(images)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        return None
    same = all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(expected, found, strict=True))
    return Replicas(student, threads) if same else None


class _WholeBatch(torch.autograd.Function):
    """The threads' shares as one operation."""

    @staticmethod
    def forward(ctx: Any, replicas: Replicas, images_V3SS: torch.Tensor, *parameters: torch.Tensor) -> Any:
        meeting = _Meeting(replicas.threads)
        with torch.enable_grad():
            parts = replicas.forward(images_V3SS, meeting)
        ctx.work = replicas, parts, meeting, parameters
        return tuple(torch.cat([output.detach() for output in outputs]) for outputs in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        replicas, parts, meeting, parameters = ctx.work
        ctx.work = None  # the graphs of the shares
        return None, None, *replicas.backward(parts, meeting, gradients, parameters)


@dataclass
class _Meeting:
    """Where the threads of one batch wait for each other."""

    threads: int
    _error: BaseException | None = None
    _slots: dict[int, Sequence[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.threads)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """If a thread fails, the others do not wait for it, and fail for the same reason."""
        try:
            yield
        except threading.BrokenBarrierError:
            raise (self._error or RuntimeError("the threads of a batch were stopped")) from None
        except BaseException as error:
            self._error = error
            self._barrier.abort()
            raise

    def total(self, number: int, *mine: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor summed over the threads, in their order."""
        self._slots[number] = mine
        self._barrier.wait()
        shares = [self._slots[number] for number in range(self.threads)]
        totals = [torch.stack(of_one).sum(dim=0) for of_one in zip(*shares, strict=True)]
        self._barrier.wait()
        return totals


class _SharedStatistics(TorchFunctionMode):
    """Batch norm of this thread's share by the statistics of the whole batch."""

    def __init__(self, meeting: _Meeting, number: int) -> None:
        super().__init__()
        self._meeting, self._number = meeting, number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._batch_norm if func is functional.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        if not training:
            return functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        out, mean_K, var_K, count = _BatchNorm.apply(x, weight, bias, eps, self._meeting, self._number)
        if running_mean is not None and running_var is not None and self._number == 0:
            with torch.no_grad():
                running_mean.lerp_(mean_K, momentum)
                running_var.lerp_(var_K * (count / (count - 1)), momentum)
        return out


class _BatchNorm(torch.autograd.Function):
    """Ioffe & Szegedy 2015 (arXiv 1502.03167) with sums over all shares. Gives the mean and variance too."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, meeting: _Meeting, number: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
        zeros, ones = x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype)
        weight, bias = (default if given is None else given for given, default in ((weight, ones), (bias, zeros)))
        # The statistics come in the type of those that it is to update.
        mean_K, var_K = torch.ops.aten.batch_norm_update_stats(x, zeros.clone(), ones.clone(), 0.0)
        count = torch.tensor(x.numel() / channels, dtype=dtype)
        total, mean_K2 = meeting.total(number, count, count * mean_K)
        mean_K2 = mean_K2 / total
        (var_K2,) = meeting.total(number, count * (var_K + (mean_K - mean_K2) ** 2))
        var_K2 = var_K2 / total
        ctx.save_for_backward(x, weight, mean_K2, var_K2)
        ctx.work = eps, meeting, number, total
        ctx.mark_non_differentiable(mean_K2, var_K2, total)
        return functional.batch_norm(x, mean_K2, var_K2, weight, bias, False, 0.0, eps), mean_K2, var_K2, total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        """That of fixed statistics, less the part that flows through the batch's mean and variance."""
        x, weight, mean_K, var_K = ctx.saved_tensors
        eps, meeting, number, count = ctx.work
        scale_K = torch.rsqrt(var_K + eps)
        fixed, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean_K, var_K, mean_K, scale_K, False, eps, [True, True, True]
        )
        all_weight, all_bias = meeting.total(number, of_weight, of_bias)
        factor_K = weight * scale_K / count
        through = functional.batch_norm(x, mean_K, var_K, factor_K * all_weight, factor_K * all_bias, False, 0.0, eps)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return fixed - through, of_weight if needs_weight else None, of_bias if needs_bias else None, None, None, None
