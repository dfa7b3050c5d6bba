"""Sampling on the device: what `sampling.py` defines, token for token, without a sort and without waiting for the host.

A border (top-k's smallest logit, top-p's last token) is found by radix selection: logits become integers in their own
order, and eight passes narrow that integer by four bits each. A pass sums the weight of the tokens behind every value of
the next four bits: 1 a token for top-k, its probability mass in fixed point for top-p. Both are integers, so the sums are
exact in any order. A row is shared by many programs; each writes its own sums, and the next launch adds them up.

    _peak       largest logit of each part of a row, and where
    _weigh x 8  top-k's border              (left out where no row of the batch asks for it)
    _weigh x 8  top-p's border, after top-k (likewise)
    _draw       best token of each part: logit over temperature plus noise, among those that stay
    _pick       best token of each row, or -1
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .cases import Case, Work
from .exact_math import device_exp_of_negative, device_log
from .launch import Config, Kernel, kernel, launch

if TYPE_CHECKING:
    import triton.language as tl

MAX_VOCABULARY = (1 << 18) - 1
"""A row's total mass, at most 2**45 a token, must stay below 2**63."""

MASS_BITS = 45
"""Probability masses are integers in units of 2**-45 of the most likely token's."""

FIELDS = ("temperature", "top_k", "top_p", "min_p", "noise_key")
"""Columns of the table of rows: int64, or the bits of an fp64. A greedy row is all zeros."""

_COLUMNS = len(FIELDS)
_DIGITS, _VALUES = 8, 16
_PART = 2048
_R1_VOCABULARY = 129280


def choose(logits: torch.Tensor, table: torch.Tensor, *, sampled: bool, by_count: bool, by_mass: bool) -> torch.Tensor:
    """The chosen token of every row.

    Args:
        logits: [B, V] fp32, V at most `MAX_VOCABULARY`.
        table: [B, len(FIELDS)] int64, on the host.
        sampled: whether any row is not greedy; by_count, by_mass: whether any such row has a top-k or a top-p filter.

    Returns:
        token ids [B] (int32) on the logits' device, -1 where a row's largest logit is not finite.
    """
    rows, width = logits.shape
    device = logits.device
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    peak, weigh, draw, pick = _configs(width)
    parts = -(-width // _PART)
    grid = (rows, parts)
    peaks = torch.empty(rows, parts, dtype=torch.int64, device=device)
    chosen = torch.empty(rows, dtype=torch.int32, device=device)
    launch(_peak, grid, logits, logits.stride(0), width, peaks, config=peak)
    # Nothing below reads what was not written first: no memory needs clearing. `sums` is 131 KB a row of DeepSeek-R1's.
    scores = torch.empty(rows, parts if sampled else 0, dtype=torch.float64, device=device)
    tokens = torch.empty(rows, parts if sampled else 0, dtype=torch.int32, device=device)
    filters = [mass for mass, wanted in ((False, by_count), (True, by_mass)) if wanted]
    sums = torch.empty(2 if filters else 0, _DIGITS, rows, parts, _VALUES, dtype=torch.int64, device=device)
    found = torch.empty(2 if filters else 0, _DIGITS, rows, 2, dtype=torch.int64, device=device)
    shared = (logits, logits.stride(0), width, table, peaks, sums, found, rows)
    for mass in filters:
        for digit in range(_DIGITS):
            launch(_weigh, grid, *shared, digit, MASS=mass, config=weigh)
    if sampled:
        launch(_draw, grid, *shared, scores, tokens, config=draw)
    launch(_pick, (rows,), table, peaks, scores, tokens, chosen, parts, config=pick)
    return chosen


@kernel
def _mix(x: tl.tensor) -> tl.tensor:
    """`sampling._mix` on uint32, whose products wrap by themselves."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@kernel
def _ordered(bits: tl.tensor) -> tl.tensor:
    """The bits of fp32 values (int32) as integers in the values' order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@kernel
def _key(x: tl.tensor) -> tl.tensor:
    """fp32 values as int32 in the same order; both zeros are one."""
    return _ordered(tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True))


@kernel
def _peak(
    logits_ptr: tl.tensor,
    row_stride: tl.int64,
    width: tl.int32,
    peaks_ptr: tl.tensor,
    PART: tl.constexpr,
) -> None:
    """The largest key of one part of a row, above the complement of the first token that has it, in one int64."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    x = tl.load(logits_ptr + row * row_stride + token, mask=token < width, other=float("-inf"))
    key = tl.where(x != x, 0x7FFFFFFF, _key(x))  # above infinity, whatever its sign
    # The complement of a padding lane's token is smaller than that of every real one: it loses among equals.
    peak = tl.max((key.to(tl.int64) << 32) | (0x7FFFFFFF - token), axis=0)
    tl.store(peaks_ptr + row * tl.num_programs(1) + part, peak)


@kernel
def _row_peak(peaks_ptr: tl.tensor, row: tl.tensor, parts: tl.int32, PARTS: tl.constexpr) -> tl.tensor:
    """The largest of what `_peak` found in a row's parts."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(peaks_ptr + row * parts + part, mask=part < parts, other=-(2**63)), axis=0)


@kernel
def _whole(table_ptr: tl.tensor, row: tl.tensor, COLUMN: tl.constexpr, COLUMNS: tl.constexpr = _COLUMNS) -> tl.tensor:
    """An integer of a row's line in the table."""
    return tl.load(table_ptr + row * COLUMNS + COLUMN)


@kernel
def _number(table_ptr: tl.tensor, row: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """An fp64 of a row's line in the table."""
    return _whole(table_ptr, row, COLUMN).to(tl.float64, bitcast=True)


@kernel
def _below(x: tl.tensor, peak: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """How far fp32 logits lie below the row's largest, over temperature, in fp64."""
    largest = _ordered((peak >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    return (x.to(tl.float64) - largest.to(tl.float64)) / temperature


@kernel
def _mass(below: tl.tensor, BITS: tl.constexpr = MASS_BITS) -> tl.tensor:
    """Probability mass in fixed point, int64."""
    return tl.floor(device_exp_of_negative(below) * (2.0**BITS) + 0.5).to(tl.int64)


@kernel
def _narrowed(
    table_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    found_ptr: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    digit: tl.tensor,
    width: tl.int32,
    MASS: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    VALUES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What is known of a border (top-p's or top-k's) once `digit` of its digits are.

    Returns:
        those digits, and the weight wanted from the tokens that share them; -1 if that depends on a total not known yet.
    """
    zero = row * 0
    prefix = zero
    wanted = zero - 1 if MASS else tl.minimum(_whole(table_ptr, row, 1), width)
    if digit > 0:
        parts = tl.num_programs(1)
        last = _place(row, rows, digit - 1, MASS, DIGITS)
        prefix = tl.load(found_ptr + last * 2)
        wanted = tl.load(found_ptr + last * 2 + 1)
        part, value = tl.arange(0, PARTS)[:, None], tl.arange(0, VALUES)
        weights = tl.load(sums_ptr + (last * parts + part) * VALUES + value[None, :], mask=part < parts, other=0)
        sums = tl.sum(weights, axis=0)
        if wanted < 0:
            total = tl.sum(sums, axis=0)
            share = tl.ceil(_number(table_ptr, row, 2) * total.to(tl.float64)).to(tl.int64)
            wanted = tl.minimum(tl.maximum(share, 1), total)
        above = tl.sum(tl.where(value[None, :] > value[:, None], sums[None, :], 0), axis=1)
        chosen = (above < wanted) & (wanted <= above + sums)
        prefix = prefix * VALUES + tl.sum(tl.where(chosen, value, 0), axis=0)
        wanted -= tl.sum(tl.where(chosen, above, 0), axis=0)
    return prefix, wanted


@kernel
def _place(row: tl.tensor, rows: tl.tensor, digit: tl.tensor, MASS: tl.constexpr, DIGITS: tl.constexpr) -> tl.tensor:
    """Where in [filter, digit, row] a pass over a row keeps what it found."""
    return ((DIGITS if MASS else 0) + digit) * rows.to(tl.int64) + row


@kernel
def _weigh(
    logits_ptr: tl.tensor,
    row_stride: tl.int64,
    width: tl.int32,
    table_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    found_ptr: tl.tensor,
    rows: tl.int32,
    digit: tl.int32,
    MASS: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """For one part of a row: the weight of its tokens by the next digit, as far as their leading digits are the border's."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_k, top_p = _number(table_ptr, row, 0), _whole(table_ptr, row, 1), _number(table_ptr, row, 2)
    if (temperature > 0.0) & ((top_p < 1.0) if MASS else (top_k > 0)):
        floor = row * 0
        if MASS:
            peak = _row_peak(peaks_ptr, row, parts, PARTS)
            if top_k > 0:
                floor = _narrowed(
                    table_ptr, sums_ptr, found_ptr, row, rows, DIGITS, width, False, PARTS, DIGITS, VALUES
                )[0]
        prefix, wanted = _narrowed(table_ptr, sums_ptr, found_ptr, row, rows, digit, width, MASS, PARTS, DIGITS, VALUES)
        here = _place(row, rows, digit, MASS, DIGITS)
        if part == 0:
            tl.store(found_ptr + here * 2, prefix)
            tl.store(found_ptr + here * 2 + 1, wanted)
        value = tl.arange(0, VALUES)
        totals = tl.zeros((VALUES, CHUNK), dtype=tl.int64)
        for start in range(part * PART, tl.minimum((part + 1) * PART, width), CHUNK):
            token = start + tl.arange(0, CHUNK)
            x = tl.load(logits_ptr + row * row_stride + token, mask=token < width, other=0.0)
            key = _key(x).to(tl.int64) + 2**31
            rest = key >> (32 - (digit + 1) * (32 // DIGITS))
            counts = (token < width) & (rest >> (32 // DIGITS) == prefix) & (key >= floor)
            if tl.max(counts.to(tl.int32), axis=0) > 0:
                weight = counts.to(tl.int64)
                if MASS:
                    weight = tl.where(counts, _mass(_below(x, peak, temperature)), 0)
                is_value = (rest & (VALUES - 1)).to(tl.int32)[None, :] == value[:, None]
                totals += tl.where(is_value, weight[None, :], 0)
        tl.store(sums_ptr + (here * parts + part) * VALUES + value, tl.sum(totals, axis=1))


@kernel
def _draw(
    logits_ptr: tl.tensor,
    row_stride: tl.int64,
    width: tl.int32,
    table_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    found_ptr: tl.tensor,
    rows: tl.int32,
    scores_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """The best token of one part of a row after noise, and its score; of equals the first."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = _number(table_ptr, row, 0)
    if temperature > 0.0:
        top_k, top_p, min_p = _whole(table_ptr, row, 1), _number(table_ptr, row, 2), _number(table_ptr, row, 3)
        noise_key = _whole(table_ptr, row, 4).to(tl.uint32)
        peak = _row_peak(peaks_ptr, row, parts, PARTS)
        floor, border, wanted = row * 0, row * 0, row * 0
        earlier = row * 0  # mass of the tokens tied with top-p's border that come before this chunk
        if top_k > 0:
            floor = _narrowed(table_ptr, sums_ptr, found_ptr, row, rows, DIGITS, width, False, PARTS, DIGITS, VALUES)[0]
        if top_p < 1.0:
            border, wanted = _narrowed(
                table_ptr, sums_ptr, found_ptr, row, rows, DIGITS, width, True, PARTS, DIGITS, VALUES
            )
            last = _place(row, rows, DIGITS - 1, True, DIGITS)
            other = tl.arange(0, PARTS)
            tied = sums_ptr + (last * parts + other) * VALUES + border % VALUES
            earlier = tl.sum(tl.load(tied, mask=other < part, other=0), axis=0)
        best = tl.full((CHUNK,), float("-inf"), dtype=tl.float64)
        best_token = tl.zeros((CHUNK,), dtype=tl.int32)
        for start in range(part * PART, tl.minimum((part + 1) * PART, width), CHUNK):
            token = start + tl.arange(0, CHUNK)
            x = tl.load(logits_ptr + row * row_stride + token, mask=token < width, other=float("-inf"))
            key = _key(x).to(tl.int64) + 2**31
            below = _below(x, peak, temperature)
            # Noise lies between -3.14 and 22.88: no token further below the peak than that can beat the peak's own score.
            stays = (token < width) & (key >= floor) & (key >= border) & (below > -27.0)
            if tl.max(stays.to(tl.int32), axis=0) > 0:
                if top_p < 1.0:
                    mass = tl.where((key == border) & (token < width), _mass(below), 0)
                    before = earlier + tl.cumsum(mass, axis=0) - mass
                    stays &= (key > border) | (before < wanted)
                    earlier += tl.sum(mass, axis=0)
                if min_p > 0.0:
                    stays &= device_exp_of_negative(below) >= min_p
                bits = _mix(_mix(token.to(tl.uint32)) ^ noise_key)
                noise = -device_log(-device_log((bits.to(tl.float64) + 0.5) * (2.0**-32)))
                score = tl.where(stays, below + noise, float("-inf"))
                better = score > best
                best = tl.where(better, score, best)
                best_token = tl.where(better, token, best_token)
        score = tl.max(best, axis=0)
        first = tl.min(tl.where(best == score, best_token, 0x7FFFFFFF), axis=0)
        tl.store(scores_ptr + row * parts + part, score)
        tl.store(tokens_ptr + row * parts + part, first)


@kernel
def _pick(
    table_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    parts: tl.int32,
    PARTS: tl.constexpr,
) -> None:
    """The best of a row's parts; -1 where the largest logit is not finite."""
    row = tl.program_id(0).to(tl.int64)
    peak = _row_peak(peaks_ptr, row, parts, PARTS)
    chosen = 0x7FFFFFFF - (peak & 0x7FFFFFFF).to(tl.int32)
    if _number(table_ptr, row, 0) > 0.0:
        part = tl.arange(0, PARTS)
        scores = tl.load(scores_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
        tokens = tl.load(tokens_ptr + row * parts + part, mask=part < parts, other=0x7FFFFFFF)
        best = tl.max(scores, axis=0)
        chosen = tl.min(tl.where(scores == best, tokens, 0x7FFFFFFF), axis=0)
    key = (peak >> 32).to(tl.int32)
    is_finite = (key < 0x7F800000) & (key > -0x7F800001)
    tl.store(chosen_ptr + row, tl.where(is_finite, chosen, -1))


def _configs(width: int) -> tuple[Config, Config, Config, Config]:
    """Launch configurations of `_peak`, `_weigh`, `_draw` and `_pick` for a vocabulary of this size."""
    parts = -(-width // _PART)
    shared = {"PARTS": max(16, 1 << (parts - 1).bit_length()), "DIGITS": _DIGITS, "VALUES": _VALUES}
    peak = Config(num_warps=4, num_stages=1, source="16 logits a thread", tiles={"PART": _PART})
    weigh = Config(
        num_warps=4,
        num_stages=1,
        source="16 x 256 sums of 64 bits in registers: 64 a thread; 64 programs a row of DeepSeek-R1's",
        tiles={"PART": _PART, "CHUNK": 256, **shared},
        fp_fusion=False,
    )
    draw = Config(
        num_warps=4,
        num_stages=1,
        source="4 fp64 a thread between the tests whether a chunk can be skipped",
        tiles={"PART": _PART, "CHUNK": 512, **shared},
        fp_fusion=False,
    )
    pick = Config(num_warps=1, num_stages=1, source="two numbers a lane", tiles={"PARTS": shared["PARTS"]})
    return peak, weigh, draw, pick


def cases(architecture: int) -> Iterator[Case]:
    """The choice among DeepSeek-R1's 129280 tokens: the greedy stage, one digit of either border, noise, and the end."""
    peak, weigh, draw, pick = _configs(_R1_VOCABULARY)
    parts = -(-_R1_VOCABULARY // _PART)
    logits = {"logits_ptr": "*fp32", "row_stride": "i64", "width": "i32"}
    shared = {**logits, **dict.fromkeys(("table_ptr", "peaks_ptr", "sums_ptr", "found_ptr"), "*i64"), "rows": "i32"}
    loose = frozenset({"rows", "digit"})

    def work(rows: int, flops: float = 0.0, chunk: int = _PART) -> Work:
        moved = rows * (4 * _R1_VOCABULARY + 8 * parts)
        return Work(moved, rows * _R1_VOCABULARY * flops, programs=rows * parts, iterations=_PART / chunk)

    def case(name: str, kernel: Kernel, arguments: dict[str, str], config: Config, limit: int, **rest: Any) -> Case:
        name = f"sampling {name} {_R1_VOCABULARY}"
        return Case(name, kernel, architecture, arguments, config, limit, **rest)

    yield case("peak", _peak, {**logits, "peaks_ptr": "*i64"}, peak, 400, work=work)
    for mass in (False, True):
        yield case(
            "weigh mass" if mass else "weigh count",
            _weigh,
            {**shared, "digit": "i32"},
            weigh,
            290 if not mass else 640 if architecture < 120 else 1200,
            constants={"MASS": mass},
            unaligned=loose,
            work=functools.partial(work, flops=70.0 if mass else 16.0, chunk=256),
        )
    yield case(
        "draw",
        _draw,
        {**shared, "scores_ptr": "*fp64", "tokens_ptr": "*i32"},
        draw,
        2200 if architecture < 120 else 6400,  # sm_120's assembler unrolls the loop over a part's chunks
        unaligned=loose,
        work=functools.partial(work, flops=200.0, chunk=512),
    )
    results = {"scores_ptr": "*fp64", "tokens_ptr": "*i32", "chosen_ptr": "*i32", "parts": "i32"}
    arguments = {"table_ptr": "*i64", "peaks_ptr": "*i64", **results}
    yield case("pick", _pick, arguments, pick, 230, unaligned=frozenset({"parts"}))
