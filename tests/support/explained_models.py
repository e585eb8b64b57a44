"""Small CLIPmappers, explained; and their maps against those of naive runs."""

import torch

from clipmapper.models.tokens import TokenizedText
from clipmapper.relevance import record
from support import naive_relevance, tiny_models

# Each kind of mapper with and without a class token of its own (and with place embeddings once), other
# weights, other texts; texts of different lengths, so that all but the longest are padded.
MODELS = [
    ("dual_flow", False, 2, 0, (7, 4, 9)),
    ("dual_flow", False, 3, 1, (5, 11, 8)),
    ("dual_flow", True, 2, 2, (3, 10, 6)),
    ("single_flow", False, 2, 3, (7, 4, 9)),
    ("single_flow", True, 3, 4, (12, 5, 8)),
]


class Case:
    """A model, a batch, its trace after the backward, and the explained answers."""

    def __init__(self, folder, kind, class_token, depth, seed, lengths):
        self.model = tiny_models.clipmapper(
            folder, kind, class_token, depth, seed, image_position_embedding=seed % 2 == 1
        )
        self.images, self.text = tiny_models.images(len(lengths), seed), tiny_models.texts(lengths, seed)
        self.lengths = lengths
        self.answers = torch.arange(len(lengths)) + seed
        self.answers %= len(tiny_models.ANSWERS)
        self.logits, self.trace = self.traced()

    def traced(self, rows=slice(None), factor=1.0, samples=None, **ignored):
        longest = max(self.lengths[rows])
        text = TokenizedText(*(t[rows, :longest] for t in vars(self.text).values()))
        with record(self.model, samples) as trace:
            logits = self.model(self.images[rows], text, only_class_token=False, **ignored)
        trace.backward(factor * logits.gather(1, self.answers[rows][:, None])[:, 0])
        return logits.detach(), trace

    def naive(self, row, **kept):
        ids = self.text.ids[row, : self.lengths[row]]
        run = naive_relevance.Run(self.model, self.images[row], ids, **kept)
        return run.differentiate(int(self.answers[row]))


def expected_streams(run, naive, lengths):
    """The naive result [all tokens], as streams padded to ``lengths``."""
    expected = {}
    if len(run.visual) > len(run.image):
        expected["class_token"] = naive[:1]
    for stream, places in (("image", run.image), ("text", run.text)):
        row = naive[places]
        expected[stream] = torch.cat([row, row.new_zeros(lengths[stream] - len(row))])
    return expected


def assert_same(relevance, expected, row, message):
    assert set(relevance.streams) == set(expected)
    for stream, values in expected.items():
        torch.testing.assert_close(
            relevance.streams[stream][row], values, rtol=1e-8, atol=1e-12,
            msg=lambda m, stream=stream: f"{message}, {stream}: {m}",
        )  # fmt: skip
