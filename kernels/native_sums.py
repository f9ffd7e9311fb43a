# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What numba's loops of products are made of: sums of products for blocks of outputs.

    bf16    weights of a block [in_features / 2, 32, 2], by vectors for few rows or by AMX tiles;
            without AMX [in_features / 2, 64, 2], one block at a time, by dot products
    fp32    weights of a block [in_features, 64], by vectors
    int8    weights of a block [in_features / 4, 64, 4], by tiles or vectors, one block at a time
    int4    weights of a block [in_features, 32] bytes, by vectors, one group of inputs at a time

and of attention: a query's products with `KEY_TILE` keys, and sums of as many weighted values.

Written in LLVM's instructions, as numba knows neither vectors nor tiles nor prefetching. Left alone
a processor asks for memory later than it could: what lies `PREFETCH` bytes ahead is asked for, and
in bf16 and fp32 two blocks are read side by side. In vectors a lane is an output, whose terms are
added in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.native import has_features, loop

BF16_BLOCK, FP32_BLOCK, INT8_BLOCK, INT4_BLOCK = 32, 64, 64, 64
WIDE_BF16_BLOCK = 64
"""Outputs in a block; the wide one is that of CPUs without AMX."""
MAX_TILE_ROWS, TILE_TERMS, INT8_TILE_TERMS = 16, 32, 64
"""Rows of a tile, and terms of a sum that a tile takes at a time, in bf16 and in int8."""
KEY_TILE, WORD_DIMS, MAX_VALUE_HEADS = 16, 32, 4
"""Keys multiplied at a time, dimensions in a vector of words, query heads that share its values."""
# bytes ahead, and into which caches: 3 is all, 2 from the second on (a Xeon with AMX, a Zen 4)
PREFETCH, _INTO = (1536, 3) if has_features("amx-tile") else (4096, 2)
_LANES = 16
_LINE = 64
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18

_void, _i8, _i32, _i64 = ir.VoidType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_pointer = _i8.as_pointer()
_words, _floats = ir.VectorType(_i32, _LANES), ir.VectorType(ir.FloatType(), _LANES)


def _call(builder, name, result, args):
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}")
    return builder.call(function, args)


def _prefetch(builder, address, num_bytes):
    module = builder.module
    kind = ir.FunctionType(_void, [_pointer, _i32, _i32, _i32])
    function = module.declare_intrinsic("llvm.prefetch", [_pointer], kind)
    for line in range(PREFETCH, PREFETCH + num_bytes, _LINE):
        pointer = builder.inttoptr(builder.add(address, _i64(line)), _pointer)
        builder.call(function, [pointer, _i32(0), _i32(_INTO), _i32(1)])  # to read; data


def _load(builder, address, kind):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def _splat(builder, word):
    undefined = ir.Constant(_words, ir.Undefined)
    one = builder.insert_element(undefined, word, _i32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_words, [0] * _LANES))


def _as_floats(builder, words, is_bf16):
    """Vectors of the terms in words: two bf16, or one fp32."""
    if not is_bf16:
        return [builder.bitcast(words, _floats)]
    lower = builder.shl(words, ir.Constant(_words, [16] * _LANES))
    upper = builder.and_(words, ir.Constant(_words, [0xFFFF0000] * _LANES))
    return [builder.bitcast(lower, _floats), builder.bitcast(upper, _floats)]


def _store_all(builder, vectors, out):
    for i, vector in enumerate(vectors):
        address = builder.add(out, _i64(_LINE * i))
        builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


@contextlib.contextmanager
def _each_term(builder, num_terms, step, starts=()):
    """Do the body with the first term of each ``step`` of ``num_terms``, and with what it summed.

    That is a list of ``starts`` at first; the body puts new sums into it, and the last stay there.
    """
    before = builder.block
    body, after = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(body)
    builder.position_at_end(body)
    term = builder.phi(_i64)
    term.add_incoming(_i64(0), before)
    phis = []
    for start in starts:
        phi = builder.phi(start.type)
        phi.add_incoming(start, before)
        phis.append(phi)
    sums = list(phis)
    yield term, sums
    next_term = builder.add(term, _i64(step))
    term.add_incoming(next_term, body)
    for phi, value in zip(phis, sums, strict=True):
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_unsigned("<", next_term, num_terms), body, after)
    builder.position_at_end(after)


def sums_by_vectors(block: int, num_rows: int, is_bf16: bool, num_blocks: int = 2):
    """An intrinsic for two blocks of ``block`` outputs, or the first alone, and ``num_rows`` rows.

    It takes the addresses of the two blocks' weights, of the rows (``row_bytes`` apart, dtype of
    the weights), how many terms to sum, and where to put the sums, [num_blocks, num_rows, block]
    fp32.
    """
    num_vectors = block // _LANES

    @intrinsic
    def sums(_context, first, second, rows, row_bytes, num_terms, out):
        def generate(context, builder, _signature, args):
            first, second, rows, row_bytes, num_terms, out = args
            starts = [ir.Constant(_floats, [0.0] * _LANES)] * (num_blocks * num_rows * num_vectors)
            terms_of_word = 2 if is_bf16 else 1
            with _each_term(builder, num_terms, terms_of_word, starts) as (term, sums):
                at_term = builder.mul(term, _i64(4 // terms_of_word))
                factors = []
                for row in range(num_rows):
                    address = builder.add(rows, builder.mul(row_bytes, _i64(row)))
                    word = _load(builder, builder.add(address, at_term), _i32)
                    factors.append(_as_floats(builder, _splat(builder, word), is_bf16))
                for which, weights in enumerate((first, second)[:num_blocks]):
                    address = builder.add(weights, builder.mul(at_term, _i64(block)))
                    _prefetch(builder, address, 4 * block)
                    for vector in range(num_vectors):
                        at_vector = builder.add(address, _i64(_LINE * vector))
                        values = _as_floats(builder, _load(builder, at_vector, _words), is_bf16)
                        for row in range(num_rows):
                            i = (which * num_rows + row) * num_vectors + vector
                            for pair in zip(values, factors[row], strict=True):
                                sums[i] = _call(builder, "fma.v16f32", _floats, [*pair, sums[i]])
            _store_all(builder, sums, out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return sums


class _Bfloat(ir.types.Type):
    """LLVM's type, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _Bfloat)

    def __hash__(self):
        return hash(_Bfloat)


_bfloats = ir.VectorType(_Bfloat(), 2 * _LANES)


def sums_by_dots(num_rows: int):
    """An intrinsic as `sums_by_vectors` for one block of 64 outputs, needs AVX512_BF16.

    An instruction takes both terms of a word. The sums are [num_rows, 64] fp32.
    """
    num_vectors = WIDE_BF16_BLOCK // _LANES

    @intrinsic
    def sums(_context, weights, rows, row_bytes, num_terms, out):
        def generate(context, builder, _signature, args):
            weights, rows, row_bytes, num_terms, out = args
            starts = [ir.Constant(_floats, [0.0] * _LANES)] * (num_rows * num_vectors)
            with _each_term(builder, num_terms, 2, starts) as (term, sums):
                at_term = builder.mul(term, _i64(2))
                address = builder.add(weights, builder.mul(at_term, _i64(WIDE_BF16_BLOCK)))
                _prefetch(builder, address, 4 * WIDE_BF16_BLOCK)
                values = []
                for vector in range(num_vectors):
                    words = _load(builder, builder.add(address, _i64(_LINE * vector)), _words)
                    values.append(builder.bitcast(words, _bfloats))
                for row in range(num_rows):
                    at_row = builder.add(rows, builder.mul(row_bytes, _i64(row)))
                    word = _load(builder, builder.add(at_row, at_term), _i32)
                    factors = builder.bitcast(_splat(builder, word), _bfloats)
                    for vector, value in enumerate(values):
                        i = row * num_vectors + vector
                        operands = [sums[i], value, factors]
                        name = "x86.avx512bf16.dpbf16ps.512"
                        sums[i] = _call(builder, name, _floats, operands)
            _store_all(builder, sums, out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return sums


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU multiplies tiles of bf16 and int8 (AMX), and Linux lets us."""
    is_allowed = "AMX" in os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX").upper()
    if not (is_allowed and has_features("amx-tile", "amx-bf16", "amx-int8")):
        return False
    request = (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    refused: int = ctypes.CDLL(None).syscall(*request)
    return not refused


# tiles: sums of 16 outputs each, rows, and weights of 16 outputs
_SUMS, _ROWS, _WEIGHTS = (0, 1, 2, 3), 4, (5, 6)


@intrinsic
def _load_tile_config(_context, config):
    def generate(context, builder, _signature, args):
        _call(builder, "x86.ldtilecfg", _void, [builder.inttoptr(args[0], _pointer)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@loop
def configure_tiles(num_rows):
    """Give the running thread tiles for so many rows, until `release_tiles`."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # palette
    for tile in range(7):
        config[16 + 2 * tile] = _LINE  # bytes of a row
        config[48 + tile] = num_rows if tile <= _ROWS else _LANES
    _load_tile_config(config.ctypes.data)


@intrinsic
def release_tiles(_context):
    def generate(context, builder, _signature, _args):
        _call(builder, "x86.tilerelease", _void, [])
        return context.get_dummy_value()

    return types.void(), generate


def _move_tile(builder, name, number, address, stride):
    pointer = builder.inttoptr(address, _pointer)
    _call(builder, f"x86.{name}", _void, [_i8(number), pointer, stride])


def _zero_sums(builder):
    for number in _SUMS:
        _call(builder, "x86.tilezero", _void, [_i8(number)])


@intrinsic
def sums_by_tiles(_context, first, second, rows, row_bytes, num_terms, out, out_bytes):
    """As `sums_by_vectors` in bf16, for as many rows as tiles are configured for.

    ``num_terms`` is a multiple of `TILE_TERMS`, ``out_bytes`` the size of a block's sums.
    """

    def generate(context, builder, _signature, args):
        first, second, rows, row_bytes, num_terms, out, out_bytes = args
        line_bytes = _i64(4 * BF16_BLOCK)
        tile = functools.partial(_move_tile, builder)
        _zero_sums(builder)
        with _each_term(builder, num_terms, TILE_TERMS) as (term, _):
            tile("tileloadd64", _ROWS, builder.add(rows, builder.mul(term, _i64(2))), row_bytes)
            for which, weights in enumerate((first, second)):
                address = builder.add(weights, builder.mul(term, _i64(2 * BF16_BLOCK)))
                _prefetch(builder, address, 2 * BF16_BLOCK * TILE_TERMS)
                for half, number in enumerate(_WEIGHTS):
                    tile(
                        "tileloadd64", number, builder.add(address, _i64(_LINE * half)), line_bytes
                    )
                    operands = [_i8(_SUMS[2 * which + half]), _i8(_ROWS), _i8(number)]
                    _call(builder, "x86.tdpbf16ps", _void, operands)
        for number in _SUMS:
            which, half = divmod(number, 2)
            of_block = builder.add(out, builder.mul(out_bytes, _i64(which)))
            tile("tilestored64", number, builder.add(of_block, _i64(_LINE * half)), line_bytes)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def sums_of_int8(_context, weights, rows, num_terms, out):
    """Sums of a block of outputs, [rows, 64] int32, for as many rows as tiles are configured for.

    The rows are int8 and contiguous, ``num_terms`` is a multiple of `INT8_TILE_TERMS`.
    """

    def generate(context, builder, _signature, args):
        weights, rows, num_terms, out = args
        line_bytes = _i64(4 * INT8_BLOCK)
        tile = functools.partial(_move_tile, builder)
        _zero_sums(builder)
        with _each_term(builder, num_terms, INT8_TILE_TERMS) as (term, _):
            tile("tileloadd64", _ROWS, builder.add(rows, term), num_terms)
            address = builder.add(weights, builder.mul(term, _i64(INT8_BLOCK)))
            _prefetch(builder, address, INT8_BLOCK * INT8_TILE_TERMS)
            for part in _SUMS:
                number = _WEIGHTS[part % 2]
                tile("tileloadd64", number, builder.add(address, _i64(_LINE * part)), line_bytes)
                _call(builder, "x86.tdpbssd", _void, [_i8(part), _i8(_ROWS), _i8(number)])
        for part in _SUMS:
            tile("tilestored64", part, builder.add(out, _i64(_LINE * part)), line_bytes)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def sums_of_int8_by_vectors(num_rows: int):
    """An intrinsic as `sums_of_int8` for ``num_rows`` rows, of bytes that are 128 too large.

    ``negative`` is the address of minus the sum of each output's weights, [64] int32.
    """
    num_vectors = INT8_BLOCK // _LANES

    @intrinsic
    def sums(_context, weights, negative, rows, num_terms, out):
        def generate(context, builder, _signature, args):
            weights, negative, rows, num_terms, out = args
            starts = []
            for vector in range(num_vectors):
                words = _load(builder, builder.add(negative, _i64(_LINE * vector)), _words)
                starts.append(builder.shl(words, ir.Constant(_words, [7] * _LANES)))  # 128 times
            with _each_term(builder, num_terms, 4, starts * num_rows) as (term, sums):
                address = builder.add(weights, builder.mul(term, _i64(INT8_BLOCK)))
                _prefetch(builder, address, 4 * INT8_BLOCK)
                values = [
                    _load(builder, builder.add(address, _i64(_LINE * vector)), _words)
                    for vector in range(num_vectors)
                ]
                for row in range(num_rows):
                    at_term = builder.add(builder.mul(num_terms, _i64(row)), term)
                    factors = _splat(builder, _load(builder, builder.add(rows, at_term), _i32))
                    for vector, value in enumerate(values):
                        i = row * num_vectors + vector
                        operands = [sums[i], factors, value]
                        sums[i] = _call(builder, "x86.avx512.vpdpbusd.512", _words, operands)
            _store_all(builder, sums, out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return sums


def sums_of_int4(num_rows: int, group: int):
    """An intrinsic: add the products of a group of inputs with a block of outputs to sums.

    It takes the addresses of the group's weights (a byte holds output i below and i + 32 above), of
    its scales and middles [64, 2] bf16, of the rows' inputs [num_rows, ...] int16, ``row_bytes``
    apart, of what one counts in each row and what all come to [num_rows, ...] fp32, ``unit_bytes``
    apart, and of the sums [num_rows, 64] fp32.
    """
    num_vectors = INT4_BLOCK // _LANES
    bytes_of_pair, shorts = ir.VectorType(_i8, _LINE), ir.VectorType(ir.IntType(16), _LINE // 2)
    # 32 bits of output i: its bytes of one input and the next, each followed by a zero
    halves = [
        [at for i in range(first, first + _LANES) for at in (i, _LINE, 32 + i, _LINE)]
        for first in (0, _LANES)
    ]

    @intrinsic
    def add(_context, weights, scales, rows, row_bytes, units, totals, unit_bytes, sums):
        def generate(context, builder, _signature, args):
            weights, scales, rows, row_bytes, units, totals, unit_bytes, sums = args
            _prefetch(builder, weights, group * INT4_BLOCK // 2)
            _prefetch(builder, scales, 4 * INT4_BLOCK)

            def of_row(address, row, num_bytes):
                word = _load(builder, builder.add(address, builder.mul(num_bytes, _i64(row))), _i32)
                return _splat(builder, word)

            products = [ir.Constant(_words, [0] * _LANES)] * (num_rows * num_vectors)
            for pair in range(group // 2):
                loaded = _load(builder, builder.add(weights, _i64(_LINE * pair)), bytes_of_pair)
                values = []
                for half in halves:
                    order = ir.Constant(ir.VectorType(_i32, _LINE), half)
                    zeros = ir.Constant(bytes_of_pair, [0] * _LINE)
                    both = builder.shuffle_vector(loaded, zeros, order)
                    both = builder.bitcast(both, shorts)
                    values.append(builder.and_(both, ir.Constant(shorts, [15] * (_LINE // 2))))
                    values.append(builder.lshr(both, ir.Constant(shorts, [4] * (_LINE // 2))))
                for row in range(num_rows):
                    factors = of_row(builder.add(rows, _i64(4 * pair)), row, row_bytes)
                    factors = builder.bitcast(factors, shorts)
                    # the vectors of outputs 0, 16, 32 and 48 on
                    for vector, value in zip((0, 2, 1, 3), values, strict=True):
                        name = "x86.avx512.pmaddw.d.512"
                        product = _call(builder, name, _words, [value, factors])
                        i = row * num_vectors + vector
                        products[i] = builder.add(products[i], product)
            for vector in range(num_vectors):
                at_vector = _i64(4 * _LANES * vector)
                words = _load(builder, builder.add(scales, at_vector), _words)
                scale, middle = _as_floats(builder, words, is_bf16=True)
                eight = ir.Constant(_floats, [-8.0] * _LANES)
                base = _call(builder, "fma.v16f32", _floats, [scale, eight, middle])
                for row in range(num_rows):
                    total = builder.bitcast(of_row(totals, row, unit_bytes), _floats)
                    unit = builder.bitcast(of_row(units, row, unit_bytes), _floats)
                    product = builder.sitofp(products[row * num_vectors + vector], _floats)
                    at = builder.add(sums, _i64(4 * (row * INT4_BLOCK + _LANES * vector)))
                    value = _load(builder, at, _floats)
                    value = _call(builder, "fma.v16f32", _floats, [base, total, value])
                    scaled = builder.fmul(scale, unit)
                    value = _call(builder, "fma.v16f32", _floats, [scaled, product, value])
                    pointer = builder.inttoptr(at, _floats.as_pointer())
                    builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return add


def _transposed_sums(builder, vectors):
    """Of 16 vectors their sums, a vector."""
    width = _LANES
    while len(vectors) > 1:
        width //= 2
        # lanes of a pair: those with an even number of width from the first, then from the second
        orders: list[list[int]] = [[], []]
        for lane in range(_LANES):
            source = lane if lane & width == 0 else lane - width + _LANES
            orders[0].append(source)
            orders[1].append(source + width)
        halves = len(vectors) // 2
        pairs = zip(vectors[:halves], vectors[halves:], strict=True)
        vectors = [
            builder.fadd(
                *(builder.shuffle_vector(a, b, ir.Constant(_words, order)) for order in orders)
            )
            for a, b in pairs
        ]
    return vectors[0]


@intrinsic
def dots_of_keys(_context, keys, key_bytes, query, num_dims, out):
    """Products of a query with `KEY_TILE` keys, fp32.

    It takes the addresses of the keys, ``key_bytes`` apart, and of the query, bf16, how many
    dimensions they have, a multiple of `WORD_DIMS`, and where to put the products.
    """

    def generate(context, builder, _signature, args):
        keys, key_bytes, query, num_dims, out = args
        starts = [ir.Constant(_floats, [0.0] * _LANES)] * KEY_TILE
        with _each_term(builder, num_dims, WORD_DIMS, starts) as (dim, sums):
            at_dim = builder.mul(dim, _i64(2))
            factors = _as_floats(builder, _load(builder, builder.add(query, at_dim), _words), True)
            for key in range(KEY_TILE):
                at_key = builder.add(keys, builder.mul(key_bytes, _i64(key)))
                words = _load(builder, builder.add(at_key, at_dim), _words)
                for pair in zip(_as_floats(builder, words, True), factors, strict=True):
                    sums[key] = _call(builder, "fma.v16f32", _floats, [*pair, sums[key]])
        _store_all(builder, [_transposed_sums(builder, sums)], out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def weighted_values(num_heads: int):
    """An intrinsic: add weighted values to the sums of ``num_heads`` query heads.

    It takes the addresses of the values, bf16, ``value_bytes`` apart, and of the first head's
    weights, fp32, those of another head ``weight_bytes`` further, how many values there are, and
    the address of the first head's sums of `WORD_DIMS` dimensions: 16 even ones, 16 odd ones, fp32,
    those of another head ``sum_bytes`` further.
    """

    @intrinsic
    def add(_context, values, value_bytes, weights, weight_bytes, num_values, sums, sum_bytes):
        def generate(context, builder, _signature, args):
            values, value_bytes, weights, weight_bytes, num_values, sums_at, sum_bytes = args
            at_heads = [
                builder.add(sums_at, builder.mul(sum_bytes, _i64(head)))
                for head in range(num_heads)
            ]
            starts = [
                _load(builder, builder.add(at, _i64(half)), _floats)
                for at in at_heads
                for half in (0, _LINE)
            ]
            with _each_term(builder, num_values, 1, starts) as (value, sums):
                at_value = builder.add(values, builder.mul(value_bytes, value))
                parts = _as_floats(builder, _load(builder, at_value, _words), True)
                at_weight = builder.add(weights, builder.mul(value, _i64(4)))
                for head in range(num_heads):
                    at = builder.add(at_weight, builder.mul(weight_bytes, _i64(head)))
                    weight = builder.bitcast(_splat(builder, _load(builder, at, _i32)), _floats)
                    for half, part in enumerate(parts):
                        i = 2 * head + half
                        sums[i] = _call(builder, "fma.v16f32", _floats, [weight, part, sums[i]])
            for head, at in enumerate(at_heads):
                _store_all(builder, sums[2 * head : 2 * head + 2], at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return add
