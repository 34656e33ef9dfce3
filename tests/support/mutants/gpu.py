"""Mistakes in the host code of the GPU backends: where kernels are launched, what is kept for whom, which
kernel suits memory. No GPU is needed to see them."""

from __future__ import annotations

from mutants.mutant import Mutant

_CUDA, _DEVICE = "kernels/gpu/cuda.py", "kernels/gpu/device.py"
_PLAN, _TABLES, _TRITON = "kernels/gpu/plan.py", "kernels/gpu/tables.py", "kernels/gpu/triton.py"
_PLACES = "gpu/test_streams_and_devices.py"
_WHERE = f"{_PLACES}::test_a_step_is_on_the_device_of_its_tensors_and_the_stream_of_its_caller"
_PROGRAMS = f"{_PLACES}::test_programs_that_share_out_the_work_are_as_many_as_fit"

GPU = {
    # Streams.
    "cuda-step-on-the-default-stream": Mutant(
        _CUDA,
        "        address_of(inputs.found_inf),\n        current_stream(launch.table.device),",
        "        address_of(inputs.found_inf),\n        0,",
        f"{_WHERE}[cuda]",
    ),
    "cuda-norm-on-the-default-stream": Mutant(
        _CUDA, "sums.data_ptr(), current_stream(device))", "sums.data_ptr(), 0)", f"{_WHERE}[cuda]"
    ),
    "cuda-lists-on-the-default-stream": Mutant(
        _CUDA,
        "stream = current_stream(listing.table.device)\n        _cuda.list_sectors",
        "stream = 0\n        _cuda.list_sectors",
        f"{_WHERE}[cuda]",
    ),
    "triton-on-the-default-stream": Mutant(
        _TRITON,
        "(*arguments, *constants.values())",
        "(*arguments, *constants.values(), stream=0)",
        f"{_WHERE}[triton]",
    ),
    "stream-of-the-current-device": Mutant(
        _DEVICE,
        "    stream = getattr(torch, device.type).current_stream(device)\n    return int",
        "    stream = getattr(torch, device.type).current_stream(None)\n    return int",
        "gpu/test_device.py::test_the_current_stream_is_a_number",
    ),
    "streams-of-intel-taken-for-nvidias": Mutant(
        _DEVICE,
        'stream.cuda_stream if device.type == "cuda" else stream.sycl_queue',
        "stream.cuda_stream",
        "gpu/test_device.py::test_the_current_stream_is_a_number",
    ),
    "allocator-told-of-the-current-devices-stream": Mutant(
        _DEVICE,
        "current_stream(self._device)\n            for",
        "current_stream(None)\n            for",
        "gpu/test_device.py::test_the_stream_that_is_told_of_is_that_of_the_memory",
    ),
    "allocator-not-told-of-the-default-stream": Mutant(
        _DEVICE,
        '{0} if device.type == "cpu" else set[int]()',
        "{0}",
        "gpu/test_device.py::test_other_streams_are_told_of_once",
    ),
    "allocator-not-told-of-a-new-mask": Mutant(
        _PLAN,
        "with_mask=bool(new)",
        "with_mask=False",
        f"{_PLACES}::test_a_mask_is_kept_for_the_stream_of_the_step",
    ),
    "allocator-told-of-tables-alone": Mutant(
        _TABLES,
        "[t for launch in self.launches for t in launch if isinstance(t, Tensor)]",
        "[launch.table for launch in self.launches]",
        "gpu/test_tables.py::test_all_memory_of_launches_is_theirs",
    ),
    # Devices.
    "norm-on-the-current-device": Mutant(
        _PLAN,
        "        with device_guard(self._device):\n            if over ==",
        "        if True:\n            if over ==",
        f"{_WHERE}[cuda]",
    ),
    "step-on-the-current-device": Mutant(
        _PLAN,
        "        # All of it: whether a graph is captured is a question to a stream of this device.\n"
        "        with device_guard(self._device):\n",
        "        if True:\n",
        f"{_WHERE}[cuda]",
    ),
    "lists-on-the-current-device": Mutant(
        _PLAN, "            with device_guard(device):", "            if True:", f"{_WHERE}[cuda]"
    ),
    "a-capture-on-the-current-device-refused": Mutant(
        _DEVICE,
        "    with device_guard(device):\n        if capturing():\n            raise",
        "    if capturing():\n        if True:\n            raise",
        f"{_PLACES}::test_captures_of_other_devices_do_not_matter",
    ),
    "kernels-loaded-on-the-current-device": Mutant(
        _PLAN,
        """
            if self._new:
                for i in self._new:
                    self._listed[i].forget_mask()
                self._new = []
                self._load_kernels(inputs)
""",
        """
        if self._new:
            for i in self._new:
                self._listed[i].forget_mask()
            self._new = []
            self._load_kernels(inputs)
""",
        f"{_WHERE}[triton]",
    ),
    "a-guard-that-is-where-tensors-are-made": Mutant(
        _DEVICE,
        "getattr(torch, device.type).device(device)",
        "torch.device(device)",
        "gpu/test_device.py::test_a_guard_makes_a_device_the_current_one",
    ),
    "multiprocessors-of-the-first-device": Mutant(
        _DEVICE,
        "get_device_properties(device)",
        "get_device_properties(0)",
        "gpu/test_device.py::test_multiprocessors_are_those_of_the_device",
    ),
    "kernels-of-one-device-for-all": Mutant(
        _TRITON,
        "key = (kernel, device, ",
        "key = (kernel, device.type, ",
        f"{_PLACES}::test_each_device_has_kernels_of_its_own",
    ),
    "kernels-of-one-group-for-any-number": Mutant(
        _TRITON,
        "0 if rules is None else len(rules), *constants",
        "*constants",
        f"{_PLACES}::test_each_number_of_groups_has_kernels_of_its_own",
    ),
    # Programs.
    "programs-not-shared-out": Mutant(
        _TRITON, "rules.arguments, True)", "rules.arguments)", f"{_PROGRAMS}[72-28]"
    ),
    "programs-whatever-their-registers": Mutant(
        _TRITON,
        "fit = max(1, min(PROGRAMS, REGISTERS // (registers * _WARP)))",
        "fit = PROGRAMS",
        f"{_PROGRAMS}[72-28]",
    ),
    "registers-of-a-kernel-that-is-not-loaded": Mutant(
        _TRITON, "    compiled[1, 1, 1]  # loads it", "    # loads it", f"{_PROGRAMS}[72-28]"
    ),
    "a-program-of-the-norm-for-each-chunk": Mutant(
        _TRITON,
        "min(launch.most_chunks, PROGRAMS * multiprocessors(launch.table.device))",
        "launch.most_chunks",
        f"{_PROGRAMS}[72-28]",
    ),
    # Uploads.
    "uploads-from-memory-that-is-not-pinned": Mutant(
        _DEVICE,
        "if capturing() else values.pin_memory()",
        "if capturing() else values",
        "gpu/test_uploads.py::test_an_upload_is_from_pinned_memory_and_does_not_wait",
    ),
    "uploads-that-wait": Mutant(
        _DEVICE,
        "copy_(values, non_blocking=True)",
        "copy_(values)",
        "gpu/test_uploads.py::test_an_upload_is_from_pinned_memory_and_does_not_wait",
    ),
    "reserved-memory-that-is-not-pinned": Mutant(
        _DEVICE,
        'device="cpu", pin_memory=True)',
        'device="cpu")',
        "gpu/test_uploads.py::test_pinned_memory_is_asked_for",
    ),
    "uploads-of-graphs-not-kept": Mutant(
        _DEVICE,
        "    keep_for_graph(values)\n    return",
        "    return",
        "gpu/test_uploads.py::test_what_a_graph_copies_from_is_kept",
    ),
    "uploads-of-graphs-not-aligned": Mutant(
        _DEVICE,
        "-(-values.nbytes // _ALIGNMENT) * _ALIGNMENT",
        "values.nbytes",
        "gpu/test_uploads.py::test_what_graphs_copy_from_is_aligned",
    ),
    "pinned-memory-of-one-device-for-all": Mutant(
        _DEVICE,
        "_staging.get(device), sum(",
        "next(iter(_staging.values()), None), sum(",
        "gpu/test_uploads.py::test_each_device_has_pinned_memory",
    ),
    "pinned-memory-for-plans-that-are-gone": Mutant(
        _DEVICE,
        "_wanted.setdefault(device, WeakKeyDictionary())",
        "_wanted.setdefault(device, {})",
        "gpu/test_uploads.py::test_memory_is_pinned_for_owners_that_live",
    ),
    # Tables.
    "numbers-of-32-bits-for-one-weight-too-many": Mutant(
        _TABLES,
        "param.parameter.numel() >= _WIDE",
        "param.parameter.numel() > _WIDE",
        "gpu/test_tables.py::test_numbers_have_64_bits_from_2_to_the_31_weights_on",
    ),
    "vectors-at-8-bytes": Mutant(
        _TABLES,
        "_ALIGNMENT = 16",
        "_ALIGNMENT = 8",
        "gpu/test_tables.py::test_vectors_need_16_bytes[both-2-False]",
    ),
    "vectors-of-momentum-anywhere": Mutant(
        _TABLES,
        "param.parameter.data_ptr() | address_of(param.momentum_buffer)",
        "param.parameter.data_ptr()",
        "gpu/test_tables.py::test_vectors_need_16_bytes[buffer-1-False]",
    ),
    # The norm.
    "sums-of-programs-added-in-float32": Mutant(
        _PLAN,
        ".sum(dtype=torch.float64)",
        ".sum()",
        "gpu/test_norm_precision.py::test_sums_of_programs_are_added_in_float64",
    ),
    "sums-of-launches-added-in-float32": Mutant(
        _PLAN,
        "total = torch.zeros((), dtype=torch.float64, device=self._device)",
        "total = torch.zeros((), device=self._device)",
        "gpu/test_norm_precision.py::test_sums_of_programs_are_added_in_float64",
    ),
    "the-norm-of-the-last-launch": Mutant(
        _PLAN,
        "total += self._kernels",
        "total = self._kernels",
        "gpu/test_norm_precision.py::test_sums_of_programs_are_added_in_float64",
    ),
    # The norm over all positions.
    "gpu-dense-norm-without-factors": Mutant(
        "kernels/gpu/dense_norm.py",
        "        if own is not None:",
        "        if False:",
        "gpu/test_dense_norm.py",
    ),
    "gpu-dense-norm-with-the-mask": Mutant(
        "kernels/gpu/dense_norm.py",
        "neurons = gradient.reshape(",
        "neurons = (gradient * param.mask).reshape(",
        "gpu/test_dense_norm.py",
    ),
}
