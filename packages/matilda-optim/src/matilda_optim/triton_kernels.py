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
def gather_kernel(
    grad_ptrs,  # int64 (B,): addresses of the gradients
    momentum_ptrs,  # int64 (B,): addresses of the fp32 momentum buffers
    shapes,  # int32 (B, 2): rows and columns as stored; rows > columns are read transposed
    hyper,  # fp32 (B, 4): 1 - β, sign of the gradient, 1 - lr·decay, lr·ratio
    x,  # (B, M, N): out, directions divided by their norm
    partial,  # fp64 (B, tiles): sums of squares
    counters,  # int32 (B, 2): zero before and after
    norms,  # fp64 (B,): out, Frobenius norms
    batch,
    lead,  # tiles of the next matrix that are summed before this one is finished
    M,
    N,
    TILES_N,
    TILES,
    TILES_POW2: tl.constexpr,
    TILE: tl.constexpr,
    GRAD: tl.constexpr,
    NESTEROV: tl.constexpr,
    SKIP: tl.constexpr,
    EVEN: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Momentum, direction, norm and the scaled 16-bit copy in one pass over DRAM.

    All programs of matrix k that sum squares come before those that finish it, which find their
    operands in L2 and wait for the sum. Before these run, `lead` programs of matrix k + 1 start,
    so that DRAM stays busy. PHASE 0 is that; 1 and 2 are the halves as two launches.
    """
    pid = tl.program_id(0)
    if PHASE == 0:
        rest = pid - lead
        block = rest // (2 * TILES)
        within = rest % (2 * TILES)
        first = (rest < 0) | (within < TILES)
        slot = tl.where(rest < 0, pid, block * TILES + within + lead)
        if not first:
            slot = block * TILES + within - TILES
    else:
        first = PHASE == 1
        slot = pid
    index = slot // TILES
    tile = slot % TILES
    if (slot >= 0) & (index < batch):
        rows = tl.load(shapes + index * 2)
        cols = tl.load(shapes + index * 2 + 1)
        blend = tl.load(hyper + index * 4)
        sign = tl.load(hyper + index * 4 + 1)
        i = (tile // TILES_N) * TILE
        j = (tile % TILES_N) * TILE
        tall = rows > cols
        row = tl.where(tall, j, i)
        col = tl.where(tall, i, j)
        grads, mask = _source_tile(
            tl.load(grad_ptrs + index), rows, cols, row, col, TILE, GRAD, EVEN
        )
        moments, _ = _source_tile(
            tl.load(momentum_ptrs + index), rows, cols, row, col, TILE, tl.float32, EVEN
        )
        if first:
            grad = _load(grads, mask, EVEN, "evict_last") * sign
            moment = _load(moments, mask, EVEN, "evict_last")
        else:
            grad = _load(grads, mask, EVEN, "evict_first") * sign
            moment = _load(moments, mask, EVEN, "evict_first")
        new = moment + blend * (grad - moment)
        direction = new
        if NESTEROV:
            direction = new - (new - grad) * blend
        if first:
            wide = direction.to(tl.float64)
            tl.store(partial + index * TILES + tile, tl.sum(wide * wide))
            tl.debug_barrier()
            arrived = tl.atomic_add(counters + index * 2, 1, sem="acq_rel")
            if arrived == TILES - 1:
                # the last one adds up, in a fixed order
                tl.debug_barrier()
                slots = tl.arange(0, TILES_POW2)
                sums = tl.load(
                    partial + index * TILES + slots,
                    mask=slots < TILES,
                    other=0.0,
                    cache_modifier=".cg",
                )
                tl.store(norms + index, tl.sqrt(tl.sum(sums)))
                tl.debug_barrier()
                tl.atomic_add(counters + index * 2, 1, sem="release")
        else:
            if PHASE == 0:
                while tl.atomic_add(counters + index * 2, 0, sem="acquire") <= TILES:
                    pass
                tl.debug_barrier()
            norm = tl.load(norms + index, cache_modifier=".cg")
            inverse = tl.where(norm == 0.0, 0.0, 1.0 / norm).to(tl.float32)
            finite = norm < float("inf")
            scaled = direction * inverse
            if SKIP:
                scaled = tl.where(finite, scaled, 0.0)
                new = tl.where(finite, new, moment)
            _store(moments, new, mask, EVEN)
            if tall:
                scaled = tl.trans(scaled)
            r = i + tl.arange(0, TILE)[:, None]
            c = j + tl.arange(0, TILE)[None, :]
            out = x + index.to(tl.int64) * M * N + r.to(tl.int64) * N + c
            tl.store(out, scaled.to(x.dtype.element_ty), eviction_policy="evict_first")
            done = tl.atomic_add(counters + index * 2 + 1, 1)
            if done == TILES - 1:
                tl.store(counters + index * 2, 0)
                tl.store(counters + index * 2 + 1, 0)


@triton.jit
def symmetric_kernel(
    a_desc,  # (B·M, K): descriptor, block (TILE, BLOCK_K)
    b_desc,  # (B·M, K): likewise
    d_desc,  # (B·M, M): addend, symmetric, block (TILE, TILE); read when ADD
    out_desc,  # (B·M, M): block (TILE, TILE)
    alpha,
    beta,
    gamma,
    M,
    K,
    TILES,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = A·Bᵀ, or under ADD alpha·A·Bᵀ + beta·D + gamma·I, where that is symmetric.

    Only tiles on and above the diagonal are computed; those above are stored twice, once mirrored.
    """
    pid = tl.program_id(0)
    per_matrix = TILES * (TILES + 1) // 2
    row = pid // per_matrix * M
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
    if ADD:
        acc = acc * alpha + beta * d_desc.load([row + m, n]).to(tl.float32)
        if m == n:
            r = tl.arange(0, TILE)
            acc = tl.where(r[:, None] == r[None, :], acc + gamma, acc)
    value = acc.to(out_desc.dtype)
    out_desc.store([row + m, n], value)
    if m != n:
        out_desc.store([row + n, m], tl.trans(value))


@triton.jit
def apply_kernel(
    q_desc,  # (B·M, M): descriptor, block (TILE_M, BLOCK_K)
    x_desc,  # (B·M, N): descriptor, block (BLOCK_K, TILE_N)
    out_desc,  # (B·M, N): descriptor, block (TILE_M, TILE_N)
    M,
    TILES_M,
    TILES_N,
    TOTAL,  # tiles of all matrices
    PROGRAMS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = Q·X, a dense product per matrix; each program makes every PROGRAMS-th tile."""
    per_matrix = TILES_M * TILES_N
    # flattened, so that the next tile's loads overlap this one's store
    for tile in tl.range(tl.program_id(0), TOTAL, PROGRAMS, flatten=True):
        row = tile // per_matrix * M
        t = tile % per_matrix
        m = row + t % TILES_M * TILE_M
        n = t // TILES_M * TILE_N
        acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        for k in tl.range(0, M, BLOCK_K):
            q = q_desc.load([m, k])
            x = x_desc.load([row + k, n])
            acc = tl.dot(q, x, acc)
        out_desc.store([m, n], acc.to(out_desc.dtype))


@triton.jit
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
    TILE: tl.constexpr,
    PARAM: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    SKIP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """p ← (1 - lr·decay)·p - lr·ratio·o; under CAUTIOUS decay acts only where p·o > 0."""
    pid = tl.program_id(0)
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
    if CAUTIOUS:
        new = tl.where(p * update > 0, p * keep, p) - step * update
    else:
        new = p * keep - step * update
    if SKIP:
        new = tl.where(tl.load(norms + index) < float("inf"), new, p)
    _store(params, new.to(PARAM), mask, EVEN)
