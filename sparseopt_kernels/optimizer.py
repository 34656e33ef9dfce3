"""The optimizer class: what users see, what is checked, and which tensors go to which backend.

There is no arithmetic here: the update rule is in ``kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer, ParamsT

from . import kernels
from .gradients import Gradients
from .masks import Masks, check_mask
from .neurons import Correction
from .preparation import NOTHING, Prepared, prepare
from .ready import Ready, ready_again
from .scalars import Amp, inputs_of, limit_norm
from .snapshot import Look, Snapshot, look, versions_of

if TYPE_CHECKING:
    from ._native import Snapshot as NativeSnapshot

_CORRECTIONS = (*get_args(Correction), "auto")


class SparseOpt(Optimizer):
    r"""SGD for masked weights that corrects the gradient skew of batch normalisation (Eq. 12).

    A drop-in replacement for :class:`torch.optim.SGD`. For a masked weight whose neuron ``i`` has
    ``fan_in_i`` active weights, with ``c_i = sqrt(fan_in_i / mean fan_in of the layer)``:

    .. math::
        d &= c_i \, \gamma \, g + \lambda \, p \\
        b &= \mu \, b + (1 - \tau) \, d \\
        p &= M \, (p - \eta \, b), \quad b = M \, b

    Everything happens in one pass over memory. ``p.grad`` is never written. Parameters without a mask
    are updated exactly as ``torch.optim.SGD`` would, but that one that is given twice in a group is updated
    once, where SGD updates it once for each time. ``state_dict`` is that of ``torch.optim.SGD``: the
    only key per parameter is ``momentum_buffer``, and checkpoints load in both directions.
    Half precisions are computed in float32 and rounded once, where SGD rounds after every operation.

    On a GPU no step waits for the device: ``lr`` as a tensor, GradScaler's verdict and the gradient norm
    are read there (but a first step with dampening waits for the verdict). So the host does not know whether
    AMP skipped a step, and ``momentum_buffer`` may hold zeros before the first step that was not skipped. A
    step can be captured in a CUDA graph, after one outside of it (two with dampening); capture it again when
    masks have changed.

    A mask may be changed at any time, in place or by putting another tensor into the mapping: the next
    step sees it, and zeroes weights and momentum outside the new mask, even if AMP then skips the step (of a
    parameter that never had a gradient, not before its first one). Writes through ``.data``, NumPy or raw
    pointers are invisible to PyTorch's version counter: after one, write once more in the open,
    ``p.mul_(masks[p])`` under ``torch.no_grad()`` for a weight, ``mask.copy_(mask)`` for a mask.

    A ``UserWarning``, once for each layer, says where Eq. 12 makes a ``c_i`` larger than 3: fan-in has become
    concentrated in few neurons. Only masks on the CPU are looked at for it, when they are new: no step waits
    for a device to tell. On a GPU, ask ``masks.fan_in(p)`` where you can wait.

    Args:
        params: parameters, named parameters, or parameter groups; every keyword below except ``masks``,
            ``feeding_norm`` and ``backend`` may be set per group.
        lr: learning rate ``eta``, a number or a one-element tensor.
        momentum: ``mu``.
        dampening: ``tau``.
        weight_decay: ``lambda``; it is not scaled by ``c_i``.
        nesterov: Nesterov momentum; requires momentum and no dampening.
        maximize: ascend instead of descend.
        masks: boolean mask (True = active) of each masked parameter: a :class:`Masks`, or any mapping
            from parameter to tensor of its shape and device. In a plain mapping, dimension 0 of a
            weight counts the neurons; ``Masks`` knows better for ``ConvTranspose``.
        correction: ``"layer"`` (Eq. 12), ``"unnormalized"`` (``c_i = sqrt(1 - s_i)``, the
            preconditioner D alone), ``"none"`` (masked SGD, the paper's baseline), or ``"auto"``: Eq. 12 for
            the weights in ``feeding_norm``, ``c_i = 1`` for all others.
        feeding_norm: for ``"auto"``, the weights whose layers feed a batch norm, by name: what
            :func:`layers_feeding_norm` returns, or a dict of your own. They are read once, and are no part of
            ``state_dict``.
        ham_alpha: ``alpha`` of Hyperbolic Aware Minimization (h1 = 80 in Table 4); 0 switches it off.
        ham_beta: ``beta`` of the same. HAM applies to parameters of two or more dimensions.
        max_grad_norm: limit for the global l2 norm of all corrected, masked gradients (Appendix F).
            The norm is over all groups; each group is scaled by its own limit.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; the environment
            variable ``SPARSEOPT_BACKEND`` overrides ``"auto"``, which takes ``"cpu"`` for CPU tensors and
            ``"cuda"`` (where it was built), else ``"triton"``, for those of a GPU.
        foreach, fused: accepted so that scripts keep working; the step is always fused.
        differentiable: must be False.

    Raises:
        ValueError: a hyperparameter, a mask, or a parameter group is not valid; the message names it.
        RuntimeError: ``differentiable=True``, or a backend was asked for by name that cannot run.
    """

    # GradScaler reads these two from the instance; deepcopy and pickle would drop instance attributes.
    _step_supports_amp_scaling = True

    _masks: Mapping[Parameter, Tensor]
    _backend_name: str
    _feeding_norm: set[Parameter] | None
    _warned: set[Parameter]  # of the masks of these there was a warning
    _prepared: Prepared
    _ready: Ready | None  # the last step, to be made again
    _snapshot: Snapshot | NativeSnapshot | None  # of the last step; None: there was none
    _masks_found: list[Tensor]  # of which it was taken
    _versions: list[int] | None  # of what is watched, after it; None: it was broken off, or _ready knows them
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
        backend: str = "auto",
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._backend_name = kernels.chosen_name(backend)
        if not isinstance(masks, Mapping | None):
            raise TypeError(
                f"masks is a {type(masks).__name__}, it must be a Masks or a mapping from parameter to mask"
            )
        self._masks = {} if masks is None else masks
        self._feeding_norm = None if feeding_norm is None else _parameters_in(feeding_norm)
        self._warned = set()
        self._prepared, self._snapshot, self._versions, self._ready = NOTHING, None, None, None
        self._masks_found = []
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
        }
        _check_group(defaults)
        super().__init__(params, defaults)
        names = self._names()
        self._check_masks(names)
        if self._feeding_norm and self._feeding_norm.isdisjoint(names):
            raise ValueError(
                "feeding_norm has none of the optimizer's parameters: it is that of another model or a copy"
            )
        self._leave_out_of_graphs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any optimizer; its masks are those of the mapping ``masks``.

        Raises:
            ValueError: a hyperparameter of the group is not valid, or a parameter is there already.
            RuntimeError: the backend that was asked for by name cannot update one of the parameters.
        """
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            seen = {id(p): name for p, name in self._names().items()}
            for i, given in enumerate(param_group["params"]):
                name, p = given if isinstance(given, tuple) else (f"params[{i}] of the new group", given)
                if id(p) in seen:
                    raise ValueError(f"{name} is in the optimizer already, as {seen[id(p)]}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            self._check_auto(group)
            for p in group["params"]:
                if hasattr(p, "device_mesh"):  # the fan-in of a neuron would span several ranks
                    raise ValueError(f"a parameter of shape {tuple(p.shape)} is a DTensor: not supported")
            for device in {p.device for p in group["params"]}:
                kernels.backend_for(self._backend_name, device)
        except Exception:
            self.param_groups.pop()
            raise

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
                a sparse gradient, or the momentum of a checkpoint has another shape than its parameter.
                Nothing has been changed then.
            RuntimeError: the first step, or the first after a mask or a weight was written, is captured in a
                CUDA graph; or CUDA reports an error, by its name.
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
        if self._made_again():
            return
        found = self._look()
        if found.snapshot is None or found.snapshot != self._snapshot or found.versions != self._versions:
            self._prepare()
            found = self._look()
        self._versions = None  # until the step has come to its end
        self._make_step(found.gradients)
        versions = versions_of(self._prepared.watched)
        self._ready = ready_again(self._prepared, found, versions)
        self._snapshot, self._masks_found = found.snapshot, found.masks
        self._versions = versions if self._ready is None else None

    def _made_again(self) -> bool:
        """Whether the last step could be made again, and was."""
        ready, self._ready = self._ready, None  # until it has come to its end
        if ready is None:
            return False
        if self._amp() == (None, None) and ready.make(self.param_groups, self.state, self._masks):
            self._ready = ready
            return True
        self._versions = ready.versions()
        return False

    def _amp(self) -> Amp:
        return Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _look(self) -> Look:
        prepared = self._prepared
        return look(self.param_groups, self.state, self._masks, prepared.parameters, prepared.watched)

    def _prepare(self) -> None:
        for group in self.param_groups:
            _check_correction(group["correction"])
            self._check_auto(group)
        names = self._names()
        self._check_masks(names)
        backend_for = partial(kernels.backend_for, self._backend_name)
        self._prepared = prepare(
            self.param_groups,
            self.state,
            self._masks,
            names,
            backend_for,
            self._feeding_norm or (),
            self._warned,
            self._prepared,
            self._versions,
        )

    def _make_step(self, gradients: Gradients) -> None:
        """Update what is prepared, unless the host knows that AMP skips the step."""
        prepared, batches = self._prepared, self._prepared.batches
        amp = self._amp()
        # Whether a first step with dampening was made decides on the next one: it is worth waiting for.
        if amp.found_inf is not None and (prepared.on_host or prepared.is_first_step):
            if amp.found_inf.item() != 0:  # a sum over devices: may exceed 1
                return
            amp = amp._replace(found_inf=None)
        inputs = [inputs_of(batch, prepared, gradients, self.param_groups, amp) for batch in batches]
        limits = [group["max_grad_norm"] for group in self.param_groups]
        if batches and limits.count(None) < len(limits):
            inputs = limit_norm(batches, inputs, limits, prepared.on_host)
        for batch, own in zip(batches, inputs, strict=True):
            batch.plan.step(own)
        # Kernels write through pointers: autograd must still notice a weight that changed under it.
        increment_version(prepared.updated)
        for p, buffer in prepared.new_buffers.items():
            self.state[p]["momentum_buffer"] = buffer

    @classmethod
    def _leave_out_of_graphs(cls) -> None:
        """Let ``torch.compile`` break its graph once at a step, in which there is nothing for it.

        Not when the class is defined: that would import the compiler, which constructing any optimizer of
        PyTorch does, but importing this package need not.
        """
        if not hasattr(cls, "_uncompiled_update"):
            cls._uncompiled_update = torch.compiler.disable(cls._update)  # type: ignore[no-untyped-call]

    def _check_auto(self, group: dict[str, Any]) -> None:
        if group["correction"] == "auto" and self._feeding_norm is None:
            raise ValueError(
                "correction is 'auto', but which layers feed a batch norm is not known: make SparseOpt with "
                "feeding_norm=sk.layers_feeding_norm(model, example_input)"
            )

    def _check_masks(self, names: Mapping[Tensor, str]) -> None:
        for parameter, mask in self._masks.items():
            if parameter not in names:
                raise ValueError(
                    f"masks has a mask for {_mask_owner(self._masks, parameter)}, "
                    "which is not among the optimizer's parameters"
                )
            check_mask(mask, parameter, names[parameter])

    def _names(self) -> dict[Tensor, str]:
        """What error messages call each parameter."""
        names: dict[Tensor, str] = {}
        for i, group in enumerate(self.param_groups):
            for j, parameter in enumerate(group["params"]):
                names[parameter] = f"param_groups[{i}]['params'][{j}]"
            names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        if isinstance(self._masks, Masks):
            names.update({p: name for name, p in self._masks.named().items() if p in names})
        return names

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_masks", "_backend_name", "_feeding_norm", "_warned")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # From load_state_dict, groups may be those of torch.optim.SGD, of any age: what it has no word for
        # stays as it is.
        former = self.__dict__.get("param_groups")
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            for key, default in self.defaults.items():
                group.setdefault(key, former[i][key] if former else default)
        self._snapshot = self._versions = self._ready = None
        if former is None:  # a copy: load_state_dict does not change which parameters had a gradient
            self._prepared = NOTHING
        self._leave_out_of_graphs()


def _mask_owner(masks: Mapping[Parameter, Tensor], parameter: Tensor) -> str:
    if isinstance(masks, Masks):
        return next(repr(name) for name, p in masks.named().items() if p is parameter)
    if not isinstance(parameter, Tensor):
        return f"{parameter!r}"
    return f"a parameter of shape {tuple(parameter.shape)}"


def _parameters_in(feeding_norm: Mapping[str, Parameter]) -> set[Parameter]:
    if not isinstance(feeding_norm, Mapping):
        raise TypeError(
            f"feeding_norm is a {type(feeding_norm).__name__}, it must be a mapping from name to "
            "parameter, as layers_feeding_norm returns it"
        )
    for name, parameter in feeding_norm.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"feeding_norm[{name!r}] is a {type(parameter).__name__}, it must be a parameter of the model"
            )
    return set(feeding_norm.values())


def _check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError``, naming the hyperparameter, unless all of them are valid."""
    for name in ("masks", "feeding_norm", "backend"):
        if name in group:
            raise ValueError(f"a parameter group has {name!r}: that is one for the whole optimizer")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements, it must have one")
    for name in ("lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta"):
        value = group[name]
        if not (_is_number(value) and math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} is {value!r}, it must be a finite number >= 0")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={group['momentum']} and dampening={group['dampening']}: "
            "it requires momentum > 0 and dampening = 0"
        )
    limit = group["max_grad_norm"]
    if limit is not None and not (_is_number(limit) and limit > 0):
        raise ValueError(f"max_grad_norm is {limit!r}, it must be a number > 0, or None for no limit")
    _check_correction(group["correction"])
    if group["differentiable"]:
        raise RuntimeError("differentiable=True is not supported: the step is not differentiable")
    if group["foreach"] and group["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Tensor)) or hasattr(value, "__float__")


def _check_correction(correction: str) -> None:
    if correction not in _CORRECTIONS:
        raise ValueError(f"correction is {correction!r}, it must be one of {_CORRECTIONS}")
