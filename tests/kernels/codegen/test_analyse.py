"""Reading machine code, on disassemblies small enough to count by hand."""

from __future__ import annotations

import pytest

from moray.kernels.codegen import MachineCode, analyse


def read(listing: str) -> MachineCode:
    """Analyse a listing: a line that ends in a colon is a label, any other an instruction."""
    lines = ["\t.section\t.text.kernel", ".text.kernel:"]
    address = 0
    for line in listing.strip().splitlines():
        if line.strip().endswith(":"):
            lines.append(line.strip())
            continue
        lines.append(f"        /*{address:04x}*/                   {line.strip()} ;")
        address += 16
    return analyse(lines, registers=40, shared_memory=1024)


def test_without_a_loop_everything_counts() -> None:
    code = read("""
        S2R R0, SR_TID.X
        FADD R1, R0, R0
        @P0 EXIT
        STG.E [R2.64], R1
        EXIT
    """)
    assert code == MachineCode(
        registers=40, shared_memory=1024, spills=0, instructions=5, loop_instructions=5, tensor_core=()
    )


def test_padding_and_the_trap_after_the_exit_do_not_count() -> None:
    code = read("""
        MOV R1, R2
        EXIT
        .L_x_0:
        BRA `(.L_x_0)
        NOP
        NOP
    """)
    assert (code.instructions, code.loop_instructions) == (2, 2)


def test_a_branch_forward_is_no_loop() -> None:
    code = read("""
        @P0 BRA `(.L_x_0)
        MOV R1, R2
        .L_x_0:
        EXIT
    """)
    assert (code.instructions, code.loop_instructions) == (3, 3)


@pytest.mark.parametrize("guard", ["@P0", "@!P0", "@UP1", "@!UPT"])
def test_a_loop_ends_with_its_branch(guard: str) -> None:
    code = read(f"""
        MOV R1, R2
        .L_x_0:
        IADD3 R1, R1, 1, RZ
        ISETP.NE.AND P0, PT, R1, 7, PT
        {guard} BRA `(.L_x_0)
        EXIT
    """)
    assert (code.instructions, code.loop_instructions) == (5, 3)


def test_a_branch_of_the_whole_program_to_itself_is_a_loop_only_with_a_body() -> None:
    code = read("""
        .L_x_0:
        BRA `(.L_x_0)
        MOV R1, R2
        EXIT
    """)
    assert code.loop_instructions == 3, "the whole kernel: waiting is no loop"


def test_of_nested_loops_the_inner_one_counts() -> None:
    code = read("""
        .L_x_0:
        MOV R1, R2
        MOV R1, R2
        MOV R1, R2
        .L_x_1:
        FADD R1, R1, R1
        @P1 BRA `(.L_x_1)
        @P0 BRA `(.L_x_0)
        EXIT
    """)
    assert code.loop_instructions == 2


def test_of_two_loops_the_one_with_more_tensor_core_instructions_counts() -> None:
    code = read("""
        .L_x_0:
        MOV R1, R2
        MOV R1, R2
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        MOV R1, R2
        @P0 BRA `(.L_x_0)
        .L_x_1:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    assert code.loop_instructions == 3
    assert code.tensor_core == ("HMMA.16816.F32.BF16",)


def test_of_two_loops_without_tensor_cores_the_longer_one_counts() -> None:
    code = read("""
        .L_x_0:
        MOV R1, R2
        @P0 BRA `(.L_x_0)
        .L_x_1:
        MOV R1, R2
        MOV R1, R2
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    assert code.loop_instructions == 3


def test_spills_are_counted_wherever_they_are() -> None:
    code = read("""
        STL.64 [R1+0x10], R2
        .L_x_0:
        LDL R3, [R1+0x10]
        LDS R4, [R5]
        STS [R5], R4
        LDG.E R6, [R8.64]
        @P0 LDL.LU R3, [R1]
        @P0 BRA `(.L_x_0)
        EXIT
    """)
    assert code.spills == 3
    assert code.loop_instructions == 6


@pytest.mark.parametrize(
    "instruction",
    [
        "HMMA.1688.F32.TF32",
        "IMMA.16832.S8.S8",
        "QMMA.16832.F32.E4M3.E4M3",
        "HGMMA.64x16x16.F32.BF16",
        "QGMMA.64x16x32.F32.E4M3.E4M3",
        "UTCHMMA",
        "UTCQMMA",
        "UTCQMMA.2CTA",
        "OMMA.SF.16864",
    ],
)
def test_tensor_core_instructions_are_known_by_name(instruction: str) -> None:
    code = read(f"{instruction} R4, R8, R12, R4\n@P0 {instruction} R4, R8, R12, R4\nFFMA R1, R2, R3, R1\nEXIT")
    (found,) = code.tensor_core
    assert instruction.startswith(found)


@pytest.mark.parametrize("instruction", ["FFMA", "HFMA2.MMA", "LDSM.16.M88.4", "UTCBAR", "WARPGROUP.DEPBAR.LE"])
def test_others_are_not(instruction: str) -> None:
    assert read(f"{instruction} R1, R2\nEXIT").tensor_core == ()


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no instructions"):
        read("")
