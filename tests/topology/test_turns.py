"""The warning of two methods that grow weights in one mask in turns."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.topology.dynamic_sparse_training import DynamicSparseTraining
from sparseopt_kernels.topology.gmp import GMP
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET


def layer(seed: int = 0) -> tuple[Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = Parameter(torch.randn(8, 20, generator=generator))
    weight.grad = torch.randn(8, 20, generator=generator)
    mask = torch.rand(8, 20, generator=generator) < 0.5
    weight.data *= mask
    return weight, mask


def method(cls: type, *layers: tuple[Parameter, Tensor], **options: Any) -> DynamicSparseTraining:
    """A method that is due in every second step, so that no other warning is to be expected."""
    made: DynamicSparseTraining = cls(dict(layers), update_every=2, stop_at=1_000, **options)
    return made


def update(dst: DynamicSparseTraining, times: int = 1) -> None:
    """Let the method update the masks. The weights that grew are trained, so that others drop next."""
    for _ in range(2 * times):
        for weight, mask in dst.masks.items():
            weight.data += torch.where(mask & (weight == 0), 5.0, 0.0)
        dst.step()


def warned(*updates: DynamicSparseTraining) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dst in updates:
            update(dst)
    return [text for w in caught if "in turns" in (text := str(w.message))]


@pytest.mark.parametrize("classes", [(RigL, SET), (SET, SET), (RigL, RigL)])
def test_two_methods_that_take_turns_are_warned_of_once(classes: tuple[type, type]) -> None:
    shared = layer()
    a, b = (method(cls, shared) for cls in classes)
    assert warned(a, b) == []
    (text,) = warned(a, b, a, b)
    first, second = (cls.__name__ for cls in classes)
    assert f"in the mask of 'parameter 0' in turns: a {first} and a {second}. " in text


def test_that_share_one_of_many_layers() -> None:
    own, shared, other = layer(1), layer(2), layer(3)
    a, b = method(RigL, own, shared), method(SET, shared, other)
    (text,) = warned(a, b, a)
    assert "'parameter 1'" in text


@pytest.mark.parametrize(("times", "expected"), [((1, 1, 1), 2), ((1, 3), 1), ((4, 1), 1)])
def test_at_any_periods(times: tuple[int, ...], expected: int) -> None:
    """Three in rotation; one that updates three or four times as often as the other."""
    shared = layer()
    methods = [method(SET, shared) for _ in times]
    turns = [dst for dst, n in zip(methods, times, strict=True) for _ in range(n)]
    assert len(warned(*turns, *turns)) == expected


def test_phases_are_not_warned_of() -> None:
    shared = layer()
    a, b = method(SET, shared), method(RigL, shared)
    assert warned(a, a, a, b, b, b, a, a, a) == []


def test_nor_one_that_takes_over_for_good() -> None:
    shared = layer()
    assert warned(method(SET, shared), *[method(RigL, shared)] * 3) == []


def test_an_error_of_the_warning_keeps_the_update_whole() -> None:
    """The step that follows is left out in any case."""
    shared = layer()
    a, b = method(SET, shared), method(SET, shared)
    update(a)
    update(b)
    a.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="in turns"):
            a.step()
    assert a.updated
    assert a.skip_next
    assert a.last_update["parameter 0"].grown


def test_nor_one_whose_other_is_gone() -> None:
    shared = layer()
    a = method(RigL, shared)
    update(a)
    update(method(SET, shared))
    gc.collect()
    assert warned(a) == []


def test_nor_one_that_only_drops() -> None:
    shared = layer()
    a = method(RigL, shared)
    gmp = GMP(a.masks, 0.9, update_every=2, stop_at=100)
    assert warned(a, gmp, a, gmp, a) == []
    assert gmp.last_update["parameter 0"].dropped


def test_nor_methods_of_other_weights() -> None:
    a, b = method(RigL, layer(1)), method(RigL, layer(2))
    assert warned(a, b, a, b) == []


def test_nor_a_copy_with_its_network() -> None:
    a = method(RigL, layer())
    b = copy.deepcopy(a)
    for weight, mine in zip(b.masks, a.masks, strict=True):
        assert mine.grad is not None
        weight.grad = mine.grad.clone()
    assert warned(a, b, a, b) == []


@pytest.mark.parametrize("cls", [SET, RigL])
def test_parameters_can_be_swapped_after_updates(cls: type) -> None:
    """PyTorch refuses to swap a parameter that has a weak reference, as FSDP2's ``model.to`` does."""
    shared = layer()
    dst = method(cls, shared)
    update(dst, 2)
    torch.utils.swap_tensors(shared[0], Parameter(torch.randn(8, 20)))


def test_copies_and_pickles_begin_anew() -> None:
    a = method(SET, layer())
    update(a, 2)
    for b in (copy.deepcopy(a), copy.copy(a), pickle.loads(pickle.dumps(a))):
        assert warned(b, b) == []
