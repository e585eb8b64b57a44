"""The parameters of a two-stage model in groups from its output to its input."""

from collections.abc import Iterable, Iterator

from torch import nn

from clipmapper.tasks.recording import TwoStage


def parameter_groups(model: TwoStage) -> list[tuple[str, list[nn.Parameter]]]:
    """What stands behind the mapper (head, decoder), the mapper's blocks from the last to the first, what
    comes before them, the blocks of both towers together from the last to the first, and the rest of the
    encoder (embeddings). Every parameter is in one group, that of its first use from the output."""
    image, text = (list(t.attention_blocks()) for t in (model.encoder.image_tower, model.encoder.text_tower))
    behind = [module for name, module in model.named_children() if name not in ("encoder", "mapper")]
    named: list[tuple[str, Iterable[nn.Module]]] = [("head", behind)]
    depth = len(model.mapper.blocks)
    named += [(f"mapper block {k + 1}", [model.mapper.blocks[k]]) for k in reversed(range(depth))]
    named.append(("mapper projections", [model.mapper]))
    deepest = max(len(image), len(text))
    for k in range(deepest):
        both = [blocks[-1 - k] for blocks in (image, text) if k < len(blocks)]
        named.append((f"encoder block {deepest - k}", both))
    named.append(("encoder embeddings", [model.encoder]))
    return list(_distinct(named))


def _distinct(
    named: Iterable[tuple[str, Iterable[nn.Module]]],
) -> Iterator[tuple[str, list[nn.Parameter]]]:
    seen: set[int] = set()
    for name, modules in named:
        group = []
        for module in modules:
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    group.append(parameter)
        if group:
            yield name, group
