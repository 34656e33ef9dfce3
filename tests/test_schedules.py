"""The schedule of App. E.2, against its formula at every step."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from sparseopt_kernels.schedules import warmup_cosine

# A warning of PyTorch's (a wrong order of calls, a deprecated argument) would reach the user.
pytestmark = pytest.mark.filterwarnings("error")


def formula(t, peak, warmup_steps, total_steps, start_lr=0.0, end_lr=1e-6):
    if t < warmup_steps:
        return start_lr + (peak - start_lr) * t / warmup_steps
    progress = (t - warmup_steps) / (total_steps - warmup_steps)
    return end_lr + (peak - end_lr) / 2 * (1 + math.cos(math.pi * progress))


def optimizer_with(*lrs, optimizer=torch.optim.SGD):
    return optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs], lr=1.0)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def run(optimizer, scheduler, steps):
    """The learning rates of ``steps`` steps."""
    seen = []
    for _ in range(steps):
        seen.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("start_lr", "end_lr"), [(0.0, 1e-6), (1e-5, 1e-5), (0.2, 0.0)], ids=["cifar", "imagenet", "falling"]
)
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(5, 100), (0, 30), (1, 2), (19, 20), (0, 1)])
def test_every_step_of_every_group(start_lr, end_lr, warmup_steps, total_steps):
    peaks = (0.1, 0.4, 3e-4)
    optimizer = optimizer_with(*peaks)
    scheduler = warmup_cosine(optimizer, warmup_steps, total_steps, start_lr, end_lr)
    seen = [*run(optimizer, scheduler, total_steps), rates(optimizer)]
    for t, lrs in enumerate(seen):
        expected = [formula(t, peak, warmup_steps, total_steps, start_lr, end_lr) for peak in peaks]
        assert lrs == pytest.approx(expected, rel=1e-12, abs=1e-18), t
    assert seen[warmup_steps] == list(peaks)
    assert seen[-1] == pytest.approx([end_lr] * 3)


def test_defaults_are_those_of_cifar():
    optimizer = optimizer_with(0.1)
    scheduler = warmup_cosine(optimizer, warmup_steps=5, total_steps=20)
    assert rates(optimizer) == [0.0]
    run(optimizer, scheduler, 20)
    assert rates(optimizer) == pytest.approx([1e-6])


def test_stays_at_the_end():
    optimizer = optimizer_with(0.1)
    scheduler = warmup_cosine(optimizer, 2, 10, end_lr=1e-3)
    after = run(optimizer, scheduler, 25)[10:]
    assert [lr for (lr,) in after] == pytest.approx([1e-3] * 15)


def test_a_group_of_learning_rate_zero_stays_there():
    optimizer = optimizer_with(0.0, 0.1)
    scheduler = warmup_cosine(optimizer, 2, 10, start_lr=1e-5)
    assert {frozen for frozen, _ in run(optimizer, scheduler, 10)} == {0.0}


def test_tensor_learning_rate_is_written_in_place():
    lr = torch.tensor(0.1, dtype=torch.float64)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(parameters, lr=lr, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    scheduler = warmup_cosine(optimizer, 3, 12)
    for t in range(13):
        assert optimizer.param_groups[0]["lr"] is held
        assert float(held) == pytest.approx(formula(t, 0.1, 3, 12), rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "LBFGS", "Adafactor"])
def test_any_optimizer(name):
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    scheduler = warmup_cosine(optimizer, 3, 12)
    assert isinstance(scheduler, LRScheduler)
    for t in range(13):
        assert rates(optimizer) == pytest.approx([formula(t, 0.1, 3, 12)], rel=1e-12, abs=1e-18)
        optimizer.step(lambda: torch.zeros(()))
        scheduler.step()


@pytest.mark.parametrize("stop", [0, 2, 4, 11])
@pytest.mark.parametrize("schedule_first", [True, False], ids=["schedule_first", "optimizer_first"])
def test_resume_goes_on_exactly(stop, schedule_first):
    through = optimizer_with(0.1, 0.4)
    whole = run(through, warmup_cosine(through, 4, 20), 21)

    optimizer = optimizer_with(0.1, 0.4)
    scheduler = warmup_cosine(optimizer, 4, 20)
    run(optimizer, scheduler, stop)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    optimizer_state, scheduler_state = torch.load(file, weights_only=True)

    optimizer = optimizer_with(0.1, 0.4)
    if schedule_first:
        scheduler = warmup_cosine(optimizer, 4, 20)
        optimizer.load_state_dict(optimizer_state)
    else:
        # PyTorch's documented pitfall: only the first rate is that of step 0, not the peak.
        optimizer.load_state_dict(optimizer_state)
        scheduler = warmup_cosine(optimizer, 4, 20)
    scheduler.load_state_dict(scheduler_state)
    skip = 0 if schedule_first else 1
    assert run(optimizer, scheduler, 21 - stop)[skip:] == whole[stop + skip :]


def test_the_state_restores_peak_and_shape():
    optimizer = optimizer_with(0.1)
    scheduler = warmup_cosine(optimizer, 4, 20)
    run(optimizer, scheduler, 7)
    other = optimizer_with(0.7)
    restored = warmup_cosine(other, 1, 9, start_lr=0.3)
    restored.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert run(other, restored, 10)[1:] == run(optimizer, scheduler, 10)[1:]


def test_the_schedule_of_a_used_optimizer_starts_from_its_initial_rate():
    optimizer = optimizer_with(0.1)
    warmup_cosine(optimizer, 4, 20)
    # Here lr is 0: taken as the peak it would hold the run at 0 without a word.
    scheduler = warmup_cosine(optimizer, 4, 20)
    run(optimizer, scheduler, 4)
    assert rates(optimizer) == [0.1]


def test_no_warning_with_the_documented_order():
    optimizer = optimizer_with(0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, warmup_cosine(optimizer, 2, 6), 8)
    assert caught == []


class TestBadInput:
    @pytest.mark.parametrize(("warmup_steps", "total_steps"), [(10, 10), (11, 10), (-1, 10), (0, 0)])
    def test_steps(self, warmup_steps, total_steps):
        with pytest.raises(ValueError, match=rf"warmup_steps is {warmup_steps}, .* \({total_steps}\)"):
            warmup_cosine(optimizer_with(0.1), warmup_steps, total_steps)

    def test_endless(self):
        with pytest.raises(ValueError, match="total_steps is inf, it must be finite"):
            warmup_cosine(optimizer_with(0.1), 5, math.inf)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["start_lr", "end_lr"])
    @pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf])
    def test_learning_rates(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}, it must be finite and not negative"):
            warmup_cosine(optimizer_with(0.1), 5, 10, **{name: value})

    def test_peak(self):
        optimizer = optimizer_with(0.1, 0.2)
        optimizer.param_groups[1]["lr"] = math.nan
        with pytest.raises(ValueError, match="lr of parameter group 1 is nan, it must be finite"):
            warmup_cosine(optimizer, 5, 10)

    def test_a_refused_call_leaves_the_optimizer_alone(self):
        optimizer = optimizer_with(0.1)
        with pytest.raises(ValueError, match="start_lr"):
            warmup_cosine(optimizer, 5, 10, start_lr=-1.0)
        assert rates(optimizer) == [0.1]
        assert "initial_lr" not in optimizer.param_groups[0]
