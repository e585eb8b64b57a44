"""The time of other libraries, captum and lxt, for the relevance that methods here give, in the same run.

The relevance is that of the tokens which enter the first block (position embeddings included), so it is the
same in all of them, and each row says how far off it is.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
import transformers
from torch import Tensor, nn

from clipmapper.benchmarks.other_libraries import LIBRARIES, Missing
from clipmapper.benchmarks.timing import available_bytes, measured, peak_bytes
from clipmapper.models.clip_weights import open_clip_log
from clipmapper.relevance import METHODS, Again, needs_of, record

FLOOR = "floor"
_WORDS = 128
STEPS = 50  # of integrated gradients, the default of both


@dataclass(frozen=True)
class Compared:
    """A model, what it is given, and the two halves of its forward.

    Attributes
    ----------
    inputs : of ``begin``, which gives the tokens [batch, tokens, width] that enter the first block.
    end : y [batch] of these tokens.
    ours : the method here that gives the relevance of lxt's program for this kind of model.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    begin: Callable[[Tensor], Tensor]
    end: Callable[[Tensor], Tensor]
    ours: str = "attn_lrp"

    def tokens(self) -> Tensor:
        with torch.no_grad():
            return self.begin(self.inputs)

    def floor(self) -> Tensor:
        """One forward, and one backward to the tokens."""
        tokens = self.tokens().requires_grad_()
        return torch.autograd.grad(self.end(tokens).sum(), tokens)[0]

    def explained(self, method: str) -> Tensor:
        """The relevance [batch, tokens] by a method here, of both signs."""

        def forward(rows: Tensor) -> Tensor:
            return self.end(self.begin(self.inputs[rows]))

        needs = needs_of([METHODS[method]])
        with record(self.module, rules=needs.rules) as trace:
            y = forward(torch.arange(len(self.inputs), device=self.inputs.device))
        needs.differentiate(trace, y)
        trace.again = Again(self.module, forward)
        (relevance,) = METHODS[method](trace, sign="both").streams.values()
        return relevance


def vit_b_16(batch: int, device: torch.device) -> Compared:
    """open_clip's image tower; y is its feature along a random direction."""
    torch.manual_seed(0)
    with open_clip_log():
        visual = open_clip.create_model("ViT-B-16").visual
    visual = visual.to(device).eval().requires_grad_(False)
    direction = torch.randn(visual.output_dim, device=device)
    images = torch.randn(batch, 3, *visual.image_size, device=device)

    def end(tokens: Tensor) -> Tensor:
        pooled, _ = visual._pool(visual.transformer(tokens))
        return pooled @ visual.proj @ direction

    # lxt's rules for vision transformers are those of CP-LRP, which are LibraGrad's as well.
    return Compared("vit_b_16", visual, images, visual._embeds, end, ours="input_x_gradient_libra")


def bert_base(batch: int, device: torch.device) -> Compared:
    """y is the logit of the first class."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig())
    model = model.to(device).eval().requires_grad_(False)

    def end(tokens: Tensor) -> Tensor:
        read = model.bert.encoder(tokens).last_hidden_state
        return model.classifier(model.bert.pooler(read))[:, 0]

    return Compared("bert_base", model, _ids(model, batch, device), model.bert.embeddings, end)


def small_llama(batch: int, device: torch.device) -> Compared:
    """12 layers of width 768; y is the logit of a word behind the last."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
    )
    model = transformers.LlamaForCausalLM(config).to(device).eval().requires_grad_(False)

    def end(tokens: Tensor) -> Tensor:
        return model(inputs_embeds=tokens, use_cache=False, logits_to_keep=1).logits[:, 0, 7]

    return Compared("small_llama", model, _ids(model, batch, device), model.model.embed_tokens, end)


def _ids(model: nn.Module, batch: int, device: torch.device) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (batch, _WORDS), device=device)


SUBJECTS = {"vit_b_16": vit_b_16, "bert_base": bert_base, "small_llama": small_llama}


def compare(
    name: str, batch: int, device: torch.device, options: Namespace, progress: Callable[[str], object]
) -> list[dict]:
    """The rows of a model: what one forward and backward to the tokens takes, each library's program and the
    method here beside it. ``progress`` is told what is run next."""
    subject = SUBJECTS[name](batch, device)
    ways: dict[str, Callable[[], Tensor]] = {FLOOR: subject.floor}
    rows: dict[str, dict] = {FLOOR: {}}
    pairs: dict[str, str] = {}  # their way → ours
    for library in options.compare:
        for program in LIBRARIES[library]:
            way = f"{library} {program.name}"
            ours = program.ours(subject)
            ways.setdefault(ours, lambda method=ours: subject.explained(method))
            rows.setdefault(ours, {})
            rows[way] = {}
            try:
                ways[way] = program.ready(subject)
            except Missing as missing:
                rows[way]["left_out"] = str(missing)
                continue
            pairs[way] = ours
    for way, work in list(ways.items()):
        points = STEPS if way.endswith("IntegratedGradients") else 1  # of which captum makes one batch
        if points * rows[FLOOR].get("peak_bytes", 0) > 0.8 * available_bytes(device):
            rows[way]["left_out"] = f"would take about {points * rows[FLOOR]['peak_bytes'] / 2**30:.1f} GiB"
            del ways[way]
            continue
        progress(f"{name}, memory of {way}")
        rows[way]["peak_bytes"] = peak_bytes(work, device)
    for way, ours in pairs.items():
        if way in ways:
            progress(f"{name}, maps of {way}")
            theirs, found = ways[way](), ways[ours]()
            rows[way]["deviation"] = float((found - theirs).abs().max() / theirs.abs().max())
    times = measured(
        ways,
        options.repeats,
        patience_s=options.patience,
        progress=lambda way: progress(f"{name}, {way}"),
        beside=FLOOR,
    )
    for way, its in times.items():
        rows[way] |= its | {"runs": len(its["all_s"])}
        for key in ("", "cpu_"):
            if way in pairs:
                slower = its[f"{key}time_ratio"] / times[pairs[way]][f"{key}time_ratio"]
                rows[way][f"{key}times_slower_than_ours"] = slower
        rows[way]["memory_ratio"] = rows[way]["peak_bytes"] / rows[FLOOR]["peak_bytes"]
    return [{"model": name, "batch": batch, "way": way} | row for way, row in rows.items()]
