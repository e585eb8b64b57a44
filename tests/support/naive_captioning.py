"""The forward of a captioner written out a second time, for the naive methods of ``naive_relevance``."""

import torch
from torch import Tensor

from support import naive_relevance


class CaptionRun(naive_relevance.Run):
    """One image [3, h, w] and one text [n] through a captioner; explains the word behind ``position``."""

    def __init__(self, model, image, ids, position: int):
        self.position = position
        super().__init__(model, image, ids)

    def _forward(self, model, image, ids, patches, words):
        clip, mapper = model.encoder.clip, model.mapper
        owner = model.encoder.text_tower.owner
        patches, words = list(range(clip.visual.positional_embedding.shape[0] - 1)), list(range(len(ids)))
        own_class = [0] if mapper.class_token is not None else []
        self.image = [len(own_class) + i for i in range(1 + len(patches))]
        self.text = [self.image[-1] + 1 + i for i in words]
        self.visual = own_class + self.image
        self.size, self.read = len(self.visual) + len(self.text), self.text[self.position]

        image = self._image_tower(clip.visual, image, patches)
        if model.text_embedding_only:
            text = owner.token_embedding.weight[ids] + owner.positional_embedding[: len(ids)]
            text = text.detach().requires_grad_()
        else:
            text = self._text_tower(owner, ids, words)
        image, text = image @ mapper.project_image.weight.T, text @ mapper.project_text.weight.T
        if own_class:
            image = torch.cat([mapper.class_token[None], image])
        if mapper.positions is not None:
            image = image + mapper.positions
        later = torch.ones(len(ids), len(ids)).triu(1).bool()
        if hasattr(mapper.blocks[0], "text_self"):
            for block in mapper.blocks:
                entered = len(self.sublayers)
                new_text = text + self._masked(block.text_self, text, self.text, later)
                new_text = new_text + self._mapper_attention(
                    block.text_cross, new_text, self.text, image, self.visual, entered
                )
                image = image + self._mapper_attention(
                    block.image_self, image, self.visual, image, self.visual
                )
                image = image + block.image_mlp(image[None])[0]
                text = new_text + block.text_mlp(new_text[None])[0]
        else:
            joint = torch.cat([image, text])
            start = len(self.visual)
            hidden = torch.zeros(len(joint), len(joint), dtype=torch.bool)
            hidden[:start, start:] = True
            hidden[start:, start:] = later
            for block in mapper.blocks:
                joint = joint + self._masked(block.attention, joint, self.visual + self.text, hidden)
                joint = joint + block.mlp(joint[None])[0]
            image, text = joint[:start], joint[start:]
        if hasattr(model, "decoder"):
            text = self._gpt2(model.decoder, image, text, ids, later)
        return model.head(text[None])[0, self.position]

    def _gpt2(self, decoder, image: Tensor, text: Tensor, ids: Tensor, later: Tensor) -> Tensor:
        """GPT-2 written out: its words with the mapper's added, the image before them or beside them."""
        gpt2 = decoder.language_model.transformer
        seen = decoder.read_image(decoder.image_norm(image))
        said = decoder.read_text(decoder.text_norm(text)) + gpt2.wte.weight[ids]
        places = self.text
        if decoder.cross:
            x = said + gpt2.wpe.weight[: len(ids)]
        else:
            x = torch.cat([seen, said])
            x, places = x + gpt2.wpe.weight[: len(x)], self.visual + self.text
            later = torch.ones(len(x), len(x)).triu(1).bool()
        entered = len(self.sublayers)
        for block in gpt2.h:
            q, k, v = self._conv(block.attn.c_attn, block.ln_1(x)).chunk(3, dim=-1)
            x = x + self._gpt2_attend(block.attn, q, k, v, x, places, places, later, len(self.sublayers))
            if decoder.cross:
                q = self._conv(block.crossattention.q_attn, block.ln_cross_attn(x))
                k, v = self._conv(block.crossattention.c_attn, seen).chunk(2, dim=-1)
                nothing = torch.zeros(len(q), len(k), dtype=torch.bool)
                x = x + self._gpt2_attend(
                    block.crossattention, q, k, v, x, places, self.visual, nothing, entered
                )
            hidden = self._conv(block.mlp.c_fc, block.ln_2(x))
            hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
            x = x + self._conv(block.mlp.c_proj, hidden)
        return gpt2.ln_f(x)[-len(ids) :]

    @staticmethod
    def _conv(layer, x: Tensor) -> Tensor:
        return x @ layer.weight + layer.bias

    def _gpt2_attend(self, attention, q, k, v, x, places, keys, hidden, entered: int) -> Tensor:
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for t in (q, k, v))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
        A = scores.exp() / scores.exp().sum(-1, keepdim=True)
        a = self._conv(attention.c_proj, (A @ v).transpose(0, 1).flatten(1))
        self.sublayers.append(naive_relevance.Sublayer(places, keys, entered, x, a, A))
        return a

    def _masked(self, layer, x: Tensor, places: list[int], hidden: Tensor) -> Tensor:
        """Self-attention of the mapper in which the keys in ``hidden`` are not read."""
        normed = layer.norm(x)
        q = layer.query(normed)
        k, v = layer.key_value(normed).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for t in (q, k, v))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
        A = scores.exp() / scores.exp().sum(-1, keepdim=True)
        a = layer.output((A @ v).transpose(0, 1).flatten(1))
        self.sublayers.append(naive_relevance.Sublayer(places, places, len(self.sublayers), x, a, A))
        return a
