"""Files of one's own in a test: what they leave in the process is gone after it."""

import sys

import pytest
from hydra.core.config_store import ConfigStore

import scans
from scans import registry
from zigflow import plugin_files, plugins

SCAN = '''
import numpy as np
from scans import register_scan


@register_scan("checker")
def checker(h, w):
    """Black squares first, then white ones."""
    y, x = np.divmod(np.arange(h * w), w)
    return [np.argsort((x + y) % 2, kind="stable")]
'''


class OwnFiles:
    """Writes files into a folder that is the working directory, and forgets what was imported."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, text=SCAN):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def forget(self):
        """As in a new process."""
        for name in plugin_files._loaded:
            sys.modules.pop(name, None)
        for entry in [
            k for k, v in registry._ENTRIES.items() if v.function.__module__ in plugin_files._loaded
        ]:
            del registry._ENTRIES[entry]
        for node in set(ConfigStore.instance().repo["scan"]) - {
            f"{name}.yaml" for name in scans.list_scans()
        }:
            if node != "from_model.yaml":
                del ConfigStore.instance().repo["scan"][node]
        plugin_files._loaded.clear()
        plugin_files.broken.clear()


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(plugin_files.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plugins.prepare()
    files = OwnFiles(tmp_path)
    yield files
    files.forget()
