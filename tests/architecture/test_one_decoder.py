"""Images are decoded in one place: a second one would answer differently for turned or transparent files."""

import ast

from tests.architecture.test_layers import MODULES

DECODER = "zigflow.data.picture"


def test_no_other_module_opens_images():
    opening = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Image.open", "PIL.Image.open"):
                opening.add(name)
    assert opening == {DECODER}
