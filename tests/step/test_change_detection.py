"""What a step depends on: read by the native library and in Python, every change is told from none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import Masks, SparseOpt, sparsify
from sparseopt_kernels.step import change_detection
from sparseopt_kernels.step.change_detection import Observed, Snapshot, observe


class Subclass(Tensor):
    pass


class Step:
    """An optimizer of three layers in two groups, after its first step, as ``observe`` sees it."""

    def __init__(self) -> None:
        self.weights = [Parameter(torch.rand(2, 2, 3, 3)) for _ in range(3)]
        for p in self.weights:
            p.grad = torch.rand_like(p)
        self.masks: Any = {p: torch.rand_like(p) > 0.5 for p in self.weights[:2]}
        groups = [{"params": self.weights[:2]}, {"params": self.weights[2:]}]
        optimizer = SparseOpt(groups, lr=0.1, momentum=0.9, masks=self.masks, backend="reference")
        optimizer.step()
        self.groups, self.state = optimizer.param_groups, optimizer.state
        self.watched = [*self.weights[:2], self.buffer(0), self.buffer(1)]

    def buffer(self, i: int) -> Tensor:
        buffer = self.state[self.weights[i]]["momentum_buffer"]
        assert isinstance(buffer, Tensor)
        return buffer

    def observe(self) -> Observed:
        return observe(self.groups, self.state, self.masks, self.weights, self.watched)

    # What may happen between two steps.

    def move_to_another_group(self) -> None:
        self.groups[1]["params"].append(self.groups[0]["params"].pop())

    def exchange_within_a_group(self) -> None:
        self.groups[0]["params"].reverse()

    def set(self, name: str, value: object) -> None:
        self.groups[1][name] = value

    def give_the_third_a_mask(self) -> None:
        p = self.weights[2]
        self.masks[p] = self.masks.pop(self.weights[1])

    def replace_a_mask(self) -> None:
        p = self.weights[0]
        self.masks[p] = self.masks[p].clone()

    def forget_a_state(self) -> None:
        self.state.pop(self.weights[2])

    def forget_a_buffer(self) -> None:
        self.state[self.weights[2]].clear()

    def exchange_buffers(self) -> None:
        a, b = self.weights[:2]
        self.state[a], self.state[b] = self.state[b], self.state[a]

    def move_a_parameter(self) -> None:
        self.former_data = self.weights[0].data  # held: the memory is not to be used again
        self.weights[0].data = self.former_data.clone()

    def set_gradient(self, gradient: Tensor | None) -> None:
        self.former_gradient = self.weights[0].grad
        self.weights[0].grad = gradient

    def write(self, tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(tensor.clone())


@pytest.fixture(params=["native", "python"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Step:
    if request.param == "python":
        monkeypatch.setattr(change_detection, "READER", None)
    elif change_detection.READER is None:
        pytest.skip("the native library was not built, or this PyTorch has no exchange API of DLPack")
    return Step()


def differing(a: Observed, b: Observed) -> set[str]:
    """The fields of snapshots that differ; of the native library's, which has no names: {"snapshot"}."""
    assert a.snapshot is not None
    assert b.snapshot is not None
    fields = {"snapshot"} if a.snapshot != b.snapshot else set()
    if isinstance(a.snapshot, Snapshot):
        names = a.snapshot._fields
        found = {name for name in names if getattr(a.snapshot, name) != getattr(b.snapshot, name)}
        assert bool(found) == bool(fields)
        fields = found
    return fields | ({"versions"} if a.versions != b.versions else set())


CHANGES: dict[str, tuple[Callable[[Step], object], set[str]]] = {
    "moved-to-another-group": (Step.move_to_another_group, {"groups"}),
    "exchanged-within-a-group": (Step.exchange_within_a_group, {"groups"}),
    "momentum": (lambda s: s.set("momentum", 0.0), {"groups"}),
    "dampening": (lambda s: s.set("dampening", 0.5), {"groups"}),
    "correction": (lambda s: s.set("correction", "none"), {"groups"}),
    "norm": (lambda s: s.set("max_grad_norm_over", "dense"), {"groups"}),
    "whose-the-masks-are": (Step.give_the_third_a_mask, {"masked"}),
    "a-mask-is-another": (Step.replace_a_mask, {"memory"}),
    "a-mask-was-written": (lambda s: s.write(s.masks[s.weights[1]]), {"mask_versions"}),
    "a-state-is-gone": (Step.forget_a_state, {"stateful", "memory"}),
    "a-buffer-is-gone": (Step.forget_a_buffer, {"memory"}),
    "buffers-exchanged": (Step.exchange_buffers, {"memory"}),
    "a-parameter-moved": (Step.move_a_parameter, {"memory"}),
    "a-gradient-is-gone": (lambda s: s.set_gradient(None), {"gradients"}),
    "a-gradient-in-channels-last": (
        lambda s: s.set_gradient(torch.rand(2, 2, 3, 3).to(memory_format=torch.channels_last)),
        {"gradients"},
    ),
    "a-weight-was-written": (lambda s: s.write(s.weights[1]), {"versions"}),
    "a-buffer-was-written": (lambda s: s.write(s.buffer(1)), {"versions"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_told(step: Step, change: str) -> None:
    do, fields = CHANGES[change]
    before = step.observe()
    do(step)
    after = step.observe()
    if not isinstance(after.snapshot, Snapshot):
        fields = {field if field == "versions" else "snapshot" for field in fields}
    assert differing(before, after) == fields


@pytest.mark.parametrize(
    "do",
    [
        lambda s: None,
        lambda s: s.set_gradient(torch.rand(2, 2, 3, 3)),
        lambda s: s.set("momentum", 0.5),
        lambda s: s.set("lr", 1.0),
        lambda s: s.write(s.weights[2]),
        lambda s: s.write(s.buffer(2)),
        lambda s: s.state[s.weights[0]].update(step=3),
    ],
    ids=["nothing", "gradient-elsewhere", "momentum", "lr", "not-watched", "buffer-not-watched", "own-key"],
)
def test_what_makes_no_difference(step: Step, do: Callable[[Step], object]) -> None:
    before = step.observe()
    do(step)
    assert differing(before, step.observe()) == set()


def test_gradients(step: Step) -> None:
    step.set_gradient(None)
    gradients = step.observe().gradients
    assert gradients.tensors[0] is None
    assert [g is p.grad for g, p in zip(gradients.tensors, step.weights, strict=True)] == [True] * 3
    addresses = memoryview(gradients.addresses).cast("Q").tolist()
    assert addresses == [0 if g is None else g.data_ptr() for g in gradients.tensors]
    assert not gradients.any_negated


def test_a_lazily_negated_gradient(step: Step) -> None:
    step.set_gradient(torch.complex(torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3, 3)).conj().imag)
    assert step.observe().gradients.any_negated


def test_masks_of_a_model(step: Step) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    step.masks = sparsify(model, sparsity=0.5)
    assert isinstance(step.masks, Masks)
    before = step.observe()
    assert differing(before, step.observe()) == set()
    step.write([*step.masks.values()][1])
    assert differing(before, step.observe()) <= {"mask_versions", "snapshot"}
    assert before.snapshot != step.observe().snapshot


@pytest.mark.parametrize("entry", [3, "mask", None, [torch.ones(2)]], ids=["int", "str", "none", "list"])
def test_what_is_no_mask(step: Step, entry: object) -> None:
    step.masks[step.weights[0]] = entry
    assert step.observe().snapshot is None


@pytest.mark.parametrize(
    "strange",
    [
        lambda s: s.set_gradient(torch.rand(2, 2, 3, 3).as_subclass(Subclass)),
        lambda s: s.masks.update(
            {s.weights[0]: torch.ones(2, 2, 3, 3, dtype=torch.bool).as_subclass(Subclass)}
        ),
        lambda s: s.state.update({"a key of the user's": 3}),
        lambda s: s.set("momentum", torch.tensor(0.9)),
        lambda s: s.set("correction", None),
        lambda s: s.set("params", tuple(s.groups[1]["params"])),
        lambda s: setattr(s, "groups", tuple(s.groups)),
    ],
    ids=["gradient", "mask", "key", "tensor-momentum", "correction", "params-tuple", "groups-tuple"],
)
def test_what_the_native_library_may_not_know(step: Step, strange: Callable[[Step], object]) -> None:
    """It is looked at in Python then, and no error is left behind."""
    strange(step)
    before = step.observe()
    assert differing(before, step.observe()) == set()
    step.write(step.weights[0])
    assert differing(before, step.observe()) == {"versions"}


def test_nothing_is_held_but_gradients(step: Step) -> None:
    """What was read once does not keep tensors alive."""
    tensors = [*step.weights, *step.masks.values(), step.buffer(0)]
    counts = [sys.getrefcount(t) for t in tensors]
    for _ in range(10):
        step.observe()
    assert [sys.getrefcount(t) for t in tensors] == counts
