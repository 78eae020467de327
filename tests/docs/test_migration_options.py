"""The options of a model that the pages of the four families name are typed as they stand there."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT
from zigflow.paths import config_dir

DOCS = Path(__file__).resolve().parents[2] / "docs"
FAMILIES = {"dim": DiM, "dis": DiS, "dit": DiT, "uvit": UViT}


@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_models_are_typed_as_they_stand(family):
    page = (DOCS / f"migration_{family}.md").read_text()
    listed = {
        key
        for path in config_dir().glob(f"model/{family}_*.yaml")
        for key in yaml.safe_load(path.read_text())
    }
    named = re.findall(r"(\+?)\bmodel\.(\w+)(?==|`)", page)
    assert named
    for plus, key in named:
        assert key in inspect.signature(FAMILIES[family]).parameters, key
        assert plus or key in listed, f"no file lists model.{key}: it is typed as +model.{key}"
