"""Masks of a model are accepted wherever the model holds the optimizer's parameters; mistakes are named."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from backends import Backend
from refusals import words
from side_by_side import same_bits
from three_layers import make, train
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks, neurons_in
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.gmp import GMP
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify


def expected(sparsity: float = 0.5) -> Any:
    """The network after three steps of one optimizer for all."""
    model = make()
    train(model, SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=sparsify(model, sparsity)))
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class TestScripts:
    """Everyday scripts, each with the ``Masks`` of the whole model."""

    def test_only_trainable_parameters(self) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        for p in model[0].parameters():
            p.requires_grad_(False)
        before = model[0].weight.detach().clone()
        trainable = [p for p in model.parameters() if p.requires_grad]
        train(model, SparseOpt(trainable, lr=0.1, momentum=0.9, masks=masks))
        assert same_bits(model[0].weight, before)
        assert not model[2].weight[~masks[model[2].weight]].any()

    def test_head_first_then_the_rest(self) -> None:
        model, reference = make(), expected()
        optimizer = SparseOpt(model[4].parameters(), lr=0.1, momentum=0.9, masks=sparsify(model, 0.5))
        optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()]})
        train(model, optimizer)
        assert_same(model, reference)

    def test_what_joins_later_is_masked_then(self, backend: Backend) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        optimizer = SparseOpt(model[4].parameters(), lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
        train(model, optimizer)
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        optimizer.add_param_group({"params": model[0].parameters()})
        train(model, optimizer, steps=1)
        assert not model[0].weight[~masks[model[0].weight]].any()

    def test_an_optimizer_for_each_of_two_networks(self) -> None:
        networks: Any = nn.ModuleDict({"generator": make(0), "discriminator": make(0)})
        masks = sparsify(networks, 0.5)
        for part in networks.values():
            train(part, SparseOpt(part.parameters(), lr=0.1, momentum=0.9, masks=masks))
            for layer in (part[0], part[2], part[4]):
                assert not layer.weight[~layer.weight_mask].any()

    def test_an_optimizer_for_each_parameter(self) -> None:
        """As for a step in backward; those of biases have no mask at all."""
        model, reference = make(), expected()
        masks = sparsify(model, 0.5)
        train(model, *(SparseOpt([p], lr=0.1, momentum=0.9, masks=masks) for p in model.parameters()))
        assert_same(model, reference)

    def test_a_parameter_taken_out_of_a_group(self) -> None:
        model = make()
        optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=sparsify(model, 0.5))
        train(model, optimizer)
        before = model[0].weight.detach().clone()
        del optimizer.param_groups[0]["params"][0]
        train(model, optimizer)
        assert same_bits(model[0].weight, before)

    def test_a_new_head_beside_masked_layers(self) -> None:
        model = make()
        sparsify(model, 0.5)
        model[4] = nn.Linear(12, 7)
        masks = Masks(model)
        assert list(masks.named()) == ["0.weight", "2.weight"]
        train(model, SparseOpt(model.parameters(), lr=0.1, masks=masks))
        assert model[4].weight.all()

    def test_two_models_of_which_one_is_masked(self) -> None:
        masked, dense = make(0), make(1)
        parameters = [*masked.parameters(), *dense.parameters()]
        train(
            nn.Sequential(masked, nn.Linear(4, 8), dense), SparseOpt(parameters, masks=sparsify(masked, 0.5))
        )
        assert dense[0].weight.all()

    @pytest.mark.parametrize("kind", ["Masks", "dict"])
    def test_a_wrapper_that_puts_all_arguments_into_its_groups(self, kind: str) -> None:
        """SAM does: its own constructor first, then ``base_optimizer(self.param_groups, **kwargs)``."""

        class Wrapper(torch.optim.Optimizer):
            def __init__(self, params: Any, base: Any, **kwargs: Any) -> None:
                super().__init__(params, dict(rho=0.05, **kwargs))
                self.base = base(self.param_groups, **kwargs)
                self.param_groups = self.base.param_groups

            def step(self, closure: Any = None) -> Any:
                return self.base.step(closure)

        model, reference = make(), expected()
        masks: Any = sparsify(model, 0.5)
        masks = masks if kind == "Masks" else dict(masks)
        optimizer = Wrapper(
            model.parameters(),
            SparseOpt,
            lr=0.1,
            momentum=0.9,
            masks=masks,
            backend="auto",
            feeding_norm=None,
        )
        train(model, optimizer)
        assert_same(model, reference)
        state = io.BytesIO()
        torch.save(optimizer.base.state_dict(), state)
        state.seek(0)
        optimizer.base.load_state_dict(torch.load(state, weights_only=True))
        train(model, optimizer, steps=1)

    def test_zero(self) -> None:
        from torch import distributed
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model, reference = make(), expected()
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            masks = sparsify(model, 0.5)
            zero: Any = ZeroRedundancyOptimizer
            train(model, zero(model.parameters(), SparseOpt, lr=0.1, momentum=0.9, masks=masks))
        finally:
            distributed.destroy_process_group()
        assert_same(model, reference)


class TestSubset:
    def test_it_keeps_neurons_and_order(self) -> None:
        model: Any = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(9, 4))
        masks = sparsify(model, 0.5)
        some = masks.subset([model[2].bias, model[2].weight, model[0].weight])
        assert list(some.named()) == ["0.weight", "2.weight"]
        assert some.neurons(model[0].weight) == Neurons(dim=1, groups=2)
        assert len(masks.subset([model[2].bias])) == 0
        assert some[model[2].weight] is model[2].weight_mask

    def test_what_is_no_parameter_of_the_model(self) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        with pytest.raises(TypeError, match="subset takes parameters, it was given a str"):
            masks.subset(["0.weight"])  # type: ignore[list-item]
        with pytest.raises(ValueError, match=words("(3, 3)", "not in the model")):
            masks.subset([Parameter(torch.ones(3, 3))])

    def test_it_survives_a_copy(self) -> None:
        model = make()
        some = sparsify(model, 0.5).subset([model[0].weight])
        for twin, twin_some in (copy.deepcopy((model, some)), pickle.loads(pickle.dumps((model, some)))):
            assert list(twin_some.named()) == ["0.weight"]
            assert twin_some[twin[0].weight] is twin[0].weight_mask


class TestNeurons:
    """``{p: masks[p]}``: six steps of a transposed convolution were 1.5e-3 apart from those of ``Masks``."""

    def weights(self, wrap: Any, backend: str) -> Tensor:
        torch.manual_seed(0)
        layer = nn.ConvTranspose2d(6, 4, 3)
        masks = sparsify(layer, 0.6, "uniform")
        optimizer = SparseOpt([layer.weight], lr=0.1, momentum=0.9, masks=wrap(masks), backend=backend)
        for step in range(6):
            layer.weight.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return layer.weight.detach()

    def test_a_dict_of_registered_masks_has_those_of_the_layer(self, backend: Backend) -> None:
        own = self.weights(lambda masks: masks, backend.name)
        assert same_bits(own, self.weights(dict, backend.name))
        assert same_bits(own, self.weights(lambda masks: {p: masks[p] for p in masks}, backend.name))
        copied = self.weights(lambda masks: {p: masks[p].clone() for p in masks}, backend.name)
        assert not same_bits(own, copied)  # dimension 0, as for any mask of the user's

    def test_a_mask_that_was_registered_once_and_is_no_more(self) -> None:
        layer: Any = nn.ConvTranspose2d(6, 4, 3)
        masks = dict(sparsify(layer, 0.6, "uniform"))
        assert neurons_in(masks, layer.weight) == Neurons(dim=1)
        del layer.weight_mask
        assert neurons_in(masks, layer.weight) == Neurons()

    def test_of_a_parameter_that_its_layer_replaced(self) -> None:
        """It is the layer's no more, though the mask is."""
        layer: Any = nn.ConvTranspose2d(6, 4, 3)
        masks = dict(sparsify(layer, 0.6, "uniform"))
        former = layer.weight
        layer.weight = Parameter(torch.ones(6, 4, 3, 3))
        assert neurons_in(masks, former) == Neurons()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SparseOpt([former])  # of a mask that was forgotten


class TestMistakes:
    def test_masks_of_a_copy(self) -> None:
        model = make()
        masks = sparsify(copy.deepcopy(model), 0.5)
        with pytest.raises(ValueError, match=words("masks are those of another model", "Make Masks(model)")):
            SparseOpt(model.parameters(), masks=masks)

    def test_a_layer_that_was_replaced(self) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        model[4] = nn.Linear(12, 7)
        with pytest.raises(ValueError, match=words("'4.weight'", "was replaced", "Make Masks(model) anew")):
            SparseOpt(model.parameters(), masks=masks)

    def test_a_parameter_that_was_replaced_later(self, backend: Backend) -> None:
        model = make()
        optimizer = SparseOpt(model.parameters(), masks=sparsify(model, 0.5), backend=backend.name)
        train(model, optimizer)
        model.load_state_dict(model.state_dict(), assign=True)
        model[0].weight_mask[0] = False
        with pytest.raises(
            ValueError, match=words("'0.weight'", "Make Masks(model) anew, then the optimizer")
        ):
            optimizer.step()

    def test_a_parameter_of_a_dict_that_no_group_has(self) -> None:
        model = make()
        masks = dict(sparsify(model, 0.5))
        with pytest.raises(ValueError, match=words("(16, 8)", "not among", "add a parameter group")):
            SparseOpt(model[2].parameters(), masks=masks)

    def test_other_masks_in_a_group(self) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        groups = [{"params": model.parameters(), "masks": Masks(model)}]
        with pytest.raises(ValueError, match="a parameter group has 'masks', and it is not the argument"):
            SparseOpt(groups, masks=masks)

    def test_a_mask_that_is_gone(self) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        del model[0].weight_mask
        with pytest.raises(ValueError, match=words("the mask of '0.weight' is gone")):
            SparseOpt(model.parameters(), masks=masks)


class TestTopologies:
    @pytest.mark.parametrize("cls", [SET, RigL, GMP])
    def test_masks_of_parameters_that_were_replaced(self, cls: Any) -> None:
        """Weights that nobody trains would choose the masks of those that are."""
        model = make()
        masks = sparsify(model, 0.5)
        settings = {"sparsity": 0.9} if cls is GMP else {}
        dst = cls(masks, update_every=1, stop_at=9, **settings)
        model.load_state_dict(model.state_dict(), assign=True)
        before = [mask.clone() for mask in masks.values()]
        with pytest.raises(ValueError, match=words("'0.weight'", "Make Masks(model) anew", "SET or RigL")):
            dst.step()
        assert all(torch.equal(*pair) for pair in zip(masks.values(), before, strict=True))

    def test_what_is_no_mapping(self) -> None:
        with pytest.raises(TypeError, match="masks is a SGD, it must be a Masks or a mapping"):
            RigL(torch.optim.SGD([nn.Parameter(torch.ones(2))]), stop_at=9)  # type: ignore[arg-type]


def test_a_group_without_masks_of_a_wrapper_without_masks() -> None:
    (p,) = nn.Linear(2, 2, bias=False).parameters()
    SparseOpt([{"params": [p], "masks": None}], lr=0.1, masks=None)


def test_masks_in_the_place_of_lr() -> None:
    model = make()
    with pytest.raises(ValueError, match="lr is a Masks, it must be a number: give masks by name"):
        SparseOpt(model.parameters(), sparsify(model, 0.5))  # type: ignore[arg-type]
