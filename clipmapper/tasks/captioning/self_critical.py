"""Self-critical sequence training (Rennie et al. 2017, arXiv 1612.00563): a captioner's second phase."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipmapper.evaluation.captions.ngram_scores import CiderD, DocumentFrequencies
from clipmapper.evaluation.captions.ptb_tokenizer import ptb_tokenise
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.training import CaptionModule
from clipmapper.training.processes import this_share


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
