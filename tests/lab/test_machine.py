"""The name of a machine: processors that call themselves the same are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseopt_kernels.lab.machine import machine, machine_of


def x86(vendor: str, family: int, model: int, name: str, cores: int = 2) -> str:
    core = (
        "processor\t: {}\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: {}\nstepping\t: 1\n"
    )
    return "\n".join(core.format(i, vendor, family, model, name) for i in range(cores))


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "want"),
    [
        ("AuthenticAMD", 25, 1, "AMD EPYC", "AMD EPYC (Zen 3), 2 cores"),
        ("AuthenticAMD", 25, 17, "AMD EPYC", "AMD EPYC (Zen 4), 2 cores"),
        ("AuthenticAMD", 26, 2, "AMD EPYC", "AMD EPYC (Zen 5), 2 cores"),
        ("AuthenticAMD", 27, 8, "AMD EPYC", "AMD EPYC (family 27 model 8), 2 cores"),
        (
            *("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor"),
            "Intel Xeon (Sapphire Rapids), 2 cores",
        ),
        (
            *("GenuineIntel", 6, 207, "INTEL(R) XEON(R) PLATINUM 8592+"),
            "INTEL XEON PLATINUM 8592+ (Emerald Rapids), 2 cores",
        ),
        (
            "GenuineIntel",
            6,
            79,
            "Intel(R) Xeon(R) CPU E5-2673 v4 @ 2.30GHz",
            "Intel Xeon E5-2673 v4 (family 6 model 79), 2 cores",
        ),
        ("CentaurHauls", 25, 1, "VIA", "VIA (family 25 model 1), 2 cores"),
    ],
)
def test_an_x86_processor(vendor: str, family: int, model: int, name: str, want: str) -> None:
    assert machine_of(x86(vendor, family, model, name)) == want


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ("fpu avx512f avx512_fp16 amx_tile amx_bf16", "Sapphire Rapids or later"),
        ("fpu avx512f avx512_fp16 amx_tile amx_fp16", "Granite Rapids or later"),
        ("fpu avx512f", "family 6 model 167"),
    ],
)
def test_instructions_tell_what_a_virtual_machine_hides(flags: str, want: str) -> None:
    core = x86("GenuineIntel", 6, 167, "Intel(R) Xeon(R) Processor", 1) + f"flags\t\t: {flags}\n"
    assert machine_of(core) == f"Intel Xeon ({want}), 1 core"


def test_known_numbers_count_more_than_instructions() -> None:
    core = x86("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Processor") + "flags\t\t: amx_tile avx512_fp16\n"
    assert machine_of(core) == "Intel Xeon (Sapphire Rapids), 2 cores"


def test_cores_are_counted() -> None:
    assert machine_of(x86("AuthenticAMD", 25, 1, "AMD EPYC", cores=16)) == "AMD EPYC (Zen 3), 16 cores"


def test_an_arm_processor_has_no_name_of_its_own() -> None:
    core = "processor\t: {}\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
    text = "\n".join(core.format(i) for i in range(4))
    assert machine_of(text) == "ARM (implementer 0x41 part 0xd0c), 4 cores"


@pytest.mark.parametrize("text", ["", "processor\t: 0\n", "no colon at all"])
def test_a_text_without_a_processor(text: str) -> None:
    with pytest.raises(ValueError, match="no processor"):
        machine_of(text)


def test_without_cpuinfo_there_is_a_name_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine().endswith((" cores", " core"))
