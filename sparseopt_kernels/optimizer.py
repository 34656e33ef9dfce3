"""The optimizer class, which users see: its state, and a step from the closure to the plans.

There is no arithmetic here: the update rule is in ``kernels``, and a step is prepared in ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer, ParamsT

from . import kernels
from .correction import Correction
from .kernels.contract import NormOver
from .kernels.gpu.device import capturing
from .kernels.tensor_memory import versions_of
from .known_optimizers import know
from .masks.mapping import Masks, masks_of
from .masks.registered_masks import remember, remembered_places
from .optimizer_arguments import (
    check_auto,
    check_correction,
    check_feeding_norm,
    check_group,
    check_is_mapping,
    check_masks,
    check_new_group,
    check_new_parameters,
    check_norm_over,
    names_of,
    parameters_in,
    take_out_arguments,
    warn_of_forgotten_masks,
    warn_of_norm_without_limit,
)
from .sharding import Shards, shard_buffers, shards_in
from .skipped_steps import PENDING, begin, pending_skips
from .step.amp import Amp
from .step.change_detection import Identities, Observed, observe, owners_and_masks
from .step.last_step import NO_STEP, LastStep
from .step.make_step import is_skipped, make_step, makes_state_alone, stored
from .step.preparation import NOTHING_PREPARED, Prepared, prepare
from .step.rank_agreement import Answers, LayerTotals, answers_of, ask, layer_totals
from .step.unseen_writes import FullCheck, describe, is_check_asked_for, raise_versions, unseen_writes
from .user_warning import warn

_COPIED = ("_masks", "_backend_name", "_feeding_norm", "_warned")
"""The attributes of a copy, besides those that any optimizer of PyTorch has."""


class SparseOpt(Optimizer):
    """SGD for masked weights, with the correction of SparseOpt (Eq. 12).

    A drop-in replacement for :class:`torch.optim.SGD`. For neuron ``i`` of a masked weight, with
    ``c_i = sqrt(fan_in_i / mean fan_in of the layer)``::

        d = c_i * g + weight_decay * p
        b = momentum * b + (1 - dampening) * d
        p = M * (p - lr * b),   b = M * b

    A step is one pass over memory. ``p.grad`` is never written. A parameter without a mask is updated as
    ``torch.optim.SGD`` does it, but one that is given twice in a group is updated once. ``state_dict`` has
    the form of ``torch.optim.SGD``'s, and checkpoints load in both directions. bfloat16 and float16 are
    computed in float32 and rounded once. Parameters that share memory are updated one after the other.

    A mask may be changed at any time, in place or by putting another tensor into the mapping. The next step
    zeroes weights and momentum outside the new mask, even if AMP skips that step (for a parameter that never
    had a gradient, not before its first one). PyTorch does not count some writes: those through ``.data``,
    NumPy, DLPack or raw pointers, and those of collectives of ``torch.distributed``. Call
    ``torch.autograd.graph.increment_version(tensor)`` after such a write, and the next step sees it. Without
    that call, a write to a mask on a CPU is noticed within 256 steps, and one on a GPU never.

    Where :class:`SET` or :class:`RigL` has updated one of these masks (``skip_step``), the next step applies
    the masks and does nothing else.

    On a GPU no step waits for the device, except a first step with dampening under GradScaler, and steps of
    sharded parameters, which wait for the other ranks. So the host does not know whether AMP skipped a step,
    and ``momentum_buffer`` may hold zeros before the first step that was not skipped. A step can be captured
    in a CUDA graph, after one outside of it (two with dampening); capture it again when masks have changed.

    Args:
        params: parameters, named parameters, or parameter groups; every keyword below except ``masks``,
            ``feeding_norm`` and ``backend`` may be set per group.
        lr: learning rate ``eta``, a number or a one-element tensor.
        momentum: momentum factor ``mu``; with 0 there is no ``momentum_buffer``.
        dampening: dampening ``tau`` of the momentum.
        weight_decay: weight decay ``lambda``; it is not scaled by ``c_i``.
        nesterov: Nesterov momentum; requires momentum and no dampening.
        maximize: ascend instead of descend.
        masks: the mask of each masked parameter (boolean, True = active; or floating-point, of 0 and 1): a
            :class:`Masks`, which may hold masks of other parameters of the model as well, or any mapping
            from the optimizer's parameters to tensors of their shape and device. A mask that is registered
            in a model takes its neurons from its layer; else dimension 0 of the weight counts them.
            ``{}``: no masks, and no warning of masks that the model has.
        correction: ``"layer"`` (Eq. 12), ``"unnormalized"`` (``c_i = sqrt(1 - s_i)``, the
            preconditioner D alone), ``"none"`` (masked SGD, the paper's baseline), or ``"auto"``: Eq. 12 for
            the weights in ``feeding_norm``, ``c_i = 1`` for all others.
        feeding_norm: for ``"auto"``, the weights whose layers feed a batch norm, by name: what
            :func:`layers_feeding_norm` returns, or a dict of your own. They are read once, and are no part of
            ``state_dict``.
        ham_alpha: ``alpha`` of Hyperbolic Aware Minimization, HAM (``h1 = 80`` in Table 4). It applies to
            parameters of two or more dimensions. With ``ham_alpha`` and ``ham_beta`` 0 there is no HAM.
        ham_beta: ``beta`` of HAM.
        max_grad_norm: limit for the global l2 norm of all corrected, masked gradients (Appendix F).
            The norm is over all groups; each group is scaled by its own limit.
        max_grad_norm_over: what counts in that norm: the gradients of ``"active"`` weights, or of all
            positions, ``"dense"``, those of masked ones with the ``c_i`` of their neuron. The latter is most
            likely what the paper's experiments did (see "The paper, claim by claim"). All groups have the
            same one.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; the environment
            variable ``SPARSEOPT_BACKEND`` overrides ``"auto"``, which takes ``"cpu"`` for CPU tensors and
            ``"cuda"`` (where it was built), else ``"triton"``, for those of a GPU.
        foreach, fused: accepted so that scripts keep working; the step is always fused.
        differentiable: must be False.

    Raises:
        ValueError: a hyperparameter, a mask, or a parameter group is not valid; the message names it.
        RuntimeError: ``differentiable=True``, or a backend was asked for by name that cannot run.

    Warns:
        UserWarning: a ``c_i`` of Eq. 12 is larger than 3, because fan-in is concentrated in few neurons (once
            for each layer, of masks on the CPU); a write was noticed that PyTorch did not count (once); or
            parameters have masks in their model and ``masks`` was left out (once).
    """

    _step_supports_amp_scaling = True  # for GradScaler; of an instance, deepcopy and pickle would drop it

    _masks: Mapping[Parameter, Tensor]
    _own_masks: Mapping[Parameter, Tensor]  # those of parameters in the groups
    _backend_name: str
    _feeding_norm: set[Parameter] | None
    _warned: set[Parameter]  # there was a warning of their fan-in
    _full_check: FullCheck | None
    _may_forget_masks = False  # there was no warning yet of masks that a model has, and masks has not
    _may_write_unseen = True  # there was no warning yet of unseen writes
    _shards: list[Shards]  # the ranks that have sharded parameters
    _prepared: Prepared
    _last: LastStep
    _uncompiled_update: Callable[[], None]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        masks: Mapping[Parameter, Tensor] | None = None,
        correction: Correction | Literal["auto"] = "layer",
        feeding_norm: Mapping[str, Parameter] | None = None,
        ham_alpha: float = 0.0,
        ham_beta: float = 0.0,
        max_grad_norm: float | None = None,
        max_grad_norm_over: NormOver = "active",
        backend: str = "auto",
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._backend_name = kernels.chosen_name(backend)
        check_is_mapping(masks)
        self._masks = self._own_masks = {} if masks is None else masks
        self._may_forget_masks = masks is None or len(masks) > 0
        self._full_check = FullCheck() if is_check_asked_for() else None
        self._feeding_norm = None if feeding_norm is None else parameters_in(feeding_norm)
        self._warned = set()
        self._prepared, self._last = NOTHING_PREPARED, NO_STEP
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "correction": correction,
            "ham_alpha": ham_alpha,
            "ham_beta": ham_beta,
            "max_grad_norm": max_grad_norm,
            "max_grad_norm_over": max_grad_norm_over,
        }
        check_group(defaults)
        super().__init__(params, defaults)
        names = self._names()
        check_masks(self._masks, names)
        check_feeding_norm(self._feeding_norm, names, self._masks)
        warn_of_norm_without_limit(self.param_groups)
        know(self)
        begin(self)
        self._leave_out_of_graphs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any optimizer; its masks are those of the mapping ``masks``.

        Raises:
            ValueError: a hyperparameter of the group is not valid, or a parameter is there already.
            RuntimeError: the backend that was asked for by name cannot update one of the parameters.
        """
        if isinstance(param_group, dict):
            check_new_parameters(param_group, self._names())
            take_out_arguments(param_group, self._masks, self._feeding_norm, self._backend_name)
        super().add_param_group(param_group)
        try:
            check_new_group(self.param_groups, self._feeding_norm, self._names(), self._backend_name)
        except Exception:
            self.param_groups.pop()
            raise
        self._shards = shards_in(self.param_groups)
        if self._may_forget_masks:
            self._may_forget_masks = not warn_of_forgotten_masks(self.param_groups[-1]["params"], self._masks)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            ValueError: a mask was replaced by one that does not fit its parameter, a masked parameter has
                a sparse gradient, the momentum of a checkpoint has another shape than its parameter, or
                parameters share memory and their masks differ there. Nothing has been changed then.
            RuntimeError: the first step, or the first after a mask or a weight was written, or one that an
                update of the masks leaves out (``skip_step``), is captured in a CUDA graph; CUDA reports an
                error, by its name; or ``SPARSEOPT_CHECK=1`` and the check fails.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._uncompiled_update()
        else:
            self._update()
        return loss

    def _update(self) -> None:
        """Make the step, without autograd."""
        # As PyTorch's optimizers do it: torch.no_grad() takes twice the time, a tenth of a small step.
        grad_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            self._update_all()
        finally:
            torch.set_grad_enabled(grad_enabled)

    def _update_all(self) -> None:
        """Make the step: the last one again, or what changed since then is prepared anew first."""
        skips = pending_skips(self, self._masks) if PENDING else []
        last, self._last = self._last, NO_STEP  # until this step has come to its end
        amp = Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        may_repeat = not skips and amp == (None, None)
        if may_repeat and last.repeat(self.param_groups, self.state, self._own_masks):
            self._last = last
            return
        only_makes_state, looked = False, list[Observed]()
        if self._shards and not capturing():
            answers = ask(self._shards, partial(self._look, looked, last, bool(skips), amp))
            is_same, only_makes_state = not answers.has_changed, bool(answers.only_makes_state)
            observed = looked[0] if is_same else self._observe()
        else:
            observed = self._observe()
            is_same = last.is_same(observed)
        if not is_same and self._shards:
            with layer_totals(self._shards) as totals:
                observed = self._prepare(last.versions(), observed, totals)
        elif not is_same:
            observed = self._prepare(last.versions(), observed)
        if not self._shards and (versions := self._notice_writes()) is not None:
            observed = self._prepare(versions, self._observe())
        if only_makes_state:
            with stored(self._prepared.new_buffers, self.state):
                return
        if not skips and not is_skipped(self._prepared, amp):
            observed = self._make(observed, amp)
        self._last = LastStep(self._prepared, observed, may_repeat=self._full_check is None)
        for skip in skips:
            skip.take(self)

    def _observe(self) -> Observed:
        prepared = self._prepared
        return observe(self.param_groups, self.state, self._own_masks, prepared.parameters, prepared.watched)

    def _look(self, looked: list[Observed], last: LastStep, is_left_out: bool, amp: Amp) -> Answers:
        """Observe everything. Return what this rank says before a step with sharded parameters."""
        looked.append(self._observe())
        is_same = last.is_same(looked[0]) and self._notice_writes() is None
        return answers_of(is_same, is_left_out, amp, makes_state_alone(self.state, self.param_groups))

    def _make(self, observed: Observed, amp: Amp) -> Observed:
        """Make the step that is prepared, and return what the next one will observe if nothing changes."""
        prepared = self._prepared
        if not prepared.new_buffers:
            make_step(prepared, observed.gradients, self.param_groups, amp)
            return observed
        with stored(prepared.new_buffers, self.state):
            if prepared.has_first_steps:
                observed = observed._replace(snapshot=None)  # these rules hold for this step alone
            else:
                self._prepared = prepared._replace(new_buffers={})
                observed = self._observe()  # before the step: a write during it is seen by the next one
            make_step(prepared, observed.gradients, self.param_groups, amp)
        return observed

    def _notice_writes(self) -> list[int] | None:
        """Raise the versions of what was written without one. Return those of before; None: nothing was."""
        if self._full_check is not None:
            self._full_check.check(self._prepared, self._own_masks, self._names())
            return None
        if not (found := unseen_writes(self._prepared)):
            return None
        versions = versions_of(self._prepared.watched)
        raise_versions(found, self._own_masks)
        if self._may_write_unseen:
            self._may_write_unseen = False
            warn(describe(found, self._names()))
        return versions

    def _prepare(
        self, versions: list[int] | None, observed: Observed, totals: LayerTotals | None = None
    ) -> Observed:
        """Prepare the step. Return what was observed, of the parameters and masks that were found.

        Args:
            versions: of what is watched, as far as it was masked; None: that is not known.
            observed: before it.
            totals: adds up what ranks have of sharded parameters; None without any.
        """
        check_norm_over(self.param_groups)
        for group in self.param_groups:
            check_correction(group["correction"])
            check_auto(group, self._feeding_norm)
        names = names_of(self.param_groups, self._masks)
        check_masks(self._masks, names)
        if self._may_forget_masks:
            self._may_forget_masks = not warn_of_forgotten_masks([*names], self._masks)
        self._own_masks, former = masks_of(self._masks, names), self._prepared
        self._prepared = prepare(
            self.param_groups,
            self.state,
            self._own_masks,
            names,
            partial(kernels.backend_for, self._backend_name),
            self._feeding_norm or (),
            self._warned,
            former,
            versions,
            totals,
        )
        parameters, (_, masks) = self._prepared.parameters, owners_and_masks(self._own_masks)
        is_complete = Identities([*former.parameters, *observed.masks]) == Identities([*parameters, *masks])
        return observed if is_complete else self._observe()

    @classmethod
    def _leave_out_of_graphs(cls) -> None:
        """Let ``torch.compile`` break its graph at a step. It imports the compiler: a class is too early."""
        if not hasattr(cls, "_uncompiled_update"):
            cls._uncompiled_update = torch.compiler.disable(cls._update)  # type: ignore[no-untyped-call]

    def _names(self) -> dict[Tensor, str]:
        return names_of(self.param_groups, self._masks)

    def __getstate__(self) -> dict[str, Any]:
        # Of masks in a dict, a copy must know the layers that they are registered in. Masks knows by itself.
        places = [] if isinstance(self._masks, Masks) else remembered_places(self._masks)
        own = {name: getattr(self, name) for name in _COPIED} | {"_places": places}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict may bring groups of torch.optim.SGD, of any age: what they have no word for stays.
        former = self.__dict__.get("param_groups")
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            for key, default in self.defaults.items():
                group.setdefault(key, former[i][key] if former else default)
        remember(self.__dict__.pop("_places", ()))
        self._last = NO_STEP
        self._own_masks, self._full_check = self._masks, FullCheck() if is_check_asked_for() else None
        self._shards = shards_in(self.param_groups)
        shard_buffers(self.state)
        if former is None:  # a copy: load_state_dict does not change which parameters had a gradient
            self._prepared = NOTHING_PREPARED
            begin(self, is_copy=True)
        know(self)
        self._leave_out_of_graphs()
