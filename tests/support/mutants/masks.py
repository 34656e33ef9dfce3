"""Mistakes in updates of masks, and in the step that follows one."""

from __future__ import annotations

from mutants.mutant import Mutant

MASKS = {
    # Updates of masks.
    "versions-raised-after-masks-are-written": Mutant(
        "topology/native_drop_and_grow.py",
        "        self._count_writes(changes)\n        return self._written(self._updates.update(",
        "        return (lambda updates: self._count_writes(changes) or self._written(updates))"
        "(self._updates.update(",
        "topology/test_interrupted_updates.py::test_what_changed_is_counted_and_the_next_step_is_right",
    ),
    "masks-of-ranks-not-compared": Mutant(
        "topology/agreement.py",
        "whole_hashes([*masks.values()])",
        "[0] * len(masks)",
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
        "self._is_compared = self._is_new = False",
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
        "if versions == self._versions and",
        "if",
        "topology/test_wrong_hooks.py::TestWrongHooks::test_a_hook_that_writes",
    ),
    "a-hook-that-replaces-a-gradient-not-noticed": Mutant(
        "topology/hook_checks.py",
        " and all(map(is_, gradients, self._gradients))",
        "",
        "topology/test_wrong_hooks.py::TestWrongHooks::test_a_hook_that_writes",
    ),
    "as-many-grow-as-drop": Mutant(
        "topology/update_plan.py",
        "Change(\n                counts,",
        "Change(\n                Counts(counts.drop, counts.drop),",
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
        "        if not skips and not is_skipped(",
        "        if skips:\n"
        "            [own['momentum_buffer'].mul_(0.9) for own in self.state.values()]\n"
        "        elif not is_skipped(",
        "topology/test_skip_step.py::test_the_masks_are_applied_and_nothing_else",
    ),
    "a-users-change-costs-a-step": Mutant(
        "optimizer.py",
        "        if not skips and not is_skipped(",
        "        if not skips and (last.is_same(observed) or not self.state) and not is_skipped(",
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
        "topology/test_skip_step_errors.py::test_a_step_that_fails_is_left_out_when_it_is_made",
    ),
    "one-that-was-not-used-does-not-end": Mutant(
        "topology/dynamic_sparse_training.py",
        "        self._end_update()\n        if self._is_new and",
        "        self._updated = False\n        if self._is_new and",
        "topology/test_skip_step.py::test_a_step_that_the_script_leaves_out_itself",
    ),
    "one-that-is-kept-by-a-traceback-does-not-end": Mutant(
        "topology/dynamic_sparse_training.py",
        "            self._skipped_step.withdraw()\n",
        "",
        "topology/test_skip_step_errors.py::test_an_error_that_is_kept_costs_no_second_step",
    ),
    "only-what-changed-is-left-out": Mutant(
        "topology/dynamic_sparse_training.py",
        "if plan.is_asked_for and self.skip_step:",
        "if plan.is_asked_for and self.skip_step and self._updated:",
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
        "memory_of(local_parts([mask])) == memory_of(local_parts([other]))",
        "False",
        "topology/test_skip_step_optimizers.py::TestWhichOptimizers::test_one_with_views_of_the_masks",
    ),
    "a-step-of-an-update-that-is-over-is-left-out": Mutant(
        "optimizer.py",
        "        begin(self)\n",
        "",
        "topology/test_skip_step_optimizers.py::test_an_optimizer_that_is_made_later_leaves_nothing_out",
    ),
    "a-new-optimizer-in-place-of-the-old-steps": Mutant(
        "skipped_steps.py",
        "        if is_copy or skip.is_over:",
        "        if True:",
        "topology/test_skip_step_optimizers.py::test_an_optimizer_that_is_made_for_the_step",
    ),
    "a-copy-leaves-out-a-step": Mutant(
        "skipped_steps.py",
        "        if is_copy or skip.is_over:",
        "        if skip.is_over:",
        "topology/test_skip_step_optimizers.py::TestWhichOptimizers::test_not_a_copy",
    ),
    "phases-are-taken-for-turns": Mutant(
        "topology/turns.py",
        "theirs.before < mine.last < theirs.last",
        "mine.last < theirs.last",
        "topology/test_turns.py::test_phases_are_not_warned_of",
    ),
    "a-weight-or-two-outside-are-trained": Mutant(
        "masks/outside.py",
        "2 * self.nonzero > self.weights",
        "self.nonzero > 0",
        "finished/test_finalize.py::TestATrainedDenseModel::test_a_mask_that_has_just_become_smaller_is_not",
    ),
    "gradients-of-a-pruned-layer-count": Mutant(
        "topology/update_plan.py",
        "gradient.nan_to_num(0.0, 0.0, 0.0)",
        "gradient",
        "topology/test_dense_optimizer.py::test_an_infinite_gradient_times_a_mask_does_not_count",
    ),
    "frozen-layers-with-an-old-gradient-change": Mutant(
        "topology/dynamic_sparse_training.py",
        "return layer.parameter.requires_grad and has_what_it_needs",
        "return has_what_it_needs if self.uses_gradients else layer.parameter.requires_grad",
        "topology/test_untrained_layers.py::test_a_frozen_layer_with_an_old_gradient_keeps_its_mask",
    ),
    "writes-that-are-not-counted-train-nothing": Mutant(
        "topology/untrained_layers.py",
        "for layer in known if torch.equal(self._sums[layer.index], _sum(layer))",
        "for layer in known",
        "topology/test_untrained_layers.py::test_writes_that_pytorch_does_not_count",
    ),
    "updates-in-a-row-never-end": Mutant(
        "topology/update_warnings.py",
        "self._in_a_row + 1 if skips else 0",
        "self._in_a_row + 1",
        "topology/test_skip_step.py::TestArguments::test_three_updates_in_a_row",
    ),
    "a-limit-of-other-parameters": Mutant(
        "known_optimizers.py",
        "return limited.issuperset(parameters)",
        "return bool(limited)",
        "topology/test_last_update.py::TestConcentratedGrowth::test_a_limit_is_not_advised_where_there_is_one",
    ),
}
