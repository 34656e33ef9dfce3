"""One mistake at a time that could be made in what is kept from step to step, and the test that finds it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    """What is in the file, once."""
    new: str
    test: str
    """What must fail: a file of ``tests`` and a name in it."""


TOLD = "step/test_change_detection.py::test_what_is_told"
MUTANTS = {
    # Whether anything has changed since the last step.
    "version-of-a-mask-not-compared": Mutant(
        "step/change_detection.py", "mask_versions=mask_versions,", "mask_versions=[],", TOLD
    ),
    "version-of-a-weight-or-buffer-not-compared": Mutant(
        "step/last_step.py",
        "observed.versions == self.versions()",
        "True",
        "optimizer/test_moving_masks.py::test_next_step_zeroes_what_lies_outside_the_mask",
    ),
    "layout-of-gradients-not-compared": Mutant(
        "step/change_detection.py", "gradients=layout,", "gradients=None,", TOLD
    ),
    "whose-the-masks-are-not-compared": Mutant(
        "step/change_detection.py", "masked=Identities(owners),", "masked=None,", TOLD
    ),
    "whose-the-buffers-are-not-compared": Mutant(
        "step/change_detection.py", "stateful=Identities(state),", "stateful=None,", TOLD
    ),
    "parameters-of-a-group-not-compared": Mutant(
        "step/change_detection.py", 'Identities(group["params"])', "Identities()", TOLD
    ),
    "momentum-of-a-group-not-compared": Mutant(
        "step/change_detection.py", 'group["momentum"] != 0', "True", TOLD
    ),
    "dampening-of-a-group-not-compared": Mutant(
        "step/change_detection.py", 'group["dampening"] != 0', "False", TOLD
    ),
    "correction-of-a-group-not-compared": Mutant(
        "step/change_detection.py", 'group["correction"],', '"layer",', TOLD
    ),
    "norm-of-a-group-not-compared": Mutant(
        "step/change_detection.py", 'group["max_grad_norm_over"],', '"active",', TOLD
    ),
    "memory-of-parameters-not-compared": Mutant(
        "step/change_detection.py", "memory_of(parameters)", "memory_of([])", TOLD
    ),
    "memory-of-buffers-not-compared": Mutant(
        "step/change_detection.py", "memory_of(_buffers(state))", "memory_of([])", TOLD
    ),
    "memory-of-masks-not-compared": Mutant(
        "step/change_detection.py", "versions_of(masks), memory_of(masks)", "versions_of(masks), None", TOLD
    ),
    "as-many-tensors-are-the-same": Mutant(
        "step/change_detection.py", "all(map(is_, self._objects, other._objects))", "True", TOLD
    ),
    "versions-not-recorded": Mutant(
        "step/last_step.py",
        "self._versions = None if prepared is None else versions_of(prepared.watched)",
        "self._versions = None if observed is None else observed.versions",
        "step/test_preparation.py::test_nothing_is_prepared_twice",
    ),
    "absent-tensors-are-at-the-address-of-none": Mutant(
        "kernels/tensor_memory.py",
        "if tensor is None or is_lazy(tensor):",
        "if is_lazy(tensor):",
        "kernels/test_tensor_memory.py::test_what_is_equal_and_what_differs",
    ),
    "strides-not-told": Mutant(
        "kernels/tensor_memory.py",
        "return (tensor.stride(), ",
        "return (0, ",
        "kernels/test_tensor_memory.py::test_what_is_equal_and_what_differs",
    ),
    "dtypes-not-told": Mutant(
        "kernels/tensor_memory.py",
        "return (tensor.stride(), tensor.dtype, ",
        "return (tensor.stride(), 0, ",
        "kernels/test_tensor_memory.py::test_what_is_equal_and_what_differs",
    ),
    # Whether the last step is made again at once.
    "made-again-though-amp-has-a-verdict": Mutant(
        "optimizer.py",
        "not skips and amp == (None, None)",
        "not skips",
        "step/test_last_step.py::test_a_verdict_of_amp",
    ),
    "made-again-with-new-buffers": Mutant(
        "step/last_step.py",
        " or prepared.new_buffers",
        "",
        "step/test_last_step.py::test_after_a_first_step_that_amp_skipped",
    ),
    "made-again-with-irregular-gradients": Mutant(
        "step/last_step.py",
        " or prepared.batches[0].irregular",
        "",
        "step/test_last_step.py::test_a_gradient_in_another_memory_format_in_all_steps",
    ),
    "masks-of-a-snapshot-not-held": Mutant(
        "step/last_step.py",
        "(observed.snapshot, observed.masks) if",
        "(observed.snapshot, []) if",
        "optimizer/test_moving_masks.py::test_a_mapping_that_makes_its_masks_anew",
    ),
    # What is prepared anew.
    "mask-not-applied-to-the-buffer": Mutant(
        "step/preparation.py",
        "zero_outside(as_boolean(f.mask), f.watched)",
        "zero_outside(as_boolean(f.mask), f.watched[:1])",
        "step/test_preparation.py::TestMaskChanges::test_of_a_parameter_without_a_gradient",
    ),
    "mask-not-applied-to-the-weight": Mutant(
        "step/preparation.py",
        "zero_outside(as_boolean(f.mask), f.watched)",
        "zero_outside(as_boolean(f.mask), f.watched[1:])",
        "step/test_preparation.py::TestMaskChanges::test_of_a_parameter_without_a_gradient",
    ),
    "mask-not-applied-over-other-weights": Mutant(
        "step/preparation.py",
        "entry.versions == versions_of(f.watched)",
        "entry.versions is not None",
        "optimizer/test_moving_masks.py::test_next_step_zeroes_what_lies_outside_the_mask",
    ),
    "mask-not-applied-without-a-gradient": Mutant(
        "step/preparation.py",
        "(mask is None or not (p in entries or state.get(p)))",
        "True",
        "step/test_preparation.py::TestMaskChanges::test_of_a_parameter_without_a_gradient",
    ),
    "mask-applied-before-the-first-gradient": Mutant(
        "step/preparation.py",
        "(mask is None or not (p in entries or state.get(p)))",
        "mask is None",
        "optimizer/test_moving_masks.py::test_mask_of_a_parameter_that_gets_its_gradient_later",
    ),
    "mask-not-applied-where-amp-skips": Mutant(
        "optimizer.py",
        "        if not last.is_same(observed):",
        '        if getattr(self, "found_inf", 0):\n            return\n'
        "        if not last.is_same(observed):",
        "optimizer/test_amp.py::test_found_inf_leaves_everything_as_it_was",
    ),
    "mask-written-is-the-former-mask": Mutant(
        "step/preparation.py",
        "f.mask._version",
        "0",
        "optimizer/test_moving_masks.py::test_a_mask_shared_by_two_parameters",
    ),
    "dtype-of-gradients-not-known": Mutant(
        "step/preparation.py",
        "p.dtype if gradient is None else gradient.dtype",
        "p.dtype",
        "optimizer/test_odd_dtypes.py::test_gradients_of_another_dtype_each_step",
    ),
    "tensors-keep-their-first-rule": Mutant(
        "step/preparation.py",
        "rules.index(f.rule)",
        "rules.index(f.rule) if last is None else last.param.rule",
        "optimizer/test_param_groups.py::test_a_parameter_moved_to_another_group",
    ),
    "plan-kept-though-its-parameters-are-others": Mutant(
        "step/preparation.py",
        "if key in last and last[key].params == params:",
        "if key in last:",
        "optimizer/test_moving_masks.py::test_a_plain_dict_of_masks_is_looked_at_each_step",
    ),
    # The step itself.
    "new-buffers-not-stored": Mutant(
        "optimizer.py",
        'self.state[p]["momentum_buffer"] = buffer',
        "pass",
        "optimizer/test_gradients.py::test_parameters_without_gradient_are_left_alone",
    ),
    "first-step-dampened": Mutant(
        "step/preparation.py",
        'is_first_step=is_new and group["dampening"] != 0',
        "is_first_step=False",
        "optimizer/test_amp.py::test_a_group_added_after_a_first_step_that_was_skipped",
    ),
    "first-step-takes-the-rule-of-another-group": Mutant(
        "step/preparation.py",
        'RuleSource(index, is_first_step=is_new and group["dampening"] != 0)',
        'RuleSource(0 if is_new else index, is_first_step=is_new and group["dampening"] != 0)',
        "optimizer/test_param_groups.py::test_a_group_has_its_own",
    ),
    "first-step-is-of-the-first-group": Mutant(
        "step/inputs.py",
        "groups[source.group], batch",
        "groups[0 if source.is_first_step else source.group], batch",
        "update_rule/test_oracle.py",
    ),
    "what-feeds-no-norm-is-corrected": Mutant(
        "step/preparation.py",
        'correction = "layer" if p in feeding_norm else "none"',
        'correction = "layer"',
        "optimizer/test_correction_auto.py::test_as_with_groups_by_hand",
    ),
    "factors-kept-though-the-correction-is-another": Mutant(
        "step/preparation.py",
        "rule, f.correction, of_device)",
        "rule, of_device)",
        "update_rule/test_oracle.py::test_hyperparameters_that_change_while_running",
    ),
    "verdict-of-amp-is-one-or-nothing": Mutant(
        "step/make_step.py",
        "amp.found_inf.item() != 0",
        "amp.found_inf.item() == 1",
        "optimizer/test_amp.py::test_found_inf_leaves_everything_as_it_was",
    ),
    "negated-gradients-not-told": Mutant(
        "step/gradients.py",
        "negated = gradients.any_negated",
        "negated = False",
        "step/test_preparation.py::test_a_lazily_negated_gradient",
    ),
    "irregular-gradients-not-rewritten": Mutant(
        "step/gradients.py",
        "else irregular:",
        "else ():",
        "optimizer/test_memory_formats.py::test_gradients_in_another_format_each_step",
    ),
    "update-hidden-from-autograd": Mutant(
        "step/make_step.py",
        "increment_version(prepared.updated)",
        "pass",
        "step/test_last_step.py::test_autograd_notices",
    ),
    "versions-raised-after-the-write": Mutant(
        "step/make_step.py",
        """
    increment_version(prepared.updated)
    for batch, own in zip(batches, inputs, strict=True):
        batch.plan.step(own)
""",
        """
    for batch, own in zip(batches, inputs, strict=True):
        batch.plan.step(own)
    increment_version(prepared.updated)
""",
        "step/test_unseen_writes.py::test_versions_are_raised_before_weights_are_written",
    ),
    "unseen-writes-to-masks-not-looked-for": Mutant(
        "kernels/cpu.py",
        "if watch.mask_written:",
        "if False:",
        "step/test_unseen_writes.py::test_it_is_said_once_and_from_then_on_the_step_is_right",
    ),
    "unseen-writes-to-weights-not-looked-for": Mutant(
        "kernels/cpu.py",
        "if watch.weights_written:",
        "if False:",
        "step/test_unseen_writes.py::test_it_is_said_once_and_from_then_on_the_step_is_right",
    ),
    "unseen-writes-found-and-not-counted": Mutant(
        "optimizer.py",
        "for parameter, to_mask in found:",
        "for parameter, to_mask in found[:0]:",
        "step/test_unseen_writes.py::test_it_is_said_once_and_from_then_on_the_step_is_right",
    ),
    "unseen-writes-found-for-ever": Mutant(
        "kernels/cpu.py",
        "            watch.forget()",
        "            pass",
        "step/test_unseen_writes.py::test_after_a_finding_the_step_is_short_again",
    ),
    "masks-of-other-optimizers-watched": Mutant(
        "optimizer.py",
        "masks_of(self._masks, names), self._prepared",
        "self._masks, self._prepared",
        "step/test_preparation.py::test_the_masks_of_another_optimizer_change",
    ),
    "version-raised-after-a-mask-was-applied": Mutant(
        "step/zero_outside.py",
        """
    torch.autograd.graph.increment_version(tensor)
    threads = torch.get_num_threads()
    native_library.zero_outside(
        mask.data_ptr(), tensor.data_ptr(), mask.numel(), tensor.element_size(), threads
    )
""",
        """
    threads = torch.get_num_threads()
    native_library.zero_outside(
        mask.data_ptr(), tensor.data_ptr(), mask.numel(), tensor.element_size(), threads
    )
    torch.autograd.graph.increment_version(tensor)
""",
        "step/test_zero_outside.py::test_the_version_is_raised_before_the_weights_are_written",
    ),
    "shared-memory-not-detected": Mutant(
        "step/overlap.py",
        "turns[j] = max(turns[j], turns[i] + 1)",
        "pass",
        "step/test_overlap.py::test_as_the_for_loop_does_it",
    ),
    "masks-on-shared-memory-not-compared": Mutant(
        "step/overlap.py",
        "for i, j in pairs:",
        "for i, j in pairs[:0]:",
        "step/test_overlap.py::test_unequal_masks_on_the_same_memory_are_an_error",
    ),
    "masks-of-other-dtypes-on-shared-memory-compared-by-place": Mutant(
        "step/overlap.py",
        "size != second.parameter.element_size() or distance % size != 0",
        "False",
        "step/test_overlap.py::test_a_mask_and_another_dtype_on_the_same_memory_are_an_error",
    ),
    "later-turns-first": Mutant(
        "step/preparation.py",
        "key=lambda item: item[0][0]",
        "key=lambda item: -item[0][0]",
        "step/test_overlap.py::test_as_the_for_loop_does_it",
    ),
    "neurons-of-registered-masks-forgotten": Mutant(
        "masks/mapping.py",
        "place.neurons() if place is not None and place.mask() is masks[parameter] else Neurons()",
        "Neurons()",
        "bad_input/test_masks_that_fit.py::TestNeurons",
    ),
    "neurons-of-any-mask-taken-from-the-layer": Mutant(
        "masks/mapping.py",
        "place is not None and place.mask() is masks[parameter]",
        "place is not None",
        "bad_input/test_masks_that_fit.py::TestNeurons",
    ),
    "masks-of-a-parameter-that-was-replaced-remembered": Mutant(
        "masks/registered_masks.py",
        " and place.parameter() is parameter",
        "",
        "bad_input/test_masks_that_fit.py::TestNeurons::test_of_a_parameter_that_its_layer_replaced",
    ),
    "unsupported-parameters-dropped": Mutant(
        "step/preparation.py",
        "    for member in members:",
        "    for member in [own for own in members if own.entry.backend is members[0].entry.backend]:",
        "optimizer/test_memory_formats.py::test_gaps_in_some_parameters_of_several",
    ),
    "unsupported-parameters-given-to-the-backend": Mutant(
        "step/preparation.py",
        "of_device if of_device.supports(param) else REFERENCE",
        "of_device",
        "optimizer/test_memory_formats.py::test_gaps_in_some_parameters_of_several",
    ),
    "gradients-of-unsupported-parameters-mixed-up": Mutant(
        "step/gradients.py",
        "gradients.tensors[i] for i in positions",
        "gradients.tensors[i] for i in range(len(positions))",
        "optimizer/test_memory_formats.py::test_gaps_in_some_parameters_of_several",
    ),
    "addresses-of-unsupported-parameters-mixed-up": Mutant(
        "step/gradients.py",
        "return own, addresses_of(own)",
        "return own, gradients.addresses[: 8 * len(own)]",
        "optimizer/test_memory_formats.py::test_gaps_in_some_parameters_of_several",
    ),
    "norm-of-the-first-batch-alone": Mutant(
        "step/inputs.py",
        "sum(map(float, squares))",
        "float(squares[0])",
        "optimizer/test_memory_formats.py::test_gaps_in_some_parameters_of_several",
    ),
    "limits-of-the-first-group-for-all": Mutant(
        "step/inputs.py",
        "zip(own.rules, coefficients, strict=True)",
        "zip(own.rules, coefficients[:1] * len(own.rules), strict=True)",
        "optimizer/test_param_groups.py::test_a_group_has_its_own",
    ),
    # Updates of masks.
    "versions-raised-after-masks-are-written": Mutant(
        "topology/native_drop_and_grow.py",
        "        self._count_writes(dropped, grown)\n"
        "        return self._written(self._updates.grow_largest(",
        "        return (lambda updates: self._count_writes(dropped, grown) or self._written(updates))"
        "(self._updates.grow_largest(",
        "topology/test_interrupted_updates.py::test_what_changed_is_counted_and_the_next_step_is_right",
    ),
    "masks-of-ranks-not-compared": Mutant(
        "topology/agreement.py",
        "mask_hash(mask) for",
        "0 for",
        "topology/test_agreement.py::test_an_error_on_every_rank",
    ),
    "clocks-of-ranks-not-compared": Mutant(
        "topology/agreement.py",
        "{**clock, **{",
        "{**{",
        "topology/test_agreement.py::test_an_error_on_every_rank",
    ),
    "ranks-not-compared-after-loading": Mutant(
        "topology/dynamic_sparse_training.py",
        "self._is_compared = False\n        self._is_new = False",
        "self._is_new = False",
        "topology/test_dynamic_state.py::TestState::test_after_loading_the_ranks_are_compared",
    ),
    "neurons-not-known-to-updates": Mutant(
        "topology/update_plan.py",
        "make(self._tensors, self._neurons, method.min_fan_in)",
        "make(self._tensors, [type(n)() for n in self._neurons], method.min_fan_in)",
        "topology/test_min_fan_in.py::TestSteps::test_a_dead_neuron_of_a_transposed_convolution",
    ),
    "a-hook-that-writes-not-noticed": Mutant(
        "topology/hook_checks.py",
        "if version != before[what]:",
        "if False:",
        "topology/test_wrong_hooks.py::TestWrongHooks::test_a_hook_that_writes",
    ),
    "as-many-grow-as-drop": Mutant(
        "topology/update_plan.py",
        "grows = [counts.grow if mine else 0",
        "grows = [counts.drop if mine else 0",
        "topology/test_hooks.py::TestByHand::test_drop_and_growth_apart",
    ),
    "nan-is-a-score": Mutant(
        "topology/hook_checks.py",
        "if math.isnan(least):",
        "if False:",
        "topology/test_wrong_hooks.py::TestWrongHooks::test_scores",
    ),
    "negative-scores-by-the-library": Mutant(
        "topology/update_plan.py",
        "self._only_pytorch_can |= least < 0 or not supports_score(ranking.values)",
        "self._only_pytorch_can |= not supports_score(ranking.values)",
        "topology/test_hooks.py::TestByHand::test_scores_of_what_grows",
    ),
    "ranked-once-though-more-grows": Mutant(
        "topology/update_plan.py",
        " and known.at_most >= at_most:",
        ":",
        "topology/test_hooks.py::test_rigl_with_more_growth_than_it_told",
    ),
    # The step that follows an update.
    "momentum-decays-in-a-step-left-out": Mutant(
        "optimizer.py",
        "        if not skips:\n",
        "        if skips:\n"
        "            [own['momentum_buffer'].mul_(0.9) for own in self.state.values()]\n"
        "        else:\n",
        "topology/test_skip_step.py::test_the_masks_are_applied_and_nothing_else",
    ),
    "a-users-change-costs-a-step": Mutant(
        "optimizer.py",
        "        if not skips:\n",
        "        if not skips and (last.is_same(observed) or not self.state):\n",
        "topology/test_skip_step.py::test_a_users_own_change_costs_no_step",
    ),
    "made-again-though-it-is-left-out": Mutant(
        "optimizer.py",
        "may_repeat = not skips and ",
        "may_repeat = ",
        "topology/test_skip_step_optimizers.py::TestWhichOptimizers::test_one_that_has_a_share_of_the_parameters",
    ),
    "left-out-more-than-once": Mutant(
        "optimizer.py",
        "            skip.take(self)",
        "            pass",
        "topology/test_skip_step.py::test_the_masks_are_applied_and_nothing_else",
    ),
    "taken-before-a-step-that-fails": Mutant(
        "optimizer.py",
        "        last, self._last = self._last, NO_STEP",
        "        [skip.take(self) for skip in skips]\n        last, self._last = self._last, NO_STEP",
        "topology/test_skip_step.py::test_a_step_that_fails_is_left_out_when_it_is_made",
    ),
    "one-that-was-not-used-does-not-end": Mutant(
        "topology/dynamic_sparse_training.py",
        "        self._updated, self._skipped_step = False, None\n        if self._is_new and",
        "        self._updated = False\n        if self._is_new and",
        "topology/test_skip_step.py::test_a_step_that_the_script_leaves_out_itself",
    ),
    "only-what-changed-is-left-out": Mutant(
        "topology/dynamic_sparse_training.py",
        "if self.skip_step and plan.changing:",
        "if self.skip_step and any(own.changed for own in updates):",
        "topology/test_skip_step.py::test_an_update_in_which_all_weights_grow_again",
    ),
    "only-masks-of-its-own-parameters-count": Mutant(
        "optimizer.py",
        "pending_skips(self, self._masks) if",
        "pending_skips(self, masks_of(self._masks, self._names())) if",
        "topology/test_skip_step_optimizers.py::TestWhichOptimizers::test_one_that_has_a_share_of_the_parameters",
    ),
    "views-of-masks-do-not-count": Mutant(
        "skipped_steps.py",
        "memory_of([mask]) == memory_of([other])",
        "False",
        "topology/test_skip_step_optimizers.py::TestWhichOptimizers::test_one_with_views_of_the_masks",
    ),
    # The norm over all positions.
    "dense-norm-with-the-mask": Mutant(
        "kernels/reference.py",
        'mask is None or over == "dense"',
        "mask is None",
        "update_rule/test_dense_norm.py::test_by_hand",
    ),
    "dense-norm-without-factors": Mutant(
        "kernels/reference.py",
        "g = gradient.to(dtype) if c is None else",
        'g = gradient.to(dtype) if c is None or over == "dense" else',
        "update_rule/test_dense_norm.py::test_by_hand",
    ),
    "dense-norm-asked-of-active-weights": Mutant(
        "kernels/cpu.py",
        'dense=over == "dense"',
        "dense=False",
        "update_rule/test_dense_norm.py::test_by_hand",
    ),
}
