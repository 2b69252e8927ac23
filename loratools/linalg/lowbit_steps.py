"""The steps of the low-bit encoder: a beginning, better codes given the other side, and better scales."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.leaf import Array
from loratools.linalg.levels import HALF, decoded, is_even, nearest, snapped
from loratools.linalg.lowbit_state import How, Problem, State, assessed, gram_matrices, runs
from loratools.linalg.namespace import device_of, namespace, up
from loratools.linalg.scales import TINY, grouped, groups, largest, spread, stored

BLOCK = 16  # components whose corrections are made one by one between two matrix products
TILE = 1 << 14  # columns worked on at once: fewer, and threads wait for each other between the calls


def begun(problem: Problem, how: How) -> State:
    """Return the nearest codes of the components, each side by itself, with least-squares scales."""
    (b, left), (a, right) = (_rounded(x, how) for x in (problem.b, problem.a))
    return assessed(problem, b, a, left, right, gram_matrices(problem, b, a, how))


def _rounded(x: Array, how: How) -> tuple[Array, Array]:
    xp, n = namespace(x), x.shape[1]
    values, scales = [], []
    for one, i, j in runs(how.bits):
        rows = x[i:j, :]
        if one == HALF:
            values.append(stored(rows))
            scales.append(xp.ones((j - i, groups(n, how.group)), dtype=xp.float32, device=device_of(x)))
            continue
        scale = _first_scale(rows, one, how)
        for _ in range(1 if one == 1 else 3):
            size = spread(xp.where(scale == 0, TINY, scale), n, how.group)
            level = decoded(nearest(rows / size, one, how.book), one, how.book)
            scale = _fitted(rows, level, how.group, scale)
        scale = stored(scale)
        values.append(level * spread(scale, n, how.group))
        scales.append(scale)
    return xp.concat(values), xp.concat(scales)


def _first_scale(x: Array, bits: int, how: How) -> Array:
    """Return the root mean square of every group, or for even levels its largest magnitude over the outermost level."""
    xp = namespace(x)
    if is_even(bits, how.book):
        return largest(x, how.group) / ((1 << (bits - 1)) - 0.5) + TINY
    return xp.sqrt(grouped(x * x, how.group) / grouped(xp.ones_like(x), how.group)) + TINY


def _fitted(x: Array, level: Array, group: int, before: Array) -> Array:
    """Return the least-squares scale <x, level> / <level, level> of every group."""
    xp = namespace(x)
    top, bottom = grouped(x * level, group), grouped(level * level, group)
    return xp.where(bottom > 0, top / xp.where(bottom > 0, bottom, 1.0), before)


def swept(problem: Problem, state: State, how: How) -> State:
    """Improve the codes of b given a, those of a given b, then the scales of the components."""
    b = _improved(state.b, state.left, up(state.ad) @ problem.b, up(state.aa), how)
    bb, bd = how.gram(b, b), how.gram(b, problem.b)
    a = _improved(state.a, state.right, up(bd) @ problem.a, up(bb), how)
    seen = problem.weigh(a)
    return _refitted(problem, b, a, state, (bb, bd, how.gram(seen, a), how.gram(seen, problem.a)), how)


def _improved(values: Array, scales: Array, target: Array, gram: Array, how: How) -> Array:
    """Return values (k, n) that lower x^T gram x - 2 x^T target in every column: one pass over the components.

    ``target`` (k, n) and ``gram`` (k, k) are the linear and the quadratic term; what is stored plainly stays.
    """
    xp, (k, n) = namespace(values), values.shape
    size = spread(scales, n, how.group)
    diagonal = [float(gram[j, j]) for j in range(k)]
    done = []
    for start in range(0, n, TILE):
        part = slice(start, min(start + TILE, n))
        now = xp.asarray(values[:, part], copy=True)
        scale = size[:, part] if how.group else size
        for i in range(how.half, k, BLOCK):
            _improve_block(now, target[i : i + BLOCK, part], scale, gram, diagonal, i, how)
        done.append(now)
    return done[0] if len(done) == 1 else xp.concat(done, axis=1)


def _improve_block(
    now: Array, goal: Array, scale: Array, gram: Array, diagonal: Sequence[float], i: int, how: How
) -> None:
    """Write the better values of components i, i + 1, ... into ``now``: each sees the new ones of all before it.

    A matrix product takes off what all others say, but for the block's own components up to each one, whose new values
    are not known yet; these follow one by one.
    """
    stop = i + goal.shape[0]
    xp = namespace(now)
    others = xp.concat([gram[i:stop, :i], xp.triu(gram[i:stop, i:stop], k=1), gram[i:stop, stop:]], axis=1)
    rest = goal - others @ now
    for j in range(i, stop):
        if diagonal[j] > 0:
            pull = rest[j - i, :] - gram[j, i:j] @ now[i:j, :] if j > i else rest[0, :]
            now[j, :] = _best(pull, scale[j, :], diagonal[j], how.bits[j], how.book)


def _best(pull: Array, scale: Array, weight: float, bits: int, book: int) -> Array:
    """Return the values nearest to pull / weight among the levels times scale."""
    xp = namespace(pull)
    if bits == 1:
        return xp.copysign(scale, pull)
    wanted = pull / (weight * xp.where(scale == 0, TINY, scale))
    return snapped(wanted, bits, book) * scale


def _refitted(problem: Problem, b: Array, a: Array, old: State, grams: tuple[Array, ...], how: How) -> State:
    """Return the state with a factor on every component, the least-squares one, split between both sides.

    c solves (b'b'^T o a'a'^T) c = diag(b' D a'^T); a tiny ridge keeps it solvable.
    """
    bb, bd, aa, ad = grams
    xp = namespace(bb)
    quadratic, linear, k = bb * aa, xp.sum(bd * ad, axis=1), bb.shape[0]
    ridge = 1e-9 * float(xp.sum(xp.linalg.diagonal(quadratic))) / k + 1e-300
    eye = xp.eye(k, dtype=quadratic.dtype, device=device_of(quadratic))
    factor = xp.linalg.solve(quadratic + ridge * eye, linear)
    root = up(xp.sqrt(xp.abs(factor)))[:, None]
    left = stored(old.left * root * up(xp.where(factor < 0, -1.0, 1.0))[:, None])
    right = stored(old.right * root)
    one, two = _ratio(left, old.left), _ratio(right, old.right)
    b, a = b * spread(one, b.shape[1], how.group), a * spread(two, a.shape[1], how.group)
    if how.group:
        return assessed(problem, b, a, left, right, gram_matrices(problem, b, a, how))
    f, g = up(one, "float64"), up(two, "float64")
    return assessed(problem, b, a, left, right, (bb * f * f.mT, bd * f, aa * g * g.mT, ad * g))


def _ratio(new: Array, old: Array) -> Array:
    xp = namespace(new)
    return new / xp.where(old == 0, 1.0, old)
