"""Which settings and tensors of a stored case a check has read.

A check that leaves a setting unread has assumed it. Every leaf of the JSON and every tensor counts as a setting, but
for the documentary ones listed here, each with its reason.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

# kind pattern -> path pattern -> why nothing needs to read it.
DOCUMENTARY: dict[str, dict[str, str]] = {
    "*": {
        "fixture_kind": "chooses the check",
        "name": "the name of the file",
        "source": "where the published code is",
        "repo": "where the published code is",
        "ctor": "the published name of what kwargs build",
        "callable": "the published name of what kwargs build",
        "fixed_in_src": "the repair by which the published code ran",
        "mode": "prose: eval, float32",
        "seed": "of the stored tensors themselves",
        "note": "prose",
        "notes*": "prose",
        "meaning*": "prose",
        "legend*": "prose",
        "desc": "prose",
        "conventions": "prose",
        "toy": "the formula of the stand-in network; another one gives other numbers",
        "bytes": "size of the file",
        "n_state": "how many tensors are weights",
        "tensors*": "names and shapes, which the harness compares with the file",
    },
    "*.init_stats": {
        "*.min": "the extreme of one draw",
        "*.max": "the extreme of one draw",
        "*.absmax": "the extreme of one draw",
        "no_weight_decay_flags*": "the published training reads no flag",
    },
    "zigma.model": {
        "max_abs_change_if_wrong_eps*": "how well the case tells norms of another eps",
    },
    "dis.model": {"cfg.rule": "prose"},
    "dis.mixer": {"layout": "prose: (B, L, D)"},
    "dim.model": {
        "split_skip_forced": "told by the names of the weights",
        "upsample.formula": "prose",
    },
    "dim.dpm_solver": {"schedule": "prose: the table of betas, of which the values are compared"},
    "dit.diffusion_tables": {"errors.*": "the published words of an error"},
    "uvit.dpm_*": {},
    "transport.transport": {
        "loss.model": "the formula of the stand-in network",
        "loss.draws": "prose",
        "loss.seed": "of the stored tensors themselves",
        "loss.shape": "prose",
        "sampler.models.*.doc": "prose",
        "sampler.noise": "prose",
        "sampler.z": "prose",
        "sampler.out": "prose",
        "sampler.ode_sde_grid": "prose",
        "sampler.rows.*.error": "the published words of an error; what ran instead is stored",
        "sampler.rows.*.fixed": "the repair by which the published code ran",
        "sampler.rows.*.note": "prose",
        "sampler.rows.*.reverse_note": "prose",
        "sampler.rows.*.sit_equal": "whether two published copies agree; where not, both are stored and compared",
        "sampler.rows.*.kind": "the first part of the key",
    },
    "zigma.scan_paths": {
        "video.*.reshape.*": "prose: how tokens are folded",
        "video.*.note": "prose",
        "*_error": "the published words of an error",
    },
}


def documentary(kind: str, path: str) -> bool:
    """Whether the JSON path of a fixture kind describes and sets nothing."""
    return any(
        fnmatch.fnmatchcase(kind, kinds) and fnmatch.fnmatchcase(path, pattern)
        for kinds, patterns in DOCUMENTARY.items()
        for pattern in patterns
    )


class Recorded(Mapping):
    """A JSON object or a file of tensors that notes which leaves were read; nested objects note theirs in full paths.

    ``in`` and ``len`` read nothing; ``items``, ``values`` and a copy read all. A list of objects is recorded object by
    object, other lists are leaves.
    """

    def __init__(self, content: Mapping[str, Any], read: set[str] | None = None, path: str = ""):
        self._content = content
        self.read: set[str] = set() if read is None else read
        self._path = path

    def __getitem__(self, key: str) -> Any:
        path = f"{self._path}{key}"
        value = self._content[key]
        if isinstance(value, Mapping):
            self.read.add(path) if not value else None
            return Recorded(value, self.read, path + ".")
        if _rows(value):
            return [Recorded(row, self.read, f"{path}.{i}.") for i, row in enumerate(value)]
        self.read.add(path)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def plain(self) -> dict[str, Any]:
        """A copy as plain dicts and lists, all of it read."""
        return {key: _plain(value) for key, value in self.items()}

    def leaves(self) -> list[str]:
        return list(_leaves(self._content, self._path))


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _plain(value: Any) -> Any:
    if isinstance(value, Recorded):
        return value.plain()
    if isinstance(value, list) and value and isinstance(value[0], Recorded):
        return [row.plain() for row in value]
    return value


def _leaves(content: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        elif _rows(value):
            for i, row in enumerate(value):
                yield from _leaves(row, f"{path}{key}.{i}.")
        else:
            yield f"{path}{key}"
