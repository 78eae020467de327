"""The published networks once more, by their formulas alone: plain operations on a state dict, float64, token by token.

Nothing here calls the project's models, mixers, scans or norms. ``p`` is a state dict in the published names.

Shapes: B batch, L tokens, D width, E inner channels, N states.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(p: dict, name: str, x: Tensor) -> Tensor:
    out = x @ p[f"{name}.weight"].T
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def rms_norm(p: dict, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"]


def layer_norm(x: Tensor, eps: float, p: dict | None = None, name: str = "") -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    x = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x if p is None else x * p[f"{name}.weight"] + p[f"{name}.bias"]


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t 10000^(-i / half), an odd width's last column 0."""
    half = dim // 2
    angle = t.double()[:, None] * torch.tensor(
        [10000 ** (-i / half) for i in range(half)], dtype=torch.float64
    )
    out = torch.cat([angle.cos(), angle.sin()], 1)
    return F.pad(out, (0, dim % 2))


def sincos_table(side: int, dim: int) -> Tensor:
    """(side^2, D): the column's [sin | cos], then the row's."""
    rows = []
    for row in range(side):
        for column in range(side):
            entry = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                entry += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(entry)
    return torch.tensor(rows, dtype=torch.float64)


def patches(p: dict, name: str, x: Tensor) -> tuple[Tensor, int, int]:
    """(B, h w, D) tokens in raster order, h and w."""
    weight = p[f"{name}.weight"]
    side = weight.shape[-1]
    b, c, height, width = x.shape
    h, w = height // side, width // side
    cut = x.reshape(b, c, h, side, w, side).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, -1)
    return cut @ weight.reshape(len(weight), -1).T + p[f"{name}.bias"], h, w


def image(tokens: Tensor, h: int, w: int, side: int) -> Tensor:
    """Of tokens whose entries are (p1, p2, channel)."""
    b = len(tokens)
    parts = tokens.reshape(b, h, w, side, side, -1).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(b, -1, h * side, w * side)


def mamba_branch(p: dict, pre: str, u: Tensor, z: Tensor, mark: str = "") -> Tensor:
    """One direction, (B, L, E), of the weights whose names end in ``mark`` ("" or "_b")."""
    taps, rank = p[f"{pre}.conv1d{mark}.weight"][:, 0], p[f"{pre}.dt_proj{mark}.weight"].shape[1]
    length, width = u.shape[1], taps.shape[1]
    padded = F.pad(u, (0, 0, width - 1, 0))
    u = sum(padded[:, k : k + length] * taps[:, k] for k in range(width)) + p[f"{pre}.conv1d{mark}.bias"]
    u = F.silu(u)
    A = -torch.exp(p[f"{pre}.A{mark}_log"])
    states = A.shape[1]
    dt, B, C = linear(p, f"{pre}.x_proj{mark}", u).split([rank, states, states], -1)
    delta = F.softplus(linear(p, f"{pre}.dt_proj{mark}", dt))
    h, out = torch.zeros(len(u), *A.shape, dtype=u.dtype), []
    for i in range(length):
        step = delta[:, i, :, None]
        h = torch.exp(step * A) * h + step * B[:, i, None] * u[:, i, :, None]
        out.append((h * C[:, i, None]).sum(-1))
    return (torch.stack(out, 1) + p[f"{pre}.D{mark}"] * u) * F.silu(z)


def mamba(p: dict, pre: str, x: Tensor) -> Tensor:
    """The mixer, both directions of it where the weights have two."""
    u, z = linear(p, f"{pre}.in_proj", x).chunk(2, -1)
    out = mamba_branch(p, pre, u, z)
    if f"{pre}.A_b_log" in p:
        out = out + mamba_branch(p, pre, u.flip(1), z.flip(1), "_b").flip(1)
    return linear(p, f"{pre}.out_proj", out)


def attention(p: dict, pre: str, x: Tensor, heads: int) -> Tensor:
    b, length, dim = x.shape
    q, k, v = linear(p, f"{pre}.qkv", x).reshape(b, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(dim // heads), -1)
    return linear(p, f"{pre}.proj", (weights @ v).transpose(1, 2).reshape(b, length, dim))


def dit(p: dict, kwargs: dict, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT and, of its output the first half where there is a variance, SiT."""
    tokens, h, w = patches(p, "x_embedder.proj", x)
    tokens = tokens + p["pos_embed"]
    c = linear(p, "t_embedder.mlp.2", F.silu(linear(p, "t_embedder.mlp.0", sinusoid(t, 256))))
    c = c + p["y_embedder.embedding_table.weight"][y]
    for i in range(kwargs["depth"]):
        pre = f"blocks.{i}"
        parts = linear(p, f"{pre}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        for part, (shift, scale, gate) in enumerate((parts[:3], parts[3:])):
            z = layer_norm(tokens, 1e-6) * (1 + scale) + shift
            if part == 0:
                z = attention(p, f"{pre}.attn", z, kwargs["num_heads"])
            else:
                z = linear(p, f"{pre}.mlp.fc2", F.gelu(linear(p, f"{pre}.mlp.fc1", z), approximate="tanh"))
            tokens = tokens + gate * z
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    out = linear(p, "final_layer.linear", layer_norm(tokens, 1e-6) * (1 + scale) + shift)
    return image(out, h, w, kwargs["patch_size"])


def guided_dit(network, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
    """The published call: the first half of x twice, guidance on the first three channels."""
    half = x[: len(x) // 2]
    out = network(torch.cat([half, half]), t, y)
    cond, uncond = out[:, :3].chunk(2)
    guided = uncond + scale * (cond - uncond)
    return torch.cat([torch.cat([guided, guided]), out[:, 3:]], 1)


def uvit(p: dict, kwargs: dict, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """U-ViT with labels, text (B, S, d) or neither."""
    dim, patch = kwargs["embed_dim"], kwargs["patch_size"]
    tokens, h, w = patches(p, "patch_embed.proj", x)
    time = sinusoid(t, dim)
    if "time_embed.0.weight" in p:
        time = linear(p, "time_embed.2", F.silu(linear(p, "time_embed.0", time)))
    parts = [time[:, None], tokens]
    if "label_emb.weight" in p:
        parts = [p["label_emb.weight"][y][:, None], *parts]
    elif "context_embed.weight" in p:
        parts = [time[:, None], linear(p, "context_embed", y), tokens]
    x = torch.cat(parts, 1) + p["pos_embed"]
    extras, kept = x.shape[1] - h * w, []
    half = kwargs["depth"] // 2
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for name in names:
        if name.startswith("out_"):
            skipped = kept.pop()
            if f"{name}.skip_linear.weight" in p:
                x = linear(p, f"{name}.skip_linear", torch.cat([x, skipped], -1))
        x = x + attention(p, f"{name}.attn", layer_norm(x, 1e-5, p, f"{name}.norm1"), kwargs["num_heads"])
        z = layer_norm(x, 1e-5, p, f"{name}.norm2")
        x = x + linear(p, f"{name}.mlp.fc2", F.gelu(linear(p, f"{name}.mlp.fc1", z)))
        if name.startswith("in_"):
            kept.append(x)
    out = linear(p, "decoder_pred", layer_norm(x, 1e-5, p, "norm"))[:, extras:]
    out = image(out, h, w, patch)
    if "final_layer.weight" in p:
        out = F.conv2d(out, p["final_layer.weight"], p["final_layer.bias"], padding=1)
    return out


def dis(p: dict, kwargs: dict, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    tokens, h, w = patches(p, "patch_embed.proj", x)
    c = sinusoid(t, kwargs["embed_dim"])
    if "time_embed.0.weight" in p:
        c = linear(p, "time_embed.2", F.silu(linear(p, "time_embed.0", c)))
    parts = [c[:, None], tokens]
    if "label_emb.embedding_table.weight" in p:
        label = p["label_emb.embedding_table.weight"][y]
        parts, c = [label[:, None], *parts], c + label
    hidden = torch.cat(parts, 1) + p["pos_embed"]
    extras, residual, kept = len(parts) - 1, 0, []
    eps = kwargs.get("norm_epsilon", 1e-5)

    def norm(name, z):
        return rms_norm(p, name, z, eps) if f"{name}.bias" not in p else layer_norm(z, eps, p, name)

    half = kwargs["depth"] // 2
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for name in names:
        if f"{name}.skip_linear.weight" in p:
            hidden = linear(p, f"{name}.skip_linear", torch.cat([hidden, kept.pop()], -1))
        residual = residual + hidden
        hidden = mamba(p, f"{name}.mixer", norm(f"{name}.norm", residual))
        if name.startswith("in_"):
            kept.append(hidden)
    out = layer_norm(norm("norm_f", residual + hidden), 1e-6)
    if "final_layer.adaLN_modulation.1.weight" in p:
        shift, scale = linear(p, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
        out = out * (1 + scale) + shift
    return image(linear(p, "final_layer.linear", out)[:, extras:], h, w, kwargs["patch_size"])


def dim_orders(h: int, w: int) -> dict[int, list[int]]:
    """The published directions over a grid: rows, rows reversed, columns, columns reversed, in this order."""
    rows = [i * w + j for i in range(h) for j in range(w)]
    columns = [i * w + j for j in range(w) for i in range(h)]
    return {0: rows, -2: rows[::-1], 1: columns, -1: columns[::-1]}


def dim_chain(depth: int, start: int, length: int) -> list[list[int]]:
    """[before, now] by layer: the first directions in turn up to the middle, the same way back, 0 before and last."""
    cycle = list(dim_orders(1, 1))[: length + 1]
    middle = start + (depth - start) // 2
    place, before, chain = 0, 0, []
    for layer in range(depth):
        if layer < start or layer == depth - 1:
            place = 0
        else:
            place = (place + (1 if layer < middle else -1)) % len(cycle)
        chain.append([before, cycle[place]])
        before = cycle[place]
    return chain


def pad_layout(h: int, w: int, pads: int, name: str) -> list[list[int]]:
    """Patches 1.., the k-th pad as -(k + 1)."""
    grid = [[i * w + j + 1 for j in range(w)] + [-(k + 1) for k in range(pads)] for i in range(h)]
    if name == "lateral":
        return grid + [[-(k + 1)] * (w + pads) for k in range(pads)]
    cycle = [-(i % pads + 1) for i in range(pads * (w + pads))]
    return grid + [cycle[i * (w + pads) : (i + 1) * (w + pads)] for i in range(pads)]


def dim_network(p: dict, kwargs: dict, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiM: every block takes the padded grid to its own direction and back."""
    depth, start = kwargs["num_layers"], kwargs.get("encoder_start_blk_id", 1)
    width = kwargs["attention_head_dim"] * kwargs["num_attention_heads"]
    rate = kwargs.get("tkn_conv_dilated_rate", 1)
    tokens, h, w = patches(p, "pos_embed.proj", x)
    sin = sinusoid(t, 256)
    embedded = linear(p, "adaln_single.emb.timestep_embedder.linear_1", sin)
    embedded = linear(p, "adaln_single.emb.timestep_embedder.linear_2", F.silu(embedded))
    embedded = embedded + p["adaln_single.emb.class_embedder.embedding_table.weight"][y]
    shared = linear(p, "adaln_single.linear", F.silu(embedded)).reshape(len(x), 3, width)
    time = sinusoid(t, width)
    if "time_embed.0.weight" in p:
        time = linear(p, "time_embed.2", F.silu(linear(p, "time_embed.0", time)))
    label = p["label_emb.weight"][y]
    front = torch.stack([time, label], 1) + p["additional_embed"][:, :2]
    table = p["additional_embed"][:, 2:]
    if table.shape[1] != h * w:
        side = math.isqrt(table.shape[1])
        table = table.transpose(1, 2).reshape(1, width, side, side)
        table = F.interpolate(table, (h, w), mode="bilinear").flatten(2).transpose(1, 2)
    tokens = tokens + table

    def smooth(name: str, z: Tensor) -> Tensor:
        z = z.transpose(1, 2).reshape(len(z), width, h, w)
        z = F.conv2d(z, p[f"{name}.weight"], p[f"{name}.bias"], padding=rate, dilation=rate, groups=width)
        return z.flatten(2).transpose(1, 2)

    tokens = smooth("a4m_adapter.first_smoother", tokens)
    pads = p["a4m_adapter.pad_token"][0].T
    count = len(pads)
    layout = next(s for s in kwargs["pad_token_schedules"] if s != "dec_split")
    cells = [c for row in pad_layout(h, w, count, layout) for c in row]
    grid = torch.stack([tokens[:, c - 1] if c > 0 else pads[-c - 1].expand(len(x), -1) for c in cells], 1)
    if "a4m_adapter.pad_token_dec_split" in p:
        front = torch.cat([front, p["a4m_adapter.pad_token_dec_split"].expand(len(x), -1, -1)], 1)
    orders, length = dim_orders(h + count, w + count), kwargs.get("scan_pattern_len", 3)
    chain = dim_chain(depth, start, max(length, 0))
    # Tokens stay in raster order here, so that what is kept needs the published order of the joining block: the one
    # that the stream has before the block re-orders it, which is that of the block that kept.
    stream, kept, joins = torch.cat([front, grid], 1), [], (depth - start) // 2
    for i in range(depth):
        pre = f"transformer_blocks.{i}"
        if kwargs.get("is_uconnect", True) and i >= depth - joins:
            other = kept.pop()
            if f"{pre}.skip_linear.weight" in p:
                stream = linear(p, f"{pre}.skip_linear", torch.cat([stream, other], -1))
            else:
                stream = linear(p, f"{pre}.skip_linear.0", stream) + linear(p, f"{pre}.skip_linear.1", other)
        shift, scale, gate = (p[f"{pre}.scale_shift_table"] + shared)[:, :, None].unbind(1)
        order = torch.tensor([*range(front.shape[1]), *(front.shape[1] + k for k in orders[chain[i][1]])])
        z = rms_norm(p, f"{pre}.norm1.norm", stream) * (1 + scale) + shift
        mixed = torch.empty_like(z)
        mixed[:, order] = mamba(p, f"{pre}.attn1", z[:, order])
        stream = stream + (1 + gate) * mixed
        if start <= i < start + joins:
            kept.append(stream)
    body = stream[:, front.shape[1] :]
    out = body[:, [k for k, c in enumerate(cells) if c > 0]]
    out = smooth("a4m_adapter.last_smoother", out)
    shift, scale = linear(p, "proj_out_1", F.silu(time + label))[:, None].chunk(2, -1)
    out = image(
        linear(p, "proj_out_2", rms_norm(p, "norm_out.norm", out) * (1 + scale) + shift),
        h,
        w,
        kwargs["patch_size"],
    )
    if "final_layer.weight" in p:
        out = F.conv2d(out, p["final_layer.weight"], p["final_layer.bias"], padding=1)
    return out


def zigma(
    p: dict,
    kwargs: dict,
    orders: list[list[int]],
    x: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    dropped: list | None = None,
) -> Tensor:
    """ZigMa on images; layer i gathers by ``orders[i]`` before its mixer and by the inverse after it.

    ``dropped`` has, for the input of each block and of the last norm, a factor (B, 1, 1) of drop path.
    """
    dropped = dropped or [1.0] * (kwargs["depth"] + 1)
    tokens, h, w = patches(p, "x_embedder.proj", x)
    if "pos_embed" in p:
        tokens = tokens + p["pos_embed"]
    c = linear(p, "t_embedder.mlp.2", F.silu(linear(p, "t_embedder.mlp.0", sinusoid(t.double() * 1000, 256))))
    if "y_embedder.embedding_table.weight" in p:
        c = c + p["y_embedder.embedding_table.weight"][y]
    eps, residual = kwargs.get("norm_epsilon", 1e-5), 0

    def norm(name, z):
        return rms_norm(p, name, z, eps) if f"{name}.bias" not in p else layer_norm(z, eps, p, name)

    for i in range(kwargs["depth"]):
        residual = residual + dropped[i] * tokens
        normed = norm(f"blocks.{i}.norm", residual)
        shift, scale, gate = linear(p, f"blocks.{i}.adaLN_modulation.1", F.silu(c))[:, None].chunk(3, -1)
        order = torch.tensor(orders[i])
        mixed = mamba(p, f"blocks.{i}.mixer", (normed * (1 + scale) + shift)[:, order])
        tokens = normed + gate * mixed[:, torch.argsort(order)]
    out = layer_norm(norm("norm_f", residual + dropped[-1] * tokens), 1e-6)
    return image(linear(p, "final_layer.linear", out), h, w, kwargs["patch_size"])
