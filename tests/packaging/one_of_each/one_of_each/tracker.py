"""A tracker: ``loop.trackers=[each_lines]``."""

import json

from zigflow.engine.trackers import register_tracker


@register_tracker("each_lines")
class Lines:
    """Appends what is logged to a file of the run."""

    def __init__(self, run):
        self.file = run.folder / "each_lines.jsonl"
        self.lines = run.stored.get("lines", 0)

    def log(self, values, step):
        self.lines += 1
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, name, path, step):
        pass

    def state(self):
        return {"lines": self.lines}

    def finish(self):
        pass
