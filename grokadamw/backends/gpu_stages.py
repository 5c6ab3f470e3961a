"""The stages slow_grad to limit_rows in the GPU's kernels, on values in registers."""

import triton
import triton.language as tl

from . import gpu_tables
from .rows import SHORT

# offsets of a batch's numbers, as `gpu_tables.words_of` packs them; the first five take two words: address and value
LR, ALPHA, CLIP, MAX_ROW_CHANGE, WEIGHT_DECAY = (tl.constexpr(i) for i in range(0, 10, 2))
BETA2, LOG_BETA2, EPS, LAMB, AMPLIFY_AFTER, SIGN = (tl.constexpr(i) for i in range(10, 16))
MICRO_STEPS, DECAYS, MAX_ROW_NORM, NTH, NUMBERS = (tl.constexpr(i) for i in range(16, 21))
SHORTEST = tl.constexpr(SHORT)
NARROW, WIDEST = (tl.constexpr(gpu_tables.WIDTHS[i]) for i in (0, -1))
BIT, LONG, ODD = (tl.constexpr(x) for x in (1, gpu_tables.LONG, gpu_tables.ODD))
# columns of the table of tensors, as `gpu_tables.Tables` packs them; those for tensors in fewer bits come last
AT_SIZE, AT_THETA, AT_M, AT_V, AT_MU, AT_STEP, AT_BETA1 = (tl.constexpr(i) for i in range(7))
AT_LOG_BIAS_BETA1, AT_BATCH, AT_ROW_WIDTH, AT_ROWS = (tl.constexpr(i) for i in range(7, 11))
AT_M_SCALES, AT_V_SCALES, AT_MU_SCALES, AT_LOW, AT_WIDTH, AT_DITHER = (tl.constexpr(i) for i in range(11, 17))


@triton.jit
def float64_at(words, place):
    """Return a float64 from a table of 64-bit integers."""
    return tl.load(words + place).to(tl.float64, bitcast=True)


@triton.jit
def number_at(words, place):
    """Return the float64 at the address that the table holds; if the address is 0, return the table's next word."""
    address = tl.load(words + place)
    return tl.load(address.to(tl.pointer_type(tl.float64)), mask=address != 0, other=float64_at(words, place + 1))


@triton.jit
def entry_of(table, tensors, i, numbers, HAS_MU: tl.constexpr):
    """Return what the tables say of the i-th tensor.

    That is: its place in the table, its size, the addresses of θ, m, v and μ, its step t (counted from 1), its β1, the
    logarithm of the β1 for m's bias correction, and the address of its batch's numbers.
    """
    here = table + i
    size = tl.load(here + AT_SIZE * tensors)
    theta = tl.load(here + AT_THETA * tensors)
    m = tl.load(here + AT_M * tensors)
    v = tl.load(here + AT_V * tensors)
    mu = tl.load(here + AT_MU * tensors) if HAS_MU else m
    t = tl.load(tl.load(here + AT_STEP * tensors).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
    beta1 = float64_at(here, AT_BETA1 * tensors)
    log_bias_beta1 = float64_at(here, AT_LOG_BIAS_BETA1 * tensors)
    of_batch = numbers + tl.load(here + AT_BATCH * tensors) * NUMBERS
    return here, size, theta, m, v, mu, t, beta1, log_bias_beta1, of_batch


@triton.jit
def numbers_of(
    of_batch, t, beta1, log_bias_beta1,
    REAL: tl.constexpr, EPS_FIRST: tl.constexpr, IS_PART: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Return the numbers that apply to all elements of a tensor at its step t."""
    lr = number_at(of_batch, LR)
    alpha = number_at(of_batch, ALPHA)
    clip = number_at(of_batch, CLIP) * float64_at(of_batch, SIGN)
    beta2 = float64_at(of_batch, BETA2)
    root = 1 / tl.sqrt(1 - tl.exp(t * float64_at(of_batch, LOG_BETA2)))
    step = lr / (1 - tl.exp(t * log_bias_beta1))
    eps = float64_at(of_batch, EPS)
    if EPS_FIRST:
        eps = eps * root
    lamb = tl.where(t > float64_at(of_batch, AMPLIFY_AFTER), float64_at(of_batch, LAMB), 0.0)
    decay = 1 - lr * number_at(of_batch, WEIGHT_DECAY)
    keep_mu = alpha
    keep_m = beta1
    keep_v = beta2
    add_v = 1 - beta2
    if IS_PART:
        micro_steps = float64_at(of_batch, MICRO_STEPS)
        decays = float64_at(of_batch, DECAYS) != 0
        clip = clip / micro_steps
        add_v = add_v * micro_steps
        keep_mu = tl.where(decays, keep_mu, 1.0)
        keep_m = tl.where(decays, keep_m, 1.0)
        keep_v = tl.where(decays, keep_v, 1.0)
        if not MOVES:
            lamb = lamb * 0
    clip, lamb, root, eps = clip.to(REAL), lamb.to(REAL), root.to(REAL), eps.to(REAL)
    keep_mu, keep_m, keep_v, decay, step = (
        keep_mu.to(REAL), keep_m.to(REAL), keep_v.to(REAL), decay.to(REAL), step.to(REAL)
    )  # fmt: skip
    add_mu, add_m, add_v = (1 - alpha).to(REAL), (1 - beta1).to(REAL), add_v.to(REAL)
    return clip, keep_mu, add_mu, lamb, keep_m, add_m, keep_v, add_v, root, eps, decay, step


@triton.jit
def slow_and_amplified(g, slow, keep_mu, add_mu, lamb):
    """Return μ and ĝ."""
    slow = keep_mu * slow + add_mu * g  # slow_grad
    return slow, g + lamb * slow  # amplify


@triton.jit
def moments(g, g_hat, first, second, keep_m, add_m, keep_v, add_v, RAW: tl.constexpr):
    """Return m and v."""
    first = keep_m * first + add_m * g_hat  # exp_avg
    squared = g * g if RAW else g_hat * g_hat
    return first, keep_v * second + add_v * squared  # exp_avg_sq


@triton.jit
def updated(old, first, second, root, eps, decay, step):
    """Return θ after the update."""
    if old.dtype == tl.float32:
        quotient = tl.div_rn(first, root * tl.sqrt_rn(second) + eps)
    else:
        quotient = first / (root * tl.sqrt(second) + eps)
    return decay * old - step * quotient


@triton.jit
def _share(times):
    """Return the factor for a row that is `times` times too long: 1 if it is not too long, or `times` is not finite."""
    return tl.where((times > 1) & (times < float("inf")), 1 / times, 1.0)


@triton.jit
def moved_by(old, new, inside):
    """Return the change of θ, with 0 for changes that are not finite."""
    moved = new - old
    return tl.where(inside & (moved - moved == 0), moved, 0)


@triton.jit
def limited(new, moved, share, share_of_norm, HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr, PARAM: tl.constexpr):
    """Return θ within the limits of its row. The shares are the factors that `shares` returns."""
    if HAS_CHANGE:
        new = new + moved * (share - 1).to(new.dtype)
    if HAS_NORM:
        new = new.to(PARAM).to(new.dtype) * share_of_norm.to(new.dtype)
    return new


@triton.jit
def shares(olds, moveds, news, products, change, norm, HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr):
    """Return the factor for a row's Δ, then the one for its new θ', from its Σ θ², Σ Δ², Σ θ'² and Σ θ' Δ."""
    share = tl.full(moveds.shape, 1, tl.float64)
    if HAS_CHANGE:
        length = tl.sqrt(olds)
        length = tl.where(length < SHORTEST, SHORTEST, length)  # NaN stays NaN
        share = _share(tl.where(change > 0, tl.sqrt(moveds) / (change * length), 0))
    share_of_norm = tl.full(moveds.shape, 1, tl.float64)
    if HAS_NORM:
        more = share - 1
        length = tl.sqrt(news + 2 * more * products + more * more * moveds)
        share_of_norm = _share(tl.where(norm > 0, length / norm, 0))
    return share, share_of_norm
