"""Triton kernels of the CUDA back end.

Shape suffixes: B matrices of a class, M rows ≤ N columns, both padded to whole tiles, so that no
kernel needs a mask on the workspaces. Every result depends on its own matrix and on fixed tile
sizes alone: the same bits whatever the batch, the run or the number of ranks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# Triton compiles these functions from source; annotations beyond constexpr would mislead it.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _source_tile(
    address, rows, cols, row, col, TILE: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr
):
    """Pointers to a TILE × TILE piece of a row-major (rows, cols) matrix, and its mask."""
    r = row + tl.arange(0, TILE)[:, None]
    c = col + tl.arange(0, TILE)[None, :]
    offset = r.to(tl.int64) * cols + c
    base = address.to(tl.pointer_type(DTYPE))
    if EVEN:
        # whole tiles of 16-byte aligned rows: lets the compiler use vector accesses
        base = tl.multiple_of(base, 16)
        offset = tl.max_contiguous(tl.multiple_of(offset, [1, 8]), [1, 8])
    return base + offset, (r < rows) & (c < cols)


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr, EVICT: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy=EVICT).to(tl.float32)
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def _store(pointers, value, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def _advance(grad, moment, blend, NESTEROV: tl.constexpr):
    """The new momentum and the direction.

    Here and below products and sums are fused by hand: every kernel that computes these values has
    the same bits, whole matrices and shards alike.
    """
    new = tl.fma(grad - moment, blend, moment)
    return new, _direction(grad, new, blend, NESTEROV)


@triton.jit
def _direction(grad, new, blend, NESTEROV: tl.constexpr):
    if NESTEROV:
        return tl.fma(grad - new, blend, new)
    return new


@triton.jit
def _updated(p, update, keep, step, CAUTIOUS: tl.constexpr):
    kept = p * keep
    if CAUTIOUS:
        kept = tl.where(p * update > 0, kept, p)
    return tl.fma(update, -step, kept)


@triton.jit
def _power_of_two(norm):
    """fp32 power of two that brings the fp64 `norm` to [64, 128); 1 where there is none."""
    bits = norm.to(tl.int64, bitcast=True)
    shift = 6 - (((bits >> 52) & 0x7FF) - 1023)
    shift = tl.minimum(tl.maximum(shift, -126), 127)
    scale = ((shift + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where((norm > 0.0) & (norm < float("inf")), scale, 1.0)


@triton.jit
def _root_of_sum(partial, COUNT, POW2: tl.constexpr):
    slots = tl.arange(0, POW2)
    return tl.sqrt(tl.sum(tl.load(partial + slots, mask=slots < COUNT, other=0.0)))


@triton.jit
def sample_kernel(
    grad_ptrs,  # int64 (B,): addresses of the gradients
    momentum_ptrs,  # int64 (B,): addresses of the fp32 momentum buffers
    shapes,  # int32 (B, 2): rows and columns as stored; rows > columns are read transposed
    hyper,  # fp32 (B, 4): 1 - β, sign of the gradient, 1 - lr·decay, lr·ratio
    samples,  # fp64 (B, SAMPLES): out, sums of squares of evenly spaced tiles of the directions
    TILES_N,
    TILES,
    SAMPLES,
    TILE: tl.constexpr,
    GRAD: tl.constexpr,
    NESTEROV: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What size the directions are, from a few tiles; all of them where SAMPLES is TILES."""
    index = tl.program_id(0) // SAMPLES
    tile = (tl.program_id(0) % SAMPLES) * TILES // SAMPLES
    rows = tl.load(shapes + index * 2)
    cols = tl.load(shapes + index * 2 + 1)
    i = (tile // TILES_N) * TILE
    j = (tile % TILES_N) * TILE
    row = tl.where(rows > cols, j, i)
    col = tl.where(rows > cols, i, j)
    grads, mask = _source_tile(tl.load(grad_ptrs + index), rows, cols, row, col, TILE, GRAD, EVEN)
    moments, _ = _source_tile(
        tl.load(momentum_ptrs + index), rows, cols, row, col, TILE, tl.float32, EVEN
    )
    grad = _load(grads, mask, EVEN, "") * tl.load(hyper + index * 4 + 1)
    moment = _load(moments, mask, EVEN, "")
    _, direction = _advance(grad, moment, tl.load(hyper + index * 4), NESTEROV)
    wide = direction.to(tl.float64)
    tl.store(samples + tl.program_id(0), tl.sum(wide * wide))


@triton.jit
def gather_kernel(
    grad_ptrs,  # these as in `sample_kernel`
    momentum_ptrs,
    shapes,
    hyper,
    x,  # (B, M, N): out, directions times the power of two that the samples ask for
    samples,  # fp64 (B, SAMPLES)
    partial,  # fp64 (B, TILES): out, sums of squares
    M,
    N,
    TILES_N,
    TILES,
    SAMPLES,
    SAMPLES_POW2: tl.constexpr,
    TILE: tl.constexpr,
    GRAD: tl.constexpr,
    NESTEROV: tl.constexpr,
    SKIP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Momentum and the 16-bit copy of the direction, in one pass.

    16 bits need the right order of magnitude only, so the copy does not wait for the norm.
    """
    pid = tl.program_id(0)
    index = pid // TILES
    tile = pid % TILES
    rows = tl.load(shapes + index * 2)
    cols = tl.load(shapes + index * 2 + 1)
    i = (tile // TILES_N) * TILE
    j = (tile % TILES_N) * TILE
    tall = rows > cols
    row = tl.where(tall, j, i)
    col = tl.where(tall, i, j)
    grads, mask = _source_tile(tl.load(grad_ptrs + index), rows, cols, row, col, TILE, GRAD, EVEN)
    moments, _ = _source_tile(
        tl.load(momentum_ptrs + index), rows, cols, row, col, TILE, tl.float32, EVEN
    )
    grad = _load(grads, mask, EVEN, "evict_first") * tl.load(hyper + index * 4 + 1)
    moment = _load(moments, mask, EVEN, "evict_first")
    new, direction = _advance(grad, moment, tl.load(hyper + index * 4), NESTEROV)
    estimate = _root_of_sum(samples + index * SAMPLES, SAMPLES, SAMPLES_POW2)
    scaled = direction * _power_of_two(estimate * tl.sqrt(TILES / SAMPLES).to(tl.float64))
    if SKIP:  # the samples are all tiles
        finite = estimate < float("inf")
        scaled = tl.where(finite, scaled, 0.0)
        new = tl.where(finite, new, moment)
    _store(moments, new, mask, EVEN)
    wide = direction.to(tl.float64)
    tl.store(partial + pid, tl.sum(wide * wide))
    if tall:
        scaled = tl.trans(scaled)
    r = i + tl.arange(0, TILE)[:, None]
    c = j + tl.arange(0, TILE)[None, :]
    out = x + index.to(tl.int64) * M * N + r.to(tl.int64) * N + c
    tl.store(out, scaled.to(x.dtype.element_ty))


@triton.jit
def settle_kernel(
    grad_ptrs,  # these as in `gather_kernel`
    momentum_ptrs,
    shapes,
    hyper,
    x,  # (B, M, N): written again where the samples misled
    samples,
    partial,
    norms,  # fp64 (B,): out, Frobenius norms of the directions
    factors,  # fp32 (B,): out, what brings x to norm 1
    M,
    N,
    TILES_N,
    TILES,
    SAMPLES,
    PARTS,  # programs that share one matrix
    SAMPLES_POW2: tl.constexpr,
    TILES_POW2: tl.constexpr,
    TILE: tl.constexpr,
    GRAD: tl.constexpr,
    NESTEROV: tl.constexpr,
    SKIP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The norms; and a second copy of matrices whose first left the middle of fp16's range."""
    index = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    estimate = _root_of_sum(samples + index * SAMPLES, SAMPLES, SAMPLES_POW2)
    scale = _power_of_two(estimate * tl.sqrt(TILES / SAMPLES).to(tl.float64))
    norm = _root_of_sum(partial + index * TILES, TILES, TILES_POW2)
    finite = norm < float("inf")
    reached = norm * scale.to(tl.float64)
    misled = finite & (norm > 0.0) & ((reached < 0.125) | (reached >= 32768.0))
    scale = tl.where(misled, _power_of_two(norm), scale)
    if part == 0:
        factor = tl.where(norm == 0.0, 0.0, 1.0 / (norm * scale.to(tl.float64))).to(tl.float32)
        factor = tl.where(finite, factor, 0.0 if SKIP else float("nan"))
        tl.store(norms + index, norm)
        tl.store(factors + index, factor)
    if misled:
        rows = tl.load(shapes + index * 2)
        cols = tl.load(shapes + index * 2 + 1)
        blend = tl.load(hyper + index * 4)
        sign = tl.load(hyper + index * 4 + 1)
        tall = rows > cols
        for tile in range(part, TILES, PARTS):
            i = (tile // TILES_N) * TILE
            j = (tile % TILES_N) * TILE
            row = tl.where(tall, j, i)
            col = tl.where(tall, i, j)
            grads, mask = _source_tile(
                tl.load(grad_ptrs + index), rows, cols, row, col, TILE, GRAD, EVEN
            )
            moments, _ = _source_tile(
                tl.load(momentum_ptrs + index), rows, cols, row, col, TILE, tl.float32, EVEN
            )
            grad = _load(grads, mask, EVEN, "") * sign
            new = _load(moments, mask, EVEN, "")
            scaled = _direction(grad, new, blend, NESTEROV) * scale
            if tall:
                scaled = tl.trans(scaled)
            r = i + tl.arange(0, TILE)[:, None]
            c = j + tl.arange(0, TILE)[None, :]
            out = x + index.to(tl.int64) * M * N + r.to(tl.int64) * N + c
            tl.store(out, scaled.to(x.dtype.element_ty))


@triton.jit(do_not_specialize=["backward"])
def symmetric_kernel(
    a_desc,  # (B·M, K): descriptor, block (TILE, BLOCK_K)
    b_desc,  # (B·M, K): likewise
    d_desc,  # (B·M, M): addend, symmetric, block (TILE, TILE); read when ADD
    out_desc,  # (B·M, M): block (TILE, TILE)
    factors,  # fp32 (B,): read when SCALED
    alpha,
    beta,
    gamma,
    M,
    K,
    TILES,
    backward,  # 1: the last matrix first
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = A·Bᵀ, or under ADD alpha·A·Bᵀ + beta·D + gamma·I, where that is symmetric.

    Under SCALED A and B stand for factor·A and factor·B.

    Only tiles on and above the diagonal are computed; those above are stored twice, once mirrored.
    """
    pid = tl.program_id(0)
    pid = tl.where(backward > 0, tl.num_programs(0) - 1 - pid, pid)
    per_matrix = TILES * (TILES + 1) // 2
    index = pid // per_matrix
    row = index * M
    t = pid % per_matrix
    # column by column of the upper triangle: t = pn(pn+1)/2 + pm, pm ≤ pn
    pn = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    pn = tl.where(pn * (pn + 1) // 2 > t, pn - 1, pn)
    pn = tl.where((pn + 1) * (pn + 2) // 2 <= t, pn + 1, pn)
    m = (t - pn * (pn + 1) // 2) * TILE
    n = pn * TILE
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a = a_desc.load([row + m, k])
        b = b_desc.load([row + n, k])
        acc = tl.dot(a, b.T, acc)
    if SCALED:
        factor = tl.load(factors + index)
        acc = acc * (factor * factor)
    if ADD:
        acc = acc * alpha + beta * d_desc.load([row + m, n]).to(tl.float32)
        if m == n:
            r = tl.arange(0, TILE)
            acc = tl.where(r[:, None] == r[None, :], acc + gamma, acc)
    value = acc.to(out_desc.dtype)
    out_desc.store([row + m, n], value)
    if m != n:
        out_desc.store([row + n, m], tl.trans(value))


@triton.jit(do_not_specialize=["backward"])
def apply_kernel(
    q_desc,  # (B·M, M): descriptor, block (TILE_M, BLOCK_K)
    x_desc,  # (B·M, N): descriptor, block (BLOCK_K, TILE_N)
    out_desc,  # (B·M, N): descriptor, block (TILE_M, TILE_N or under HALVES half of it)
    factors,  # fp32 (B,): read when SCALED
    M,
    TILES_M,
    TILES_N,
    TOTAL,  # tiles of all matrices
    backward,  # 1: the last matrix first
    HALVES: tl.constexpr,
    SCALED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = Q·X, or factor·Q·X; each program makes every PROGRAMS-th tile."""
    per_matrix = TILES_M * TILES_N
    # flattened, so that the next tile's loads overlap this one's store
    for position in tl.range(tl.program_id(0), TOTAL, PROGRAMS, flatten=True):
        tile = tl.where(backward > 0, TOTAL - 1 - position, position)
        row = tile // per_matrix * M
        t = tile % per_matrix
        m = row + t % TILES_M * TILE_M
        n = t // TILES_M * TILE_N
        acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        for k in tl.range(0, M, BLOCK_K):
            q = q_desc.load([m, k])
            x = x_desc.load([row + k, n])
            acc = tl.dot(q, x, acc)
        if SCALED:
            acc = acc * tl.load(factors + tile // per_matrix)
        if HALVES:
            # one after the other through half the shared memory, which another stage gets
            left, right = acc.reshape(TILE_M, 2, TILE_N // 2).permute(0, 2, 1).split()
            out_desc.store([m, n], left.to(out_desc.dtype))
            out_desc.store([m, n + TILE_N // 2], right.to(out_desc.dtype))
        else:
            out_desc.store([m, n], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["backward"])
def update_kernel(
    param_ptrs,  # int64 (B,): addresses of the parameters
    shapes,  # int32 (B, 2): rows and columns as stored
    hyper,  # fp32 (B, 4): 1 - β, sign of the gradient, 1 - lr·decay, lr·ratio
    norms,  # fp64 (B,): of the directions; not finite means skip
    o,  # (B, M, N): orthogonal updates, transposed for tall matrices
    M,
    N,
    TILES_N,
    TILES,
    backward,  # 1: the last matrix first
    TILE: tl.constexpr,
    PARAM: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    SKIP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """p ← (1 - lr·decay)·p - lr·ratio·o; under CAUTIOUS decay acts only where p·o > 0."""
    pid = tl.program_id(0)
    pid = tl.where(backward > 0, tl.num_programs(0) - 1 - pid, pid)
    index = pid // TILES
    tile = pid % TILES
    rows = tl.load(shapes + index * 2)
    cols = tl.load(shapes + index * 2 + 1)
    keep = tl.load(hyper + index * 4 + 2)
    step = tl.load(hyper + index * 4 + 3)
    i = (tile // TILES_N) * TILE
    j = (tile % TILES_N) * TILE
    tall = rows > cols
    row = tl.where(tall, j, i)
    col = tl.where(tall, i, j)
    r = i + tl.arange(0, TILE)[:, None]
    c = j + tl.arange(0, TILE)[None, :]
    update = tl.load(o + index.to(tl.int64) * M * N + r.to(tl.int64) * N + c).to(tl.float32)
    if tall:
        update = tl.trans(update)
    params, mask = _source_tile(
        tl.load(param_ptrs + index), rows, cols, row, col, TILE, PARAM, EVEN
    )
    p = _load(params, mask, EVEN, "")
    new = _updated(p, update, keep, step, CAUTIOUS)
    if SKIP:
        new = tl.where(tl.load(norms + index) < float("inf"), new, p)
    _store(params, new.to(PARAM), mask, EVEN)


@triton.jit
def shard_direction_kernel(
    grad,  # (COUNT,): a shard's gradient
    moment,  # fp32 (COUNT,): its momentum, advanced
    direction,  # fp32 (COUNT,): out
    blend,
    sign,
    COUNT,
    BLOCK: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """What `gather_kernel` computes per element, on a part of a matrix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < COUNT
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * sign
    new, out = _advance(g, tl.load(moment + at, mask=mask, other=0.0), blend, NESTEROV)
    tl.store(moment + at, new, mask=mask)
    tl.store(direction + at, out, mask=mask)


@triton.jit
def shard_update_kernel(
    param,  # (COUNT,): a shard
    update,  # fp32 (COUNT,): its part of the orthogonal update
    keep,
    step,
    COUNT,
    BLOCK: tl.constexpr,
    CAUTIOUS: tl.constexpr,
):
    """What `update_kernel` computes per element, on a part of a matrix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < COUNT
    p = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(update + at, mask=mask, other=0.0)
    new = _updated(p, u, keep, step, CAUTIOUS)
    tl.store(param + at, new.to(param.dtype.element_ty), mask=mask)
