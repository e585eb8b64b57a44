"""The kernels for a GPU against ``rows_times``; as a program: on the CPU, in Triton's interpreter."""

import os
from dataclasses import replace

import torch

from clipmapper.relevance.propagation import positive_attention, rows_times
from clipmapper.relevance.trace import Attention, Node

# batch, heads, queries, keys, channels, causal, scale
CASES = (
    (2, 3, 5, 5, 8, False, None),
    (1, 2, 70, 131, 16, False, 0.2),
    (2, 1, 65, 65, 24, True, None),
    (1, 2, 130, 64, 64, False, None),
)


def sublayer(batch, heads, queries, keys, channels, causal, scale, generator) -> Attention:
    def drawn(tokens):
        # As models have them: heads are a split of the width, so the tensor is not contiguous.
        numbers = torch.randn(batch, tokens, heads, channels, generator=generator)
        return numbers.bfloat16().float().transpose(1, 2)

    nothing = torch.zeros(batch, queries, 4)
    step = Attention(
        "a", Node("s", 0), Node("s", 0), Node("s", 1), drawn(queries), drawn(keys), drawn(keys),
        drawn(queries), None, scale, causal, nothing, nothing, mixed_gradient=drawn(queries),
    )  # fmt: skip
    step.mixed_gradient[:, :, 1] = 0  # a row without any evidence
    return step


def check(device: str, precision: float) -> None:
    from clipmapper.relevance import row_kernels  # Triton reads on import whether it is to interpret

    generator = torch.Generator().manual_seed(0)
    for case in CASES:
        step = sublayer(*case, generator)
        whole = torch.rand(case[0], 1, case[2], generator=generator).to(device)
        names = ("query", "key", "value", "mixed", "mixed_gradient")
        step = replace(step, **{name: getattr(step, name).to(device) for name in names})
        one = torch.zeros_like(whole)
        one[:, :, min(66, case[2] - 1)] = 1
        for row in (whole, one, whole * torch.linspace(-1, 1, case[2], device=device)):
            for normalise in (True, False):
                expected = rows_times(positive_attention, step, row, normalise)
                found = row_kernels.row_times_positive_attention(step, row, normalise)
                for ours, its in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, its, rtol=1e-4, atol=precision)
    print(f"{len(CASES)} cases agree")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    check("cpu", 1e-6)
