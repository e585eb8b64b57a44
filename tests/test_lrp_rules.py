"""LRP by Chefer et al.'s rules, against relevance that is propagated explicitly through one block."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipmapper.relevance import backward_rules

TOKENS, WIDTH, HEADS = 5, 8, 2


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP, and a linear head on token 0."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x, mask=None, keep=None):
        q, k, v = (self.split(t) for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if keep is not None:
            keep.append((q, k, v, mixed))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return self.head(self.norm_3(x)[:, 0])[:, 0]

    @staticmethod
    def split(t):
        return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def model_and_input():
    torch.manual_seed(0)
    model = Block().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model.requires_grad_(False), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)


def linear_relevance(R, x, layer):
    px, nx = x.clamp(min=0), x.clamp(max=0)
    pw, nw = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    S = R / (px @ pw.T + nx @ nw.T)
    return px * (S @ pw) + nx * (S @ nw)


def shared(R, a, b):
    S = R / (a + b)
    ra, rb = a * S, b * S
    whole = ra.sum().abs() + rb.sum().abs()
    return ra * (ra.sum().abs() / whole * R.sum() / ra.sum()), rb * (
        rb.sum().abs() / whole * R.sum() / rb.sum()
    )


def explicit(model, x, mask):
    """Relevance of the input [N, C] and of attention [H, N, N] of one sample, from 1 at the output."""
    normed = model.norm_1(x)
    packed = model.qkv(normed)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in packed.chunk(3, dim=-1))
    scores = q @ k.mT
    A = (scores / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    mixed = A @ v
    a = model.out(mixed.transpose(0, 1).flatten(1))
    x1 = x + a
    normed_2 = model.norm_2(x1)
    hidden = model.up(normed_2)
    active = F.gelu(hidden)
    b = model.down(active)
    x2 = x1 + b
    normed_3 = model.norm_3(x2)

    R3 = torch.zeros_like(x2)
    R3[0] = linear_relevance(torch.ones(1, dtype=x.dtype), normed_3[0], model.head)
    R_x1, R_b = shared(R3, x1, b)
    R_hidden = linear_relevance(R_b, active, model.down)
    R_x1 = R_x1 + linear_relevance(R_hidden, normed_2, model.up)
    R_x, R_a = shared(R_x1, x, a)
    R_mixed = linear_relevance(R_a, mixed.transpose(0, 1).flatten(1), model.out)
    S = R_mixed.unflatten(-1, (HEADS, -1)).transpose(0, 1) / mixed
    R_A, R_v = A * (S @ v.mT) / 2, v * (A.mT @ S) / 2
    S = R_A / scores
    R_q, R_k = q * (S @ k) / 2, k * (S.mT @ q) / 2
    R_packed = torch.cat([t.transpose(0, 1).flatten(1) for t in (R_q, R_k, R_v)], dim=-1)
    return R_x + linear_relevance(R_packed, normed, model.qkv), R_A


@pytest.mark.parametrize("masked", [False, True])
def test_relevance_is_the_tensor_times_its_gradient(masked):
    model, x = model_and_input()
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    if masked:
        mask = mask.tril()
    x.requires_grad_()
    kept = []
    with backward_rules("lrp"):
        y = model(x, mask, kept)
    torch.testing.assert_close(y, model(x, mask), rtol=0, atol=1e-13)
    q, k, v, mixed = kept[0]
    dx, dmixed = torch.autograd.grad((y / y.detach()).sum(), [x, mixed])
    A = ((q @ k.mT) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    for sample in range(2):
        R_x, R_A = explicit(model, x[sample].detach(), mask)
        torch.testing.assert_close((x * dx)[sample].detach(), R_x, rtol=1e-5, atol=1e-7)
        found = (A * (dmixed @ v.mT) / 2)[sample].detach()
        torch.testing.assert_close(found, R_A, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rules", ["libra", "attn_lrp", "lrp"])
def test_everything_is_restored_after_an_exception(rules):
    model, x = model_and_input()
    x.requires_grad_()
    plain = torch.autograd.grad(model(x).sum(), x)[0]
    with pytest.raises(KeyError), backward_rules(rules):
        other = torch.autograd.grad(model(x).sum(), x)[0]
        assert not torch.allclose(other, plain, rtol=1e-3)
        raise KeyError
    assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], plain)
    assert F.has_torch_function.__module__ != "clipmapper.relevance.backward.rules"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="must be one of plain, libra, attn_lrp, lrp"), backward_rules("lib"):
        pass


ACTIVATIONS = {
    "gelu": (nn.GELU(), lambda t: 0.5 * (1 + torch.erf(t / 2**0.5))),
    "gelu_tanh": (nn.GELU("tanh"), lambda t: F.gelu(t, approximate="tanh") / t),
    "silu": (nn.SiLU(), torch.sigmoid),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_are_constants(name):
    module, gate = ACTIVATIONS[name]
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    with backward_rules("libra"):
        y = module(x)
    assert torch.equal(y, module(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], gate(x.detach()))


@pytest.mark.parametrize("path", ["open_clip", "hf", "hf_new", "ours"])
def test_composed_activations(path):
    from open_clip.transformer import QuickGELU
    from transformers.activations import NewGELUActivation, QuickGELUActivation

    from clipmapper.models.mapper_blocks import QuickGELU as Ours

    kinds = {"open_clip": QuickGELU, "hf": QuickGELUActivation, "hf_new": NewGELUActivation, "ours": Ours}
    module = kinds[path]()
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    with backward_rules("libra"):
        y = module(x)
    plain = module(x)
    assert torch.equal(y, plain)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], (plain / x).detach())


def test_norms_and_attention_of_libra():
    torch.manual_seed(1)
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    norm, rms = nn.LayerNorm(8).double(), nn.RMSNorm(8).double()
    weight = torch.randn_like(x)

    def without_deviation(t):
        deviation = (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (t - t.mean(-1, keepdim=True)) / deviation.detach()

    def without_size(t):
        return t / (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt().detach()

    for module, naive in ((norm, without_deviation), (rms, without_size)):
        nn.init.normal_(module.weight)
        with backward_rules("libra"):
            y = module(x)
        assert torch.equal(y, module(x))
        expected = torch.autograd.grad((naive(x) * module.weight * weight).sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad((y * weight).sum(), x)[0], expected)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with backward_rules("libra"):
        y = attention(x, x, x, need_weights=False)[0]
    with torch.no_grad():
        _, A = attention(x, x, x, average_attn_weights=False)
        v_weight, v_bias = attention.in_proj_weight[16:], attention.in_proj_bias[16:]
    v = (x @ v_weight.T + v_bias).unflatten(-1, (2, 4)).transpose(1, 2)
    naive = attention.out_proj((A @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, naive)
    expected = torch.autograd.grad((naive * weight).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad((y * weight).sum(), x)[0], expected)


def test_keys_that_heads_share_get_the_relevance_of_all_of_them():
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, n, 3, 2, dtype=torch.float64) for n in (4, 2, 2))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    weight = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    found = []
    for shared in (True, False):
        with backward_rules("lrp"):
            if shared:
                out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            else:
                each = [t.repeat_interleave(2, dim=1) for t in (key, value)]
                out = F.scaled_dot_product_attention(query, *each)
        found.append(torch.autograd.grad((out * weight).sum(), (query, key, value)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_product_of_two_activations_is_halved():
    a, b = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with backward_rules("lrp"):
        product = a * b
    for tensor, gradient in zip((a, b), torch.autograd.grad(product.sum(), (a, b)), strict=True):
        torch.testing.assert_close((tensor * gradient).detach(), (product / 2).detach())


def explicit_blocks(model, x):
    """Two blocks and a head on token 0: per block A, R^A and ∇A of one sample."""
    records = []
    for norm_1, qkv, out, norm_2, up, down in model.layers():
        normed = norm_1(x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in qkv(normed).chunk(3, dim=-1))
        scores = q @ k.mT
        A = (scores / q.shape[-1] ** 0.5).softmax(-1)
        if not A.requires_grad:
            A.requires_grad_()
        mixed = A @ v
        flat = mixed.transpose(0, 1).flatten(1)
        a = out(flat)
        x1 = x + a
        normed_2 = norm_2(x1)
        active = F.gelu(up(normed_2))
        b = down(active)
        records.append((x, normed, q, k, v, scores, A, mixed, flat, a, x1, normed_2, active, b))
        x = x1 + b
    normed = model.vit.norm(x)
    y = model.vit.head(normed)[0, 1]
    gradients = torch.autograd.grad(y, [r[6] for r in records])
    R = torch.zeros_like(x)
    one_hot = torch.zeros(model.vit.head.out_features, dtype=x.dtype)
    one_hot[1] = 1
    R[0] = linear_relevance(one_hot, normed[0], model.vit.head)
    found = []
    for (_, qkv, out, _, up, down), record, gradient in zip(
        reversed(model.layers()), reversed(records), reversed(gradients), strict=True
    ):
        x, normed, q, k, v, scores, A, mixed, flat, a, x1, normed_2, active, b = record
        R_x1, R_b = shared(R, x1, b)
        R_x1 = R_x1 + linear_relevance(linear_relevance(R_b, active, down), normed_2, up)
        R_x, R_a = shared(R_x1, x, a)
        S = linear_relevance(R_a, flat, out).unflatten(-1, (HEADS, -1)).transpose(0, 1) / mixed
        R_A, R_v = A * (S @ v.mT) / 2, v * (A.mT @ S) / 2
        S = R_A / scores
        R_q, R_k = q * (S @ k) / 2, k * (S.mT @ q) / 2
        packed = torch.cat([t.transpose(0, 1).flatten(1) for t in (R_q, R_k, R_v)], dim=-1)
        R = R_x + linear_relevance(packed, normed, qkv)
        found.append((R_A.detach(), gradient))
    return found[::-1]


class Timm:
    """A timm ViT and the modules of its blocks in order."""

    def __init__(self):
        import timm

        torch.manual_seed(3)
        self.vit = timm.models.vision_transformer.VisionTransformer(
            8, 4, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=3, mlp_ratio=2
        )
        self.vit.double().eval().requires_grad_(False)
        for parameter in self.vit.parameters():
            nn.init.normal_(parameter, std=0.6)

    def layers(self):
        return [(b.norm1, b.attn.qkv, b.attn.proj, b.norm2, b.mlp.fc1, b.mlp.fc2) for b in self.vit.blocks]


def test_the_methods_on_a_vit():
    """Transformer attribution ``C ← C + E_h relu(∇A ⊙ R^A) C``; partial LRP is R^A of the last layer."""
    from clipmapper.relevance import Again, partial_lrp, record, transformer_attribution

    model, images = Timm(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with record(model.vit) as trace:
        y = model.vit(images)[:, 1]
    trace.backward(y)
    trace.again = Again(model.vit, lambda rows: model.vit(images[rows])[:, 1])
    attributed = transformer_attribution(trace).streams["image"]
    partial = partial_lrp(trace).streams["image"]
    vit = model.vit
    for sample in range(2):
        tokens = vit._pos_embed(vit.patch_embed(images[sample : sample + 1]))[0].detach().requires_grad_()
        found = explicit_blocks(model, tokens)
        C = torch.eye(len(tokens), dtype=torch.float64)
        for R_A, gradient in found:
            C = C + (gradient * R_A).clamp(min=0).mean(0) @ C
        assert (C[0] > 1e-3 * C[0].max()).sum() > 2
        torch.testing.assert_close(attributed[sample], C[0].detach(), rtol=1e-5, atol=1e-7)
        last = found[-1][0].clamp(min=0).mean(0)[0]
        torch.testing.assert_close(partial[sample], last, rtol=1e-5, atol=1e-7)
