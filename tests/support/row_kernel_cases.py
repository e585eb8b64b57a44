"""The kernels for a GPU against the reference; as a program: on the CPU, in Triton's interpreter."""

import os
from dataclasses import replace

import torch

from clipmapper.relevance.methods.weighted import weighted_rule, weighted_token_rule
from clipmapper.relevance.propagation import positive_attention, rows_times, signed_attention
from clipmapper.relevance.trace import Attention, AttentionTrace, Node, exact_step

# batch, heads, queries, keys, channels, width, causal, scale
CASES = (
    (2, 3, 5, 5, 8, 24, False, None),
    (1, 2, 70, 131, 16, 300, False, 0.2),
    (2, 1, 65, 65, 24, 24, True, None),
    (1, 2, 130, 64, 64, 128, False, None),
)


def sublayer(batch, heads, queries, keys, channels, width, causal, scale, dtype, generator) -> Attention:
    def heads_of(tokens):
        # As models have them: heads are a split of the width, so the tensor is not contiguous.
        return torch.randn(batch, tokens, heads, channels, generator=generator).to(dtype).transpose(1, 2)

    def tokens(dtype, first=False):
        drawn = torch.randn(queries, batch, width, generator=generator).to(dtype).transpose(0, 1)
        return drawn if first else drawn.contiguous()

    step = Attention(
        "a", Node("s", 0), Node("s" if queries == keys else "t", 0), Node("s", 1), heads_of(queries),
        heads_of(keys), heads_of(keys), heads_of(queries), None, scale, causal,
        tokens(torch.float32, first=True), tokens(dtype), mixed_gradient=heads_of(queries),
        before_gradient=tokens(torch.float32), added_gradient=tokens(dtype, first=True),
    )  # fmt: skip
    step.mixed_gradient[:, :, 1] = 0  # a row without any evidence
    step.before_gradient[:, 2] = step.added_gradient[:, 2] = 0  # a token that does not matter
    return step


def check(device: str, precision: float) -> None:
    # Triton reads here if it is to interpret.
    from clipmapper.relevance import kernels

    generator = torch.Generator().manual_seed(0)
    for number, case in enumerate(CASES):
        # (Triton's interpreter multiplies the bits of bfloat16 as if they were integers.)
        half = torch.bfloat16 if device == "cuda" and number % 2 else torch.float16
        step = sublayer(*case, half, generator)
        batch, queries = case[0], case[2]
        tensors = {name: value for name, value in vars(step).items() if isinstance(value, torch.Tensor)}
        tensors = {name.removeprefix("_"): value.to(device) for name, value in tensors.items()}
        step = replace(step, **tensors)
        exact = exact_step(step)
        assert exact is not step and kernels.can_multiply(step, torch.zeros(batch, 1, queries))
        whole = torch.rand(batch, 1, queries, generator=generator).to(device)
        one = torch.zeros_like(whole)
        one[:, :, min(66, queries - 1)] = 1
        valid = torch.rand(batch, queries, generator=generator).to(device) > 0.3
        turned = whole * torch.linspace(-1, 1, queries, device=device)
        for row, normalise in ((whole, True), (whole, False), (one, True), (turned, False)):
            expected = rows_times(positive_attention, exact, row, normalise)
            _agree(kernels.row_times_positive_attention(step, row, normalise), expected, precision)
        for row in (whole, one, turned):
            signed = rows_times(signed_attention, exact, row, False)[:1]
            _agree((kernels.row_times_signed_attention(step, row),), signed, precision)
        for row, its_valid, by_token in ((whole, None, False), (turned, valid, True), (one, valid, False)):
            trace = AttentionTrace([exact], {"s": queries}, {} if its_valid is None else {"s": its_valid})
            rule = weighted_token_rule(trace) if by_token else weighted_rule(trace)
            found = kernels.weighted_row(step, row, its_valid, by_token=by_token)
            _agree(found, rule(exact, row), precision)
    print(f"{len(CASES)} cases agree")


def _agree(found: tuple, expected: tuple, precision: float) -> None:
    for ours, its in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=precision)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    check("cpu", 1e-6)
