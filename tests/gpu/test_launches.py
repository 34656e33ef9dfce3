"""What a step of the GPU backends costs the host: launches, copies to the device, and no wait for it.

No GPU is needed: the kernels are replaced by stubs, or by the CUDA sources compiled for the CPU, and every
operation of PyTorch itself is seen. What a GPU would wait for is an operation that reads a tensor's value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from networks import RESNET20, RESNET50
from noted_launches import Launches, new_mask
from operations import Operations
from parameters import move_gradients, parameters_and_masks
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import kernels
from sparseopt_kernels.correction import Factors
from sparseopt_kernels.kernels.contract import Inputs, ParamState, UnseenWrite
from sparseopt_kernels.kernels.gpu import plan as gpu_plan
from sparseopt_kernels.optimizer import SparseOpt


class TestTriton:
    @pytest.mark.parametrize("network", ["ResNet-20", "ResNet-50"])
    def test_a_network_is_one_launch(self, launches: Launches, network: str) -> None:
        """Rows of 27 and 147 weights and a bias of 10 included; two more where masks are new, by whether rows
        are whole vectors, and those that make lists."""
        parameters, masks = parameters_and_masks({"ResNet-20": RESNET20, "ResNet-50": RESNET50}[network])
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        optimizer.step()
        kernels = Counter(launch["kernel"] for launch in launches)
        # Of dense tensors, and, for nothing, of what the next step launches.
        assert kernels == {"count_rows": 1, "list_sectors": 1, "masked_step": 2, "sector_step": 2}
        for _ in range(3):
            launches.clear()
            optimizer.step()
            assert [launch["kernel"] for launch in launches] == ["sector_step"]

    def test_groups_share_launches(self, launches: Launches) -> None:
        """Up to eight: their rules are arguments of the kernel."""
        parameters, masks = parameters_and_masks([(4, 1024)] * 9)
        for count, expected in ((1, 1), (2, 1), (8, 1), (9, 2)):
            groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(parameters[:count])]
            some = {p: masks[p] for p in parameters[:count]}
            optimizer = SparseOpt(groups, masks=some, backend="triton")
            optimizer.step()
            launches.clear()
            optimizer.step()
            assert len(launches) == expected

    def test_tensors_with_and_without_momentum_share_a_launch(self, launches: Launches) -> None:
        parameters, masks = parameters_and_masks([(4, 64), (4, 64), (9,)])
        groups = [{"params": parameters[:1], "momentum": 0.9}, {"params": parameters[1:], "momentum": 0.0}]
        optimizer = SparseOpt(groups, masks=masks, backend="triton")
        optimizer.step()
        launches.clear()
        optimizer.step()
        assert [launch["MOMENTUM"] for launch in launches] == [True]

    def test_what_has_a_launch_of_its_own(self, launches: Launches) -> None:
        """Memory that is not aligned, and rows of less than a sector."""
        parameters, masks = parameters_and_masks([(3, 512), (3, 513), (3, 27), (3, 8), (7,), (9,)])
        for aligned, columns in ((True, 8), (False, 7)):
            more, their_masks = parameters_and_masks([(3, columns)])
            optimizer = SparseOpt(parameters + more, masks={**masks, **their_masks}, backend="triton")
            optimizer.step()
            launches.clear()
            optimizer.step()
            assert {launch["ALIGNED"] for launch in launches} == {True, aligned}

    def test_a_gradient_that_is_not_aligned_moves_its_tensor_to_another_launch(
        self, launches: Launches
    ) -> None:
        """As those of DistributedDataParallel may be. The rest is accessed by vectors still."""
        parameters, masks = parameters_and_masks([(3, 512)])
        optimizer = SparseOpt(parameters, masks=masks, backend="triton")
        optimizer.step()
        seen = []
        for offset in (0, 1, 4):
            parameters[0].grad = torch.zeros(3 * 512 + 4)[offset:][: 3 * 512].view(3, 512)
            launches.clear()
            optimizer.step()
            seen += [(launch["ALIGNED"], launch["GRADS_ALIGNED"]) for launch in launches]
        assert seen == [(True, True), (True, False), (True, True)]

    def test_one_pass_has_no_kernel_for_gradients_that_alone_are_not_aligned(
        self, launches: Launches
    ) -> None:
        parameters, masks = parameters_and_masks([(3, 512)])
        parameters[0].grad = torch.zeros(3 * 512 + 1)[1:].view(3, 512)
        SparseOpt(parameters, masks=masks, backend="triton").step()
        aligned = {launch["kernel"]: launch.get("ALIGNED") for launch in launches}
        assert (aligned["masked_step"], aligned["sector_step"]) == (False, True)

    def test_where_all_goes_weight_by_weight_gradients_need_no_launch_of_their_own(
        self, launches: Launches
    ) -> None:
        parameters, masks = parameters_and_masks([(3, 7), (5, 6)])
        optimizer = SparseOpt(parameters, masks=masks, backend="triton")
        optimizer.step()
        parameters[0].grad = torch.zeros(3 * 7 + 1)[1:].view(3, 7)
        launches.clear()
        optimizer.step()
        assert [launch["kernel"] for launch in launches] == ["sector_step"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_nothing_is_copied_while_gradients_stay(self, launches: Launches, dtype: torch.dtype) -> None:
        """No operation of PyTorch in a steady state; one copy, of eight bytes per tensor, when they move."""
        parameters, masks = parameters_and_masks([(8, 64), (5, 27), (9,)], dtype)
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        for _ in range(2):
            optimizer.step()
        with Operations() as operations:
            for _ in range(3):
                optimizer.step()
        assert not operations.counts
        kept = move_gradients(parameters)
        with Operations() as operations:
            optimizer.step()
        assert operations.counts["copy_"] == 1
        assert set(operations.counts) <= {"copy_", "empty_like", "lift_fresh", "_pin_memory"}
        assert len(kept) == 3

    def test_hyperparameters_are_no_copies(self, launches: Launches) -> None:
        parameters, masks = parameters_and_masks([(8, 64), (9,)])
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        for _ in range(2):
            optimizer.step()
        with Operations() as operations:
            for lr in (0.3, 0.2):
                optimizer.param_groups[0].update(lr=lr, weight_decay=lr, nesterov=lr > 0.2, dampening=0.0)
                optimizer.step()
        assert not operations.counts


def scaled(optimizer: SparseOpt) -> None:
    vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))


def limited(optimizer: SparseOpt) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = 1.0


def limited_by_a_tensor(optimizer: SparseOpt) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = torch.tensor(1.0)


def tensor_lr(optimizer: SparseOpt) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


@pytest.mark.parametrize("event", [scaled, limited, limited_by_a_tensor, tensor_lr, new_mask])
def test_nothing_waits_for_the_device(
    backend_name: str, event: Callable[[SparseOpt], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not AMP, not the gradient norm, not a tensor learning rate, not a mask that changed, not the first
    step. (test_on_device.py asks PyTorch itself, which sees more, on a GPU.)"""
    # It looks at masks on the CPU, where all of them are here.
    monkeypatch.setattr("sparseopt_kernels.step.factors.warn_of_concentration", lambda *_: None)
    parameters, masks = parameters_and_masks([(8, 64), (5, 27), (9,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, dampening=0.1, masks=masks, backend=backend_name)
    with Operations():
        optimizer.step()
        for _ in range(2):
            event(optimizer)
            optimizer.step()


def test_amp_adds_no_operation(backend_name: str) -> None:
    parameters, masks = parameters_and_masks([(8, 64), (9,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    scaled(optimizer)
    for _ in range(2):
        optimizer.step()
    with Operations() as operations:
        optimizer.step()
    assert not operations.counts


def test_memory_is_kept_for_other_streams(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a list was made on one stream, and a table on another, is all the same to a third."""
    stream = [7]
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(gpu_plan, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(current_stream=lambda device: stream[0]))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, on: told.append((id(tensor), on)))
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, backend="triton")
    optimizer.step()
    for on, offset in ((8, 1), (9, 1), (8, 0)):
        stream[0] = on
        parameters[0].grad = torch.zeros(8 * 64 + 1)[offset:][: 8 * 64].view(8, 64)
        optimizer.step()
        plan = optimizer._prepared.batches[0].plan
        assert isinstance(plan, gpu_plan.GpuPlan)
        assert plan._placed is not None
        sectors = plan._listed[0].sectors
        factors = plan._factors[0]
        assert sectors is not None
        assert factors is not None
        for tensor in (*plan._placed.layout.memory(), *plan._placed.gradients, *sectors, *factors):
            assert (id(tensor), on) in told


def test_a_default_device_changes_nothing(backend_name: str) -> None:
    """Tables are made on the host, wherever tensors are made by default."""
    parameters, masks = parameters_and_masks([(8, 64), (5, 27), (9,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    with torch.device("meta"):
        for _ in range(2):
            optimizer.step()


# ---- devices ----------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own tensors, and AMP's scalars where they are."""
    calls: list[tuple[Sequence[ParamState], Inputs]] = []

    class Plan:
        def __init__(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> None:
            assert [*factors] == [None] * len(params)  # there is no mask
            self.params = params

        def step(self, inputs: Inputs) -> None:
            calls.append((self.params, inputs))

        def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
            return []

        def native_table(self) -> None:
            return None

    class Backend:
        unavailable = staticmethod(lambda device: None)
        host_scalars = staticmethod(lambda device: False)
        supports = staticmethod(lambda param: True)
        plan = Plan

    monkeypatch.setattr(kernels, "backend_for", lambda name, device: Backend)
    parameters = [Parameter(torch.zeros(3, device=place)) for place in ("cpu", "meta", "cpu")]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9)
    scaled(optimizer)
    optimizer.step()
    first, second, third = parameters
    assert [[param.parameter for param in params] for params, _ in calls] == [[first, third], [second]]
    assert [inputs.gradients for _, inputs in calls] == [[first.grad, third.grad], [second.grad]]
    for params, inputs in calls:
        assert inputs.found_inf is not None
        assert inputs.grad_scale is not None
        assert inputs.found_inf.device == inputs.grad_scale.device == params[0].parameter.device
