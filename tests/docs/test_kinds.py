"""docs/extending.md registers one of each kind, and each name that it gives can be typed."""

import re
from pathlib import Path

import pytest

from tests.helpers.own_package import own_package  # noqa: F401
from zigflow import plugins

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()


def test_each_name_of_the_page_is_taken_once_it_is_registered(own_package, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "kinds_of_the_page.py").write_text(
        re.search(r"^```py\n(.*?)^```", PAGE, flags=re.M | re.S)[1]
    )
    monkeypatch.syspath_prepend(tmp_path)
    section = PAGE.partition("## One of each other kind")[2].partition("\n## ")[0]
    names = re.findall(r"`([a-z._]+=[\w\[\]]+)`", section)
    assert len(names) == 8
    base = ["run_dir=unused", "data=synthetic"]
    for name in names[:5]:
        with pytest.raises(Exception, match=re.escape(name.partition("=")[0])):
            plugins.checked(plugins.plain(plugins.compose_config([*base, name])))
    __import__("kinds_of_the_page")
    plugins.checked(plugins.plain(plugins.compose_config([*base, *names])))
