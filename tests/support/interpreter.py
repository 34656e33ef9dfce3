"""Triton's interpreter, made fast enough for thousands of steps. Imported only where TRITON_INTERPRET is set.

The interpreter calls device functions of ours as it calls kernels: it patches all of ``triton.language``
first, which takes longer than most of them. Within one launch once is enough. And it works out the type of
each result anew: once for each type and shape is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from sparseopt_kernels.kernels.contract import Rule
from sparseopt_kernels.kernels.gpu import triton as triton_backend

# A program costs milliseconds here, whatever it does: few programs with much each, instead of many.
# gpu/test_backends.py has the true tiles.
TEST_TILES = {"chunk": 2048, "list_rows": 64, "rows": 64, "units": 32}


_patch_lang = interpreter._patch_lang
_within: list[frozenset[int]] = []
_for_good: set[frozenset[int]] = set()  # what a device function has patched stays patched


class _Launch:
    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def restore(self) -> None:
        _within.pop()
        self._scope.restore()


def _patch_once(fn: Any) -> Any:
    modules = frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)
    if not _within:
        _within.append(modules)
        return _Launch(_patch_lang(fn))
    if modules not in (_within[0], *_for_good):
        _for_good.add(modules)
        _patch_lang(fn)
    return None


TRUE_TILES = {name: getattr(triton_backend.TritonKernels, name) for name in TEST_TILES}


_argument = triton_backend._argument


def _float32_argument(rule: Rule, tensors: list[Tensor]) -> triton_backend.RuleArgument:
    """Numbers reach a GPU as float32. The interpreter takes what float32 cannot hold for a float64."""
    given = _argument(rule, tensors)
    return triton_backend.RuleArgument(*(float(np.float32(x)) for x in given))


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_in_steps(builder: Any, source: Any, dtype: Any) -> Any:
    """The interpreter takes a subnormal number for a float64, too, and has no way from there to bfloat16."""
    if source.dtype.scalar == tl.float64 and dtype.scalar == tl.bfloat16:
        source = _cast(builder, source, tl.float32)
    return _cast(builder, source, dtype)


_np_dtype = interpreter._get_np_dtype
_make_type, _make_tensor = tl.block_type.__init__, tl.tensor.__init__
_np_dtypes: dict[str, Any] = {}
_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_tensors: dict[str, dict[str, Any]] = {}


def _np_dtype_once(dtype: Any) -> Any:
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _np_dtype(dtype)
    return _np_dtypes[dtype.name]


# A name tells types and shapes apart, and const pointers from others; all pointers are of one address space.
def _type_once(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _types:
        _make_type(self, element_ty, shape)
        _types[key] = dict(self.__dict__)
    self.__dict__.update(_types[key])


def _tensor_once(self: Any, handle: Any, type: Any) -> None:
    if type.name not in _tensors:
        _make_tensor(self, None, type)
        _tensors[type.name] = dict(self.__dict__)
    self.__dict__.update(_tensors[type.name])
    self.handle, self.type = handle, type


def prepare() -> None:
    interpreter._get_np_dtype = _np_dtype_once
    tl.block_type.__init__, tl.tensor.__init__ = _type_once, _tensor_once
    triton_backend._argument = _float32_argument
    interpreter.InterpreterBuilder.cast_impl = _cast_in_steps
    interpreter._patch_lang = _patch_once
    for name, tile in TEST_TILES.items():
        setattr(triton_backend.TritonKernels, name, tile)
