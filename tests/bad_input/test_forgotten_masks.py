"""Masks of a model that its optimizer was not given: one warning, which names a layer, and no
needless one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from refusals import words
from three_layers import make, train

from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.sparsify import sparsify


class TestForgottenMasks:
    def test_a_warning_names_a_layer(self) -> None:
        model = make()
        masks = sparsify(model, 0.9)
        with pytest.warns(
            UserWarning, match=words("'0.weight' and 2 more", "without masks=", "masks=sk.Masks")
        ) as w:
            optimizer = SparseOpt(model.parameters(), lr=0.1)
        assert [record.filename for record in w] == [__file__]
        train(model, optimizer)
        assert masks.sparsity() > 0.85  # it says nothing of the weights

    def test_it_comes_once(self) -> None:
        model = make()
        sparsify(model, 0.9)
        groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
        with pytest.warns(UserWarning, match="without masks=") as caught:
            optimizer = SparseOpt(groups, lr=0.1)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.add_param_group({"params": model[4].parameters()})

    @pytest.mark.parametrize("case", ["no-masks-wanted", "masks", "dense", "copy", "unmasked-again"])
    def test_silence(self, case: str) -> None:
        model = make()
        masks = None if case == "dense" else sparsify(model, 0.9)
        if case == "copy":
            model = copy.deepcopy(model)  # nobody has found its masks yet
        if case == "unmasked-again":
            for layer in (model[0], model[2], model[4]):
                del layer.weight_mask
        argument: Any = {"no-masks-wanted": {}, "masks": masks}.get(case)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SparseOpt(model.parameters(), lr=0.1, masks=argument)

    def test_models_do_not_live_longer_for_it(self) -> None:
        import gc
        import weakref

        model = make()
        sparsify(model, 0.9)
        alive = weakref.ref(model[0])
        del model
        gc.collect()
        assert alive() is None

    def test_masks_of_a_part(self) -> None:
        model = make()
        first = sparsify(model[0], 0.5)
        sparsify(model[2], 0.5)
        with pytest.warns(UserWarning, match=words("trained dense", "'weight'.", "other parameters alone")):
            optimizer = SparseOpt(model.parameters(), lr=0.1, masks=first)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer)

    def test_masks_of_before_another_call(self) -> None:
        model = make()
        masks = sparsify(model, {"0": 0.5})
        sparsify(model, {"2": 0.5})
        with pytest.warns(
            UserWarning, match=words("trained dense", "'2.weight'.", "pass masks=sk.Masks(model)")
        ):
            SparseOpt(model.parameters(), lr=0.1, masks=masks)

    def test_a_dict_of_some(self) -> None:
        model = make()
        masks = sparsify(model, 0.5)
        some = {model[0].weight: masks[model[0].weight]}
        with pytest.warns(UserWarning, match=words("'2.weight' and 1 more.", "other parameters alone")):
            SparseOpt(model.parameters(), lr=0.1, masks=some)

    def test_sparsified_after_the_optimizer_was_made(self) -> None:
        model = make()
        optimizer = SparseOpt(model.parameters(), lr=0.1)
        sparsify(model, 0.5)
        with pytest.warns(UserWarning, match=words("'0.weight' and 2 more", "without masks=")) as caught:
            train(model, optimizer)
        assert len(caught) == 1

    def test_what_is_frozen_is_not_named(self) -> None:
        model = make()
        first = sparsify(model[0], 0.5)
        sparsify(model[2], 0.5)
        model[2].requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SparseOpt(model.parameters(), lr=0.1, masks=first)
