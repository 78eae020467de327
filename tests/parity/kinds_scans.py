"""zigma.scan_paths: the visiting orders that the published ZigMa code uses."""

import numpy as np

from scans import get_scan, parse_scan_type
from tests.parity.harness import parity_kind

# stored name -> orders of ours that must be equal to it, in order
_TABLES = {
    "zigzag_path": lambda n: [p.order for p in get_scan("zigzag")(n, n)],
    "zigzag_inverse": lambda n: [p.inverse for p in get_scan("zigzag")(n, n)],
    "hilbert_path": lambda n: [p.order for p in get_scan("hilbert_official")(n, n)],
    "hilbert_inverse_used_after": lambda n: [p.inverse for p in get_scan("hilbert_official")(n, n)],
    "hilbert_true_visit_order": lambda n: [p.order for p in get_scan("hilbert")(n, n)],
    "hilbert_path_square": lambda n: [p.inverse for p in get_scan("hilbert")(n, n)],
    "gilbert_order_index_2d": lambda n: get_scan("hilbert")(n, n)[0].inverse.reshape(n, n),
    "traverse_grid_v1_continuous": lambda n: [
        get_scan("zigzag")(n, n)[0].order,
        get_scan("zigzag")(n, n)[0].reversed().order,
    ],
}


def _cases(fixture):
    tables = [
        f"{size}:{name}"
        for size in fixture.meta
        if size.startswith("N=")
        for name in fixture.meta[size]
        if not name.endswith("_error")
    ]
    return [*tables, *(f"video:{i}:{row['st_order']}" for i, row in enumerate(fixture.meta.get("video", [])))]


@parity_kind("zigma.scan_paths", cases=_cases)
def check(fixture, case):
    where, _, name = case.partition(":")
    if where == "video":
        _check_video(fixture.meta["video"][int(name.partition(":")[0])])
        return
    n = int(where.removeprefix("N="))
    want = fixture.meta[where][name]
    got = _TABLES[name](n)
    assert len(got) == len(want)
    for variant, (ours, stored) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(ours, stored, err_msg=f"{case}, variant {variant}")
    for string, table in (("zigzag", "zigzag_path"), ("hilbert", "hilbert_path")):
        if name == table:
            for k in range(1, len(want) + 1):
                schedule = parse_scan_type(f"{string}N{k}").schedule(11, 1, n, n)
                for layer, step in enumerate(schedule):
                    np.testing.assert_array_equal(step.path.order, want[layer % k])


def _check_video(row):
    n, t = row["N"], row["video_frames"]
    spec = parse_scan_type(f"zzvideo_{row['st_order']}")
    assert spec.mixer == "mamba"
    right = spec.schedule(row["depth"], t, n, n)
    published = spec.schedule(row["depth"], t, n, n, official_temporal_reversal=True)
    x = np.random.default_rng(0).standard_normal(t * n * n)
    for number, (stored, ours, theirs) in enumerate(zip(row["layers"], right, published, strict=True)):
        assert stored["layer"] == number
        spatial = stored["kind"] == "s"
        assert ours.fold == theirs.fold == ("frames" if spatial else "pixels")
        np.testing.assert_array_equal(ours.path.order, stored["gather_before"])
        np.testing.assert_array_equal(ours.undo.order, stored["gather_after_correct"])
        np.testing.assert_array_equal(theirs.path.order, stored["gather_before"])
        np.testing.assert_array_equal(theirs.undo.order, stored["gather_after_as_coded"])
        # The published reshapes: "(t k) -> (b t) k" for s layers, "(t k) -> (b k) t" for t layers.
        frames = x.reshape(t, n * n)
        folded = frames if spatial else frames.T
        gathered = folded[:, stored["gather_before"]]
        resolved = theirs.resolve(t, n, n)
        assert resolved.segments == len(gathered)
        np.testing.assert_array_equal(x[resolved.order].reshape(resolved.segments, -1), gathered)
        back = gathered[:, stored["gather_after_as_coded"]]
        np.testing.assert_array_equal(
            x[resolved.order][resolved.undo], (back if spatial else back.T).reshape(-1)
        )
