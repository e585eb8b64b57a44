"""GAE, rollout and raw attention as the papers' programs go, step by step in their order and blocks.

Attention matrices and gradients come from the naive runs (eager attention, autograd); the rules are written
out here as in Chefer, Gur, Wolf 2021 and Abnar & Zuidema 2020, per model, and not in general.
"""

import pytest
import torch
from support import families

from clipmapper.relevance import METHODS, record


def traced(case):
    with record(case.model) as trace:
        y = case.y(case.run(case.model, case.inputs))
    trace.backward(y)
    return trace


def heads_averaged(s):
    """Eq. 5."""
    return (s.dA * s.A).clamp(min=0).mean(dim=0)


def normalised(R):
    """Eqs. 8, 9; a row of R − I that is 0 (a modality before its first self-attention) stays 0."""
    rest = R - torch.eye(len(R), dtype=R.dtype)
    sums = rest.sum(dim=-1, keepdim=True)
    return torch.where(sums == 0, torch.zeros_like(rest), rest / sums) + torch.eye(len(R), dtype=R.dtype)


def test_gae_on_lxmert():
    """Language layers, image layers, then cross-modality layers: cross-attention of both, self of both.

    As the published generator: both cross-attentions from the values before the pair, then the self-attention
    of each stream; of the last layer only the language side matters. The row of the first word is read. (The
    generator sets the first word's own entry to 0 afterwards, which is display.)
    """
    case = families.hf_lxmert()
    relevance = METHODS["gae"](traced(case))
    for row in range(2):
        (run,), places = families.naive_runs(case, row)
        steps = iter(run.sublayers)
        words, regions = len(places["text"]), len(places["image"])
        R_tt, R_ii = (torch.eye(n, dtype=torch.float64) for n in (words, regions))
        R_ti, R_it = torch.zeros(words, regions).double(), torch.zeros(regions, words).double()

        def self_attention(R_ss, R_sq, s):
            cam = heads_averaged(s)
            assert cam.shape == R_ss.shape
            return R_ss + cam @ R_ss, R_sq + cam @ R_sq

        def cross_attention(R_ss, R_qq, R_qs, s):
            cam = heads_averaged(s)
            return normalised(R_ss).T @ (cam @ normalised(R_qq)), cam @ R_qs

        for _ in range(2):
            R_tt, R_ti = self_attention(R_tt, R_ti, next(steps))
        R_ii, R_it = self_attention(R_ii, R_it, next(steps))
        for layer in range(2):
            text_cross, image_cross, text_self, image_self = (next(steps) for _ in range(4))
            ti, tt = cross_attention(R_tt, R_ii, R_it, text_cross)
            it, ii = cross_attention(R_ii, R_tt, R_ti, image_cross)
            R_ti, R_tt = R_ti + ti, R_tt + tt
            if layer == 0:
                R_it, R_ii = R_it + it, R_ii + ii
            R_tt, R_ti = self_attention(R_tt, R_ti, text_self)
            if layer == 0:
                R_ii, R_it = self_attention(R_ii, R_it, image_self)
        assert next(steps, None) is None
        assert R_ti[0].max() > 1e-4, "an image that says nothing proves nothing"
        torch.testing.assert_close(relevance.streams["text"][row, :words], R_tt[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(relevance.streams["image"][row], R_ti[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start_layer", [0, -1])
def test_gae_on_both_towers_of_clip(tmp_path, start_layer):
    """The published CLIP notebook, all layers; with −1 as it ships (the last layer of each tower alone)."""
    case = families.open_clip_similarity(tmp_path, "causal")
    relevance = METHODS["gae"](traced(case), start_layer=start_layer)
    for row in range(2):
        runs, _ = families.naive_runs(case, row)
        image, text = runs[0].sublayers[:2], runs[0].sublayers[2:]
        for blocks, stream, read in ((image, "image", 0), (text, "text", 6)):
            R = torch.eye(blocks[0].A.shape[-1], dtype=torch.float64)
            for s in blocks[start_layer:]:
                R = R + heads_averaged(s) @ R
            torch.testing.assert_close(relevance.streams[stream][row], R[read], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start_layer", [0, 1])
def test_rollout_and_raw_attention_on_vit(start_layer):
    case = families.hf_vit()
    trace = traced(case)
    rolled, raw = METHODS["rollout"](trace, start_layer=start_layer), METHODS["raw_attention"](trace)
    for row in range(2):
        (run,), _ = families.naive_runs(case, row)
        joint = None
        for s in run.sublayers[start_layer:]:
            mixed = s.A.mean(dim=0) + torch.eye(10, dtype=torch.float64)
            mixed = mixed / mixed.sum(dim=-1, keepdim=True)
            joint = mixed if joint is None else mixed @ joint
        torch.testing.assert_close(rolled.streams["image"][row], joint[0], rtol=1e-9, atol=1e-12)
        expected = run.sublayers[-1].A.mean(dim=0)[0]
        torch.testing.assert_close(raw.streams["image"][row], expected, rtol=1e-9, atol=1e-12)
        assert raw.image[row].shape == (3, 3)
        torch.testing.assert_close(raw.image[row].flatten(), expected[1:])
