"""Training a captioner by cross-entropy, then self-critically, and scoring what it writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipmapper.data.world.caption_truth import CaptionTruth
from clipmapper.evaluation.captions.ngram_scores import CiderD, DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.evaluation.captions.scores import CaptionScores
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.head import caption_vocabulary
from clipmapper.tasks.captioning.model import Captioner, caption_loss
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import from_all, this_share

SCORES = ("cider", "bleu_4", "rouge_l")
Judge = Callable[[int, str], CaptionTruth]


@dataclass(frozen=True)
class JudgedCaption:
    """A caption that was written for an image of a split, and whether it is so."""

    image: int
    caption: str
    truth: CaptionTruth | None  # where nobody knows it


class CaptionModule(TaskModule):
    """Cross-entropy of every word given those before it, with label smoothing.

    A batch is a dictionary with ``text`` (:class:`~clipmapper.models.tokens.TokenizedText`, one caption an
    image; for training also several, those of an image in succession), ``references`` (several captions of
    each image) and either ``image_tokens`` (of a frozen encoder, cached) or ``images``. For validation also
    ``numbers``, which image of the split each is.

    The ``emphasised`` words count by the factor ``emphasis`` in the mean.

    Validation: the loss without smoothing and emphasis, the scores of greedy captions, and the shares of them
    that are ``correct`` and ``complete`` by the split's ``judges`` (number of the image, caption → truth;
    None for data that does not know). ``written`` holds the captions of the last validation, by split.
    """

    def __init__(
        self,
        model: Captioner,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        max_steps: int,
        label_smoothing: float,
        judges: Mapping[str, Judge | None],
        emphasised: Sequence[str] = (),
        emphasis: float = 1.0,
    ) -> None:
        super().__init__(model, learning_rate, weight_decay, warmup_steps, max_steps)
        self.label_smoothing = label_smoothing
        # On the CPU for good: processes that make batches count terms as well.
        self.emphasised, self.emphasis = self._tokens_of(emphasised), emphasis
        self.register_buffer("token_weights", self._weights(), persistent=False)
        self.judges = dict(judges)
        self.splits = tuple(judges)
        self.scores = torch.nn.ModuleDict({split: CaptionScores(SCORES) for split in judges})
        self.written: dict[str, list[JudgedCaption]] = {}

    def image_tokens(self, batch: Mapping) -> Float[Tensor, "batch image width"]:
        if "image_tokens" in batch:
            return batch["image_tokens"]
        return self.model.encoder.image_tokens(batch["images"])

    def loss(
        self,
        image_tokens: Float[Tensor, "batch image width"],
        text: TokenizedText,
        label_smoothing: float = 0.0,
        weight: Float[Tensor, "known"] | None = None,
    ) -> Float[Tensor, ""]:
        """:func:`caption_loss` over the tokens that the head can say."""
        words = self.model.text_tokens(text.ids, text.valid)
        logits = self.model.caption_logits(image_tokens, words, text.valid, known_only=True)
        return caption_loss(logits, self.placed(text), label_smoothing, weight)

    def _tokens_of(self, words: Sequence[str]) -> Int[Tensor, "tokens"]:
        """Find the tokens that these words are written with, as first words and as later ones."""
        if not words:
            return torch.empty(0, dtype=torch.long)
        tokenizer = self.model.tokenizer
        told = caption_vocabulary(tokenizer, [text for word in words for text in (word, f"a {word}")])
        return torch.tensor(sorted(set(told) - set(caption_vocabulary(tokenizer, ["a"]))))

    def _weights(self) -> Float[Tensor, "known"] | None:
        """How much each token that the head can say counts."""
        if not len(self.emphasised):
            return None
        head, device = self.model.head, self.model.device  # where encoding the scenes has brought it
        weights = torch.ones(head.known, device=device)
        weights[head.places(self.emphasised.to(device))] = self.emphasis
        return weights

    def placed(self, text: TokenizedText) -> TokenizedText:
        """The same captions by the places of their tokens among those that the head can say."""
        said = text.valid.clone()
        said[:, 0] = False  # the start token is given
        return TokenizedText(self.model.head.places(text.ids, said), text.valid, text.removable)

    def terms(self, batch: Mapping) -> int | float:
        """Count what a loss is the mean of: all words but the start token, each by how much it counts."""
        following = batch["text"].ids[:, 1:][batch["text"].valid[:, 1:]].cpu()
        return len(following) + (self.emphasis - 1) * int(torch.isin(following, self.emphasised).sum())

    def training_step(self, batch: Mapping, index: int) -> Tensor:
        loss = self.loss(self.image_tokens(batch), batch["text"], self.label_smoothing, self.token_weights)
        words = int(batch["text"].valid[:, 1:].sum())
        self.log("train/loss", loss, prog_bar=True, batch_size=words, sync_dist=True)
        return loss * self.weight(batch)

    def on_validation_epoch_start(self) -> None:
        self.written = {split: [] for split in self.splits}

    def validation_step(self, batch: Mapping, index: int, dataloader_idx: int = 0) -> None:
        split = self.splits[dataloader_idx]
        image_tokens = self.image_tokens(batch)
        loss = self.loss(image_tokens, batch["text"])
        words = int(batch["text"].valid[:, 1:].sum())
        self.log(f"{split}/loss", loss, batch_size=words, add_dataloader_idx=False, sync_dist=True)
        captions = self.write(image_tokens, Decoding("greedy", max_length=self.model.longest))
        self.scores[split].update(captions, batch["references"])
        self.written[split] += self.judged(split, batch["numbers"], captions)
        for name in ("correct", "complete") if self.judges[split] else ():
            share = [getattr(one.truth, name) for one in self.written[split][-len(captions) :]]
            self.log(
                f"{split}/{name}",
                torch.tensor(share).float().mean(),
                batch_size=len(share),
                add_dataloader_idx=False,
                sync_dist=True,
            )

    def write(self, image_tokens: Float[Tensor, "batch image width"], decoding: Decoding) -> list[str]:
        """One caption an image."""
        return [texts[0] for texts in write_captions(self.model, image_tokens, decoding).texts]

    def judged(self, split: str, images: Sequence[int], captions: Sequence[str]) -> list[JudgedCaption]:
        """Captions of these images of a split, each held against what is to be seen."""
        judge = self.judges[split]
        return [
            JudgedCaption(image, caption, judge(image, caption) if judge else None)
            for image, caption in zip(images, captions, strict=True)
        ]

    def on_validation_epoch_end(self) -> None:
        for split, captions in self.written.items():
            together = [caption for part in from_all(captions) for caption in part]
            self.written[split] = sorted(together, key=lambda caption: caption.image)
        for split in self.splits:
            if self.scores[split].update_called:
                for name, value in self.scores[split].compute().items():
                    self.log(f"{split}/{name}", value)
            self.scores[split].reset()


class SelfCriticalModule(CaptionModule):
    """REINFORCE with the captioner's own greedy caption as baseline, CIDEr-D as reward.

    For an image with the greedy caption ŵ and a drawn caption w the loss is −(r(w) − r(ŵ)) log p(w)
    (Rennie et al. 2017, equations 9 and 10): a caption that scores better than what the model would say by
    itself becomes likelier. ``captions`` are drawn for each image and their mean is taken; the paper draws
    one, and more make the gradient less noisy. Words are drawn from the whole distribution (top_p 1).

    CIDEr's document frequencies are those of ``references``, the captions of the training images. Label
    smoothing has no part in this phase. Validation is as for :class:`CaptionModule`.
    """

    def __init__(self, *args, references: Sequence[Sequence[str]], captions: int, seed: int, **more) -> None:
        super().__init__(*args, label_smoothing=0.0, **more)
        self.captions, self.seed = captions, seed
        tokenised = [[ptb_tokenise(caption) for caption in of_image] for of_image in references]
        self.cider = CiderD(DocumentFrequencies.of(tokenised))

    def training_step(self, batch: Mapping, index: int) -> Tensor:
        image_tokens = self.image_tokens(batch)
        greedy = write_captions(self.model, image_tokens, Decoding("greedy", max_length=self.model.longest))
        # Of several processes each draws other noise (one process alone would draw yet other captions).
        process = this_share().index
        entropy = (self.seed, self.global_step, process) if process else (self.seed, self.global_step)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        drawing = Decoding(
            "nucleus", captions=self.captions, max_length=self.model.longest, top_p=1.0, seed=seed
        )
        drawn = write_captions(self.model, image_tokens, drawing)
        reward = self.rewards(drawn.texts, batch["references"])
        baseline = self.rewards(greedy.texts, batch["references"])
        log_p = self.log_probability(image_tokens.repeat_interleave(self.captions, dim=0), drawn.tokens)
        loss = -((reward - baseline).flatten().to(log_p) * log_p).mean()
        logged = {"train/loss": loss, "train/reward": reward.mean(), "train/greedy_reward": baseline.mean()}
        self.log_dict(logged, prog_bar=True, batch_size=len(image_tokens), sync_dist=True)
        return loss

    def rewards(
        self, texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> Float[Tensor, "images captions"]:
        """CIDEr-D of every caption."""
        each = [
            self.cider(
                [ptb_tokenise(text) for text in of_image],
                [[ptb_tokenise(reference) for reference in others]] * len(of_image),
            )
            for of_image, others in zip(texts, references, strict=True)
        ]
        return torch.from_numpy(np.stack(each)).float()

    def log_probability(
        self, image_tokens: Float[Tensor, "captions image width"], text: TokenizedText
    ) -> Float[Tensor, "captions"]:
        """log p of each caption: the sum over its words and, where it has one, its end token."""
        words = self.model.text_tokens(text.ids, text.valid)
        logits = self.model.caption_logits(image_tokens, words, text.valid, known_only=True)
        following = self.placed(text).ids[:, 1:, None]
        log_p = logits[:, :-1].log_softmax(dim=-1).gather(2, following)[:, :, 0]
        return (log_p * text.valid[:, 1:]).sum(dim=1)
