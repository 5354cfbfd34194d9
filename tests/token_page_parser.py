"""What a page of token costs holds, for the tests to read."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page holds: its text, the shaded tokens, and every attribute; refuses tags that do not match."""

    VOID = frozenset({"meta"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.tokens: list[dict[str, str]] = []
        self.depth = 0  # of the token that is open
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if "title" in dict(attrs):
            self.tokens.append({"text": "", **dict(attrs)})
            self.depth = len(self.open)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if len(self.open) < self.depth:
            self.depth = 0

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.depth:
            self.tokens[-1]["text"] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())
