"""The search for the weights that feed a batch norm, in the graph that ``torch.export`` makes of a model.

Nothing here knows masks or optimizers. Each layer's output is replaced by a tensor that holds, for each
element, the number of its neuron. Operations that only move elements are carried out on these tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.parameter import Parameter

# Operations by their names in the graph, and the number of last dimensions that they work on.
_SPATIAL = {f"conv{n}d": n for n in (1, 2, 3)}
_SPATIAL_TRANSPOSED = {f"conv_transpose{n}d": n for n in (1, 2, 3)}
_POOL_KINDS = ("max", "avg", "adaptive_max", "adaptive_avg")
_POOLED = {f"{kind}_pool{n}d": n for n in (1, 2, 3) for kind in _POOL_KINDS}
# fmt: off
_MOVE = frozenset((
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "mT",
    "movedim", "swapaxes", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind",
    "getitem", "cat", "stack", "expand", "repeat", "flip", "roll", "pixel_shuffle", "channel_shuffle",
))
_KEEP = frozenset((
    "alias", "clone", "contiguous", "to", "_to_copy",
    "dropout", "dropout_", "feature_dropout", "feature_dropout_",
))
# fmt: on
_NO_USE = frozenset({"_assert_tensor_metadata"})
_NO_NEURON = -1  # for elements that are no output of a layer


def layers_feeding_norm(model: nn.Module, example_input: Any) -> dict[str, Parameter]:
    """Return the weights of the layers whose output goes into a batch norm and nowhere else.

    These are the weights that Eq. 12 is derived for. A weight is returned if:

    - its layer is linear or convolutional, transposed or not, a module or a call of ``torch.nn.functional``;
    - the output goes into a batch norm that uses the statistics of the batch, and each channel of that batch
      norm holds one neuron. (A ``Linear`` whose output ``(N, T, F)`` goes into ``BatchNorm1d(T)`` has
      several neurons in a channel, and is left out.)
    - between layer and batch norm there is nothing but operations that keep neurons apart and keep each
      neuron's output proportional to its weights: adding one number per neuron, dropout, average and maximum
      pooling, and changes of shape, of order (flatten, permute, concatenate, split) and of floating-point
      type. (After a bias, dropout and padded average pooling are only nearly proportional.)
    - the output goes nowhere else, and this is so for every use of the weight.

    So layers are left out if an activation, another norm or a sum of layers comes before the batch norm.

    ``torch.export`` traces the model without computing anything: buffers and random state do not change. This
    takes from a second to a minute. Pass the model itself, before ``torch.compile`` and
    ``DistributedDataParallel``; its parameters stay the same.

    Args:
        model: a model in training mode. A batch norm in evaluation mode does not count.
        example_input: an input of the usual shape, on the model's device; a tuple if ``model`` takes several
            arguments. A batch of two is enough; a larger one takes longer.

    Returns:
        The weights by their name in the model, in model order, for ``feeding_norm`` of :class:`SparseOpt`.

    Raises:
        ValueError: the model is in evaluation mode, in which batch norm does not use the batch's statistics.
        RuntimeError: ``torch.export`` cannot trace the model with this input (its control flow depends on
            values, say), or a batch norm is under an ``autocast`` or ``no_grad`` within ``forward``, where it
            cannot be followed. The message says why, and how to name the layers by hand.
    """
    if not model.training:
        raise ValueError(
            "model is in evaluation mode, in which batch norm does not use the statistics of the batch: "
            "call model.train() first"
        )
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        program = torch.export.export(model, arguments, strict=False)
    except Exception as error:  # of any type: the model's own code runs
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise _not_traced(model, f"torch.export says: {reason}") from error
    if any(_has_batch_norm(part) for part in program.graph_module.children()):
        raise _not_traced(
            model, "a batch norm is under an autocast or no_grad, or in a branch, in its forward"
        )
    names = program.graph_signature.inputs_to_parameters
    search = _Search({name: model.get_parameter(path) for name, path in names.items()})
    for node in program.graph.nodes:
        search.look_at(node)
    return {name: p for name, p in model.named_parameters() if search.feeds_norm(p)}


def _not_traced(model: nn.Module, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{type(model).__name__} cannot be traced with this example_input: {reason}\n"
        "Without a trace, name the layers by hand: correction='layer' in the parameter group of the weights "
        "that feed a batch norm, correction='none' in that of the others"
    )


def _has_batch_norm(part: nn.Module) -> bool:
    graphs = [m.graph for m in part.modules() if isinstance(m, GraphModule)]
    return any(_name(node) == "batch_norm" for graph in graphs for node in graph.nodes)


class _Layer(NamedTuple):
    """The use of a parameter as the weight of a layer."""

    is_transposed: bool
    neurons: range
    """The numbers of its neurons; no two layers have a number in common."""


class _Search:
    """The search through a graph, node by node."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters  # by the name of their placeholder
        self._numbers: dict[Node, Any] = {}  # the neuron of each element, for nodes made of layers' outputs
        self._layers: dict[Parameter, _Layer] = {}
        self._count = 0
        self._in_norm: set[int] = set()
        self._elsewhere: set[int] = set()
        self._misused: set[Parameter | None] = set()

    def feeds_norm(self, parameter: Parameter) -> bool:
        layer = self._layers.get(parameter)
        if layer is None or parameter in self._misused:
            return False
        return self._in_norm.issuperset(layer.neurons) and self._elsewhere.isdisjoint(layer.neurons)

    def look_at(self, node: Node) -> None:
        """Record where a node sends the outputs of layers, and the neuron numbers of its own output."""
        if node.op in ("placeholder", "get_attr"):
            return
        name = _name(node)
        if name in ("linear", *_SPATIAL, *_SPATIAL_TRANSPOSED):
            self._look_at_layer(node, name)
            return
        self._misused |= {self._parameter(source) for source in node.all_input_nodes}
        sources = [source for source in node.all_input_nodes if source in self._numbers]
        if not sources or name in _NO_USE:
            return
        if name == "batch_norm" and node.args[5] and sources == [node.args[0]]:  # by the batch's statistics
            self._enter_norm(self._numbers[sources[0]])
            return
        made = self._made(node, name, sources)
        if made is None:
            for source in sources:
                self._elsewhere |= _neurons_in(self._numbers[source])
        else:
            self._numbers[node] = made

    def _look_at_layer(self, node: Node, name: str) -> None:
        for source in node.all_input_nodes:
            self._elsewhere |= _neurons_in(self._numbers.get(source))
        weight = node.args[1]
        parameter = self._parameter(weight)
        others = {self._parameter(source) for source in node.all_input_nodes if source is not weight}
        self._misused |= others
        if parameter is None:
            return
        shape, is_transposed = node.meta["val"].shape, name in _SPATIAL_TRANSPOSED
        dim = len(shape) - 1 - {**_SPATIAL, **_SPATIAL_TRANSPOSED}.get(name, 0)
        neurons = range(self._count, self._count + shape[dim])
        layer = self._layers.setdefault(parameter, _Layer(is_transposed, neurons))
        self._count = max(self._count, layer.neurons.stop)
        if layer.is_transposed != is_transposed:  # its rows are neurons here, its columns there
            self._misused.add(parameter)
            return
        along = [-1 if i == dim else 1 for i in range(len(shape))]
        self._numbers[node] = torch.tensor(layer.neurons, dtype=torch.int32).view(along).expand(shape)

    def _parameter(self, value: object) -> Parameter | None:
        return self._parameters.get(value.name) if isinstance(value, Node) else None

    def _made(self, node: Node, name: str, sources: Sequence[Node]) -> Any:
        """Return the neuron numbers of a node's output, or None if it mixes or changes outputs of layers."""
        numbers = self._numbers[sources[0]]
        if name in _MOVE:
            return self._moved(node)
        if name in _KEEP:
            return numbers
        if name in _POOLED:
            return _pooled(numbers, range(-_POOLED[name], 0), node.meta["val"])
        if name == "mean" and len(node.args) > 1:
            dims = cast("list[int]", node.args[1])
            return _pooled(numbers, dims, node.meta["val"], keepdim=len(node.args) > 2 and bool(node.args[2]))
        if name == "add" and len(node.args) == 2 and len(sources) == 1:
            addend = self._parameter(node.args[1] if node.args[0] is sources[0] else node.args[0])
            return numbers if addend is not None and _is_one_per_neuron(addend, numbers) else None
        return None

    def _moved(self, node: Node) -> Any:
        """Apply a node that only moves elements to the neuron numbers of its inputs."""

        def numbers_of(source: Node) -> Any:
            if source in self._numbers:
                return self._numbers[source]
            return torch.full(source.meta["val"].shape, _NO_NEURON, dtype=torch.int32)

        arguments = map_arg((node.args, node.kwargs), numbers_of)
        return cast("Callable[..., Any]", node.target)(*arguments[0], **arguments[1])

    def _enter_norm(self, numbers: Tensor) -> None:
        channels = [i for i in range(numbers.ndim) if i != 1]
        low, high = numbers.amin(dim=channels), numbers.amax(dim=channels)
        alone = low == high
        self._in_norm |= _neurons_in(low[alone])
        self._elsewhere |= _neurons_in(numbers[:, ~alone])


def _name(node: Node) -> str:
    """Return the name of a node's operation, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.").partition(".")[0]  # "aten.split.Tensor"
    return "getitem" if target is operator.getitem else str(target)


def _neurons_in(numbers: Any) -> set[int]:
    """Return the neurons that occur in a tensor of numbers, or in any of several."""
    if isinstance(numbers, Tensor):
        return set(torch.unique(numbers).tolist()) - {_NO_NEURON}
    return set().union(*map(_neurons_in, numbers or ()))


def _pooled(numbers: Tensor, dims: Sequence[int], made: Any, keepdim: bool = True) -> Any:
    """Return the neuron numbers of pooling's output, or None if it mixes neurons.

    Max pooling may return indices as well; ``made`` is a tuple then, and so is the result.
    """
    low, high = numbers.amin(dim=tuple(dims), keepdim=keepdim), numbers.amax(dim=tuple(dims), keepdim=keepdim)
    if not torch.equal(low, high):
        return None
    if isinstance(made, Tensor):
        return low.expand(made.shape)
    return low.expand(made[0].shape), torch.full(made[1].shape, _NO_NEURON, dtype=torch.int32)


def _is_one_per_neuron(addend: Tensor, numbers: Tensor) -> bool:
    """Tell whether a parameter that is added to a layer's output adds one number per neuron."""
    positions = torch.arange(addend.numel()).view(addend.shape)
    try:
        positions = positions.expand(numbers.shape)
    except RuntimeError:  # the sum has another shape than the values
        return False
    pairs = torch.stack([numbers.flatten(), positions.flatten()])
    return len(torch.unique(pairs, dim=1)[0]) == len(torch.unique(numbers))
