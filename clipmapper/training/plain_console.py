"""A console that shows text as text."""

from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from clipmapper.visible_text import visible


class PlainConsole(Console):
    """Whatever is printed is shown as it is, be it a path, an answer or a caption of somebody else's.

    Square brackets and colons are no markup and no emoji, and control characters are written out
    (:func:`clipmapper.visible_text.visible`): what is bold is a :class:`rich.text.Text` of ours.
    """

    def __init__(self, **options) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, *arguments, **options) -> Iterable[Segment]:
        # Texts that were made elsewhere pass here; rich's own colours are no text but a segment's style.
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
