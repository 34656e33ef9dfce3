"""Mistakes in what is compared with the last step, and in what is prepared anew."""

from __future__ import annotations

from mutants.mutant import Mutant

TOLD = "step/test_change_detection.py::test_what_is_told"
PREPARATION = {
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
        "step/change_detection.py", "memory_of(local_parts(parameters))", "memory_of([])", TOLD
    ),
    "memory-of-buffers-not-compared": Mutant(
        "step/change_detection.py", "memory_of(local_parts(_buffers(state)))", "memory_of([])", TOLD
    ),
    "memory-of-masks-not-compared": Mutant(
        "step/change_detection.py", "memory_of(local_parts(masks))", "None", TOLD
    ),
    "as-many-tensors-are-the-same": Mutant(
        "step/change_detection.py", "all(map(is_, self._objects, other._objects))", "True", TOLD
    ),
    "rule-of-a-first-step-kept": Mutant(
        "optimizer.py",
        "            if prepared.has_first_steps:\n",
        "            if False:\n",
        "update_rule/test_edges.py::test_many_small_parameters",
    ),
    "first-step-taken-for-the-next": Mutant(
        "optimizer.py",
        "observed._replace(snapshot=None)",
        "observed",
        "step/test_last_step.py::test_a_state_that_is_cleared_after_the_first_step",
    ),
    "observed-after-a-first-step": Mutant(
        "optimizer.py",
        "        return observed\n\n    def _notice_writes",
        "        return self._observe()\n\n    def _notice_writes",
        "step/test_last_step.py::test_a_change_during_a_step_is_seen_by_the_next",
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
        "zero_outside(as_boolean(f.mask), f.masked)",
        "zero_outside(as_boolean(f.mask), f.masked[:1])",
        "step/test_preparation.py::TestMaskChanges::test_of_a_parameter_without_a_gradient",
    ),
    "mask-not-applied-to-the-weight": Mutant(
        "step/preparation.py",
        "zero_outside(as_boolean(f.mask), f.masked)",
        "zero_outside(as_boolean(f.mask), f.masked[1:])",
        "step/test_preparation.py::TestMaskChanges::test_of_a_parameter_without_a_gradient",
    ),
    "mask-not-applied-over-other-weights": Mutant(
        "step/preparation.py",
        "entry.versions == versions_of(f.watched)",
        "entry.versions is not None",
        "optimizer/test_moving_masks.py::test_next_step_zeroes_what_lies_outside_the_mask",
    ),
    "mask-not-applied-without-a-gradient": Mutant(
        "step/found.py",
        "(mask is None or not (p in known or state.get(p)))",
        "True",
        "step/test_preparation.py::TestMaskChanges::test_of_a_parameter_without_a_gradient",
    ),
    "mask-applied-before-the-first-gradient": Mutant(
        "step/found.py",
        "(mask is None or not (p in known or state.get(p)))",
        "mask is None",
        "optimizer/test_moving_masks.py::test_mask_of_a_parameter_that_gets_its_gradient_later",
    ),
    "mask-not-applied-where-amp-skips": Mutant(
        "optimizer.py",
        "        only_makes_state, looked = False,",
        '        if getattr(self, "found_inf", 0):\n            return\n'
        "        only_makes_state, looked = False,",
        "optimizer/test_amp.py::test_found_inf_leaves_everything_as_it_was",
    ),
    "mask-written-is-the-former-mask": Mutant(
        "step/found.py",
        "0 if mask is None else mask._version",
        "0",
        "optimizer/test_moving_masks.py::test_a_mask_shared_by_two_parameters",
    ),
    "dtype-of-gradients-not-known": Mutant(
        "step/found.py",
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
}
