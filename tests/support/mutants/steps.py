"""Mistakes in how a step is made, and in the norm of gradients."""

from __future__ import annotations

from mutants.mutant import Mutant

STEPS = {
    # The step itself.
    "new-buffers-not-stored": Mutant(
        "step/make_step.py",
        'state[p]["momentum_buffer"] = buffer',
        "pass",
        "optimizer/test_gradients.py::test_parameters_without_gradient_are_left_alone",
    ),
    "buffers-of-a-step-that-failed-kept": Mutant(
        "step/make_step.py",
        "in former.items():",
        "in ():",
        "bad_input/test_failed_steps.py::test_buffers_of_a_first_step_that_fails",
    ),
    "first-step-dampened": Mutant(
        "step/found.py",
        'is_first_step=is_new and group["dampening"] != 0',
        "is_first_step=False",
        "optimizer/test_amp.py::test_a_group_added_after_a_first_step_that_was_skipped",
    ),
    "first-step-takes-the-rule-of-another-group": Mutant(
        "step/found.py",
        'RuleSource(index, is_first_step=is_new and group["dampening"] != 0)',
        'RuleSource(0 if is_new else index, is_first_step=is_new and group["dampening"] != 0)',
        "optimizer/test_param_groups.py::test_a_group_has_its_own",
    ),
    "first-step-is-of-the-first-group": Mutant(
        "step/inputs.py",
        "groups[source.group], batch",
        "groups[0 if source.is_first_step else source.group], batch",
        "update_rule/test_oracle.py::test_all_dtypes_and_groups_in_one_optimizer",
    ),
    "what-feeds-no-norm-is-corrected": Mutant(
        "step/found.py",
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
        "increment_version(written)",
        "pass",
        "step/test_last_step.py::test_autograd_notices",
    ),
    "versions-raised-after-the-write": Mutant(
        "step/make_step.py",
        """
    increment_version(written)
    for batch, own in zip(batches, inputs, strict=True):
        batch.plan.step(own)
""",
        """
    for batch, own in zip(batches, inputs, strict=True):
        batch.plan.step(own)
    increment_version(written)
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
        "step/unseen_writes.py",
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
        "step/test_overlap.py::test_turns",
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
    "dense-norm-forgotten-in-a-step-that-is-repeated": Mutant(
        "step/last_step.py",
        'dense_norm=prepared.norm_over == "dense"',
        "dense_norm=False",
        "update_rule/test_dense_norm.py",
    ),
}
