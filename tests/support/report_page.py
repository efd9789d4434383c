"""A report page as a browser would read it, and a probe text that tries to break out of one."""

import html.parser
import json

EVIL = "</script><script>alert({i})</script><img src=x onerror=alert(1)><!-- "


class Page(html.parser.HTMLParser):
    """What a browser would see: elements, attributes, and the text outside scripts."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text, self._open = "", None
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])
