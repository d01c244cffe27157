"""Flash-decoding (Dao et al. 2023): one new token a row attends to its slot of the cache, which it joins.

    row b, query head h of the group that shares key head j:

    o = sum_s softmax_s(q . k_s / sqrt(D)) v_s,    s = 0..lengths[b]

A program takes one row, one key head (with all its query heads, so that the cache is read once for them) and
one part of the positions; it keeps a running maximum m of the scores (times log2 e), the sum l of 2^(score -
m) and the values a weighted so (Milakov & Gimelshein 2018). It ends with o_i = a / l and lse_i = m + log2 l,
and the parts merge to

    o = sum_i 2^(lse_i - M) o_i / sum_i 2^(lse_i - M),    M = max_i lse_i

The first part starts from the new token itself, still in registers, and writes it to the cache; the others
only read what was there before. So there is no second kernel for the cache and no race. The parts are cut by
each row's own length. There are enough to fill the card even for a small batch, and none is longer than
LONGEST: else one program would walk a straggler of 4,096 positions among many short rows while the card
waits. A part without positions ends at once.

Bytes: the cache once, 4 K D a position in bfloat16, against 4 H D flops; so memory decides, and H100's 3.35
TB/s is the roof.
"""
import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # the hardware's exponential is of base 2
LONGEST = 512  # positions of a part
BLOCK_S = 64  # positions of a tile


@triton.jit
def _part(
    q, k, v, past_k, past_v, lengths, out, lse, row_stride, head_stride, scale, K, G, D,
    PARTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    g = tl.arange(0, BLOCK_G)  # the query heads of the group
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    length = tl.load(lengths + b)
    # Whole tiles, so that only a row's last one is ragged.
    positions = tl.cdiv(tl.cdiv(length, PARTS), BLOCK_S) * BLOCK_S
    start = part * positions
    end = tl.minimum(start + positions, length)
    if start >= end and part > 0:
        empty = ((b * K + head) * G + g) * PARTS + part
        tl.store(lse + empty, tl.full((BLOCK_G,), float("-inf"), tl.float32), g < G)
        return
    past_k += b * row_stride + head * head_stride
    past_v += b * row_stride + head * head_stride
    heads = (b * K + head) * G + g  # (BLOCK_G,)
    query = tl.load(q + heads[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :], 0.0)

    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_G,), tl.float32)
    a = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if part == 0:
        new_k = tl.load(k + (b * K + head) * D + d, d < D, 0.0)
        new_v = tl.load(v + (b * K + head) * D + d, d < D, 0.0)
        tl.store(past_k + length * D + d, new_k, d < D)
        tl.store(past_v + length * D + d, new_v, d < D)
        m = tl.sum(query.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
        l += 1.0
        a += new_v.to(tl.float32)[None, :]
    for first in range(start, end, BLOCK_S):
        at = first + s
        k_mask = (at < end)[None, :] & (d < D)[:, None]
        keys = tl.load(past_k + at[None, :] * D + d[:, None], k_mask, 0.0)  # (BLOCK_D, BLOCK_S)
        z = tl.dot(query, keys, input_precision="ieee") * scale
        z = tl.where((at < end)[None, :], z, float("-inf"))
        higher = tl.maximum(m, tl.max(z, 1))
        p = tl.exp2(z - higher[:, None])
        fade = tl.exp2(m - higher)
        v_mask = (at < end)[:, None] & (d < D)[None, :]
        values = tl.load(past_v + at[:, None] * D + d[None, :], v_mask, 0.0)  # (BLOCK_S, BLOCK_D)
        a = a * fade[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        l = l * fade + tl.sum(p, 1)
        m = higher

    rows = heads * PARTS + part
    tl.store(out + rows[:, None] * D + d[None, :], a / l[:, None], (g < G)[:, None] & (d < D)[None, :])
    tl.store(lse + rows, m + tl.log2(l), g < G)


@triton.jit
def _merge(parts, lse, out, D, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    e = tl.load(lse + head * PARTS + p, p < PARTS, float("-inf"))
    w = tl.exp2(e - tl.max(e))
    mask = (w > 0)[:, None] & (d < D)[None, :]  # an empty part has written no values
    a = tl.load(parts + (head * PARTS + p[:, None]) * D + d[None, :], mask, 0.0)
    tl.store(out + head * D + d, tl.sum(w[:, None] * a, 0) / tl.sum(w), d < D)


def part_count(B, K, S, processors):
    """Into how many parts to cut each row's positions, of which there may be S."""
    filling = min(4 * processors // (B * K), triton.cdiv(S, 256), 64)
    return max(filling, triton.cdiv(S, LONGEST))


def decode_attention(q, k, v, past_k, past_v, lengths, parts=0):
    """As `reference.decode_attention`.

    `parts`: how many to cut each row's positions into; 0 takes what suits the card.
    """
    B, H, D = q.shape
    K, S = past_k.shape[1:3]
    assert past_k.stride()[2:] == (D, 1) and past_k.stride() == past_v.stride()
    row_stride, head_stride = past_k.stride()[:2]
    if not parts:
        gpu = q.device.type == "cuda"
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if gpu else 2
        parts = part_count(B, K, S, processors)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    pieces = out if parts == 1 else torch.empty(B, H, parts, D, device=q.device)
    lse = torch.empty(B, H, parts, device=q.device)
    BLOCK_G = max(16, triton.next_power_of_2(H // K))
    BLOCK_D = triton.next_power_of_2(max(D, 16))
    scale = D**-0.5 * LOG2_E
    # Tiles in flight. In float32 and 128 wide three of them take more shared memory than small cards have.
    stages = 3 if BLOCK_D * q.element_size() < 512 else 2
    _part[(B, K, parts)](
        q, k, v, past_k, past_v, lengths, pieces, lse, row_stride, head_stride, scale, K, H // K, D,
        parts, BLOCK_G, BLOCK_D, BLOCK_S, num_warps=4, num_stages=stages)
    if parts > 1:
        BLOCK_P = triton.next_power_of_2(parts)
        _merge[(B * H,)](pieces, lse, out, D, parts, BLOCK_P, BLOCK_D, num_warps=2)
    return out
