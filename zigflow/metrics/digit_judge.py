"""A judge of class-conditional sets of small labeled images, made for handwritten digits.

Five questions, none of which a bad generator can answer by accident. Is the judge itself right about unseen
real images? Do samples show the class that was asked for? Does every unseen real image have a sample nearby
(ten memorized prototypes fail here)? Do samples keep as far from the training images as unseen real images
do (copies fail here)? Is their distribution as close to the unseen real one as real training images are,
when sets of equal size are compared?

Legend: N images, C channels, H height, W width, F features, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws, keyed_permutation
from zigflow.metrics.base import METRICS, LabeledImages, Metric, check_images, check_labels
from zigflow.metrics.frechet import frechet_from_features
from zigflow.metrics.judge_net import JudgeNet, fit_judge_net, one_thread
from zigflow.metrics.manifold import coverage, nearest_distance, nearest_distances
from zigflow.registry import unknown_name

__all__ = ["DigitJudge", "DigitThresholds", "judge"]


@dataclass(frozen=True)
class DigitThresholds:
    """What a set must reach: lower bounds, but for ``frechet_ratio``, an upper bound."""

    classifier_heldout_accuracy: float = 0.98
    agreement: float = 0.95
    coverage: float = 0.9
    nearest_train_distance_ratio: float = 0.9
    frechet_ratio: float = 1.5

    @classmethod
    def of(cls, value: "DigitThresholds | Mapping[str, float] | None") -> "DigitThresholds":
        """Defaults, with the entries of a mapping in their place.

        Raises:
            UnknownNameError: a threshold that does not exist.
            ValueError: a threshold that is no finite number.
        """
        if isinstance(value, DigitThresholds):
            return value
        given: dict[str, float] = dict(value or {})
        known = [field.name for field in fields(cls)]
        for name, number in given.items():
            if name not in known:
                raise unknown_name("digit judge threshold", name, known)
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"threshold {name} must be a finite number, got {number!r}")
        return cls(**given)

    def verdicts(self, results: Mapping[str, float]) -> dict[str, bool]:
        """Which results reach their threshold, by the name of the result."""
        return {
            name: bool(results[name] <= bound if name == "frechet_ratio" else results[name] >= bound)
            for name, bound in asdict(self).items()
        }


@METRICS.register("digits")
class DigitJudge(Metric):
    """The judge as a metric.

    ``set_reference`` takes both real halves; the net is fitted once, at the first ``compute``, on the training
    half alone. Samples need labels, the classes that were asked for.

    Compared sets are of equal size: of the real halves, ``num_subsets`` keyed subsets are drawn without
    replacement, each with the class counts of the sample set, and results are means over them.
    Coverage and nearest distances are measured on pixels scaled to [0, 1], hence do not depend on the net; the
    Frechet distance on the net's features.

    Args:
        seed: of the net's fit and of the subsets.
        k: neighbor that sets a ball's radius in coverage.
        num_subsets: subsets to average over.
        fit_steps, fit_batch: length of the net's fit and its batch size.
        thresholds: bounds that differ from :class:`DigitThresholds`.

    Raises:
        ValueError: a number out of range or a bad threshold.
    """

    name = "digit_judge"
    best_by = ("frechet", "min")

    fixed_size = True  # samples have the size of the real images

    def __init__(
        self,
        seed: int = 0,
        k: int = 5,
        num_subsets: int = 16,
        fit_steps: int = 750,
        fit_batch: int = 64,
        thresholds: DigitThresholds | Mapping[str, float] | None = None,
    ):
        super().__init__()
        counts = {"k": k, "num_subsets": num_subsets, "fit_steps": fit_steps, "fit_batch": fit_batch}
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"digit judge: {key} must be at least 1, got {value}")
        self.seed = seed
        self.k = k
        self.num_subsets = num_subsets
        self.fit_steps = fit_steps
        self.fit_batch = fit_batch
        self.thresholds = DigitThresholds.of(thresholds)
        self._train: tuple[Tensor, Tensor] | None = None
        self._heldout: tuple[Tensor, Tensor] | None = None
        self._net: JudgeNet | None = None
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def set_reference(self, train: LabeledImages, heldout: LabeledImages | None = None) -> None:
        """Take the real halves: uint8 (N, C, H, W) with int labels (N,), every class in both.

        Raises:
            ValueError: shapes, dtypes or classes that do not fit; a held-out set that is part of the training
                set.
        """
        if heldout is None:
            raise ValueError("digit judge: held-out images are needed beside the training images")
        pairs = {}
        for name, (images, labels) in {"train": train, "heldout": heldout}.items():
            if labels is None:
                raise ValueError(f"digit judge: the {name} images come without labels")
            images = check_images(f"{name} images", images).cpu()
            pairs[name] = images, check_labels(f"{name} labels", labels, len(images))
        (train_images, train_labels), (heldout_images, heldout_labels) = pairs["train"], pairs["heldout"]
        if train_images.shape[1:] != heldout_images.shape[1:]:
            raise ValueError(
                f"digit judge: train images are {tuple(train_images.shape[1:])}, "
                f"held-out images {tuple(heldout_images.shape[1:])}"
            )
        classes = train_labels.unique().tolist()
        if classes != list(range(len(classes))) or heldout_labels.unique().tolist() != classes:
            raise ValueError(
                f"digit judge: both halves must show every class 0..K-1; train has {classes}, "
                f"held-out {heldout_labels.unique().tolist()}"
            )
        if len(classes) < 2:
            raise ValueError("digit judge: at least two classes are needed")
        if nearest_distance(_pixels(heldout_images), _pixels(train_images)) == 0.0:
            raise ValueError(
                "digit judge: every held-out image is also a training image; give images kept from training"
            )
        self._train, self._heldout, self._net = pairs["train"], pairs["heldout"], None

    @property
    def net(self) -> JudgeNet:
        """The classifier, fitted on the training half at the first look."""
        self._require_reference()
        if self._net is None:
            images, labels = self._half("train")
            self._net = fit_judge_net(images, labels, self.seed, self.fit_steps, self.fit_batch)
        return self._net

    def _has_reference(self) -> bool:
        return self._train is not None

    def _half(self, name: str) -> tuple[Tensor, Tensor]:
        """The real images (N, C, H, W) of "train" or "heldout" and their labels (N,)."""
        half = self._train if name == "train" else self._heldout
        if half is None:
            raise RuntimeError(f"{self.name}: call set_reference(train=..., heldout=...) first")
        return half

    def _take(self, images: Tensor, labels: Tensor | None, ids: Tensor) -> None:
        train_images, train_labels = self._half("train")
        if labels is None:
            raise ValueError("digit judge: samples need labels, the classes that were asked for")
        if images.shape[1:] != train_images.shape[1:]:
            raise ValueError(
                f"digit judge: samples are {tuple(images.shape[1:])}, "
                f"training images {tuple(train_images.shape[1:])}"
            )
        num_classes = int(train_labels.max()) + 1
        if len(labels) and int(labels.max()) >= num_classes:
            raise ValueError(
                f"digit judge: label {int(labels.max())} was asked for, known are 0..{num_classes - 1}"
            )
        self._batches.append((images.cpu().clone(), labels.clone(), ids.clone()))

    def _forget(self) -> None:
        self._batches = []

    def _state(self) -> dict[str, Tensor]:
        if not self._batches:
            return {}
        images, labels, ids = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        return {"images": images, "labels": labels, "of": ids}

    def _absorb(self, state: dict[str, Tensor]) -> None:
        self._batches = [*self._batches, (state["images"], state["labels"], state["of"])]

    def _samples(self) -> tuple[Tensor, Tensor]:
        images, labels, ids = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        # Sorted by id, so that the cutting into batches cannot be seen in the last digit either.
        order = ids.argsort()
        return images[order], labels[order]

    def _subset(self, name: str, number: int, counts: list[int]) -> np.ndarray:
        """Indices into a real half, ``counts[c]`` of class c."""
        labels = self._half(name)[1].numpy()
        chosen = []
        for label, count in enumerate(counts):
            members = np.flatnonzero(labels == label)
            if len(members) < count:
                raise ValueError(
                    f"digit judge: {count} samples of class {label} need as many {name} images to compare with, "
                    f"there are {len(members)}; sample fewer, or keep more real images"
                )
            chosen.append(
                members[keyed_permutation(len(members), self.seed, f"judge {name}", number, label)[:count]]
            )
        return np.concatenate(chosen)

    def _copies(self, number: int, counts: list[int]) -> Tensor:
        """Indices of training images as a generator that only copies would draw them, ``counts[c]`` of class c."""
        chosen = []
        for label, count in enumerate(counts):
            members = torch.nonzero(self._half("train")[1] == label)[:, 0]
            draws = KeyedDraws(self.seed, torch.arange(count), step=number)
            chosen.append(members[draws.integers(f"judge copies {label}", len(members))])
        return torch.cat(chosen)

    def check_request(self, count: int, labels: Tensor | None) -> None:
        """As ``Metric.check_request``: classes are needed, more samples than ``k``, no class beyond the real ones."""
        super().check_request(count, labels)
        if labels is None:
            raise ValueError("digit judge: samples need labels, the classes that were asked for")
        if count <= self.k:
            raise ValueError(f"digit judge: {count} samples are too few for k = {self.k} neighbors")
        for name in ("train", "heldout"):
            real = self._half(name)[1].bincount()
            asked = labels.bincount(minlength=len(real))
            if len(asked) > len(real):
                raise ValueError(
                    f"digit judge: label {len(asked) - 1} was asked for, known are 0..{len(real) - 1}"
                )
            if bool((asked > real).any()):
                label = int((asked - real).argmax())
                raise ValueError(
                    f"digit judge: {int(asked[label])} samples of class {label} need as many {name} images to compare "
                    f"with, there are {int(real[label])}; sample fewer, or keep more real images"
                )

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """All results, ``passed_<result>`` for each that has a threshold, and ``passed``.

        Raises:
            RuntimeError: no reference or no samples.
            ValueError: fewer real images of a class than samples of it, no more samples than ``k``, or a
                result that is not finite.
        """
        self._require_samples()
        images, labels = self._samples()
        if len(images) <= self.k:
            raise ValueError(f"digit judge: {len(images)} samples are too few for k = {self.k} neighbors")
        counts = labels.bincount(minlength=int(self._half("train")[1].max()) + 1).tolist()
        subsets = [
            {name: torch.from_numpy(self._subset(name, i, counts)) for name in ("train", "heldout")}
            | {"copies": self._copies(i, counts)}
            for i in range(self.num_subsets)
        ]
        net = self.net
        with one_thread():
            results = self._classes(net, images, labels) | self._distances(net, images, subsets)
        bad = sorted(name for name, value in results.items() if not math.isfinite(value))
        if bad:
            raise ValueError(f"digit judge: not finite: {', '.join(bad)}")
        verdicts = self.thresholds.verdicts(results)
        results |= {f"passed_{name}": verdict for name, verdict in verdicts.items()}
        results["passed"] = all(verdicts.values())
        return results

    def _classes(self, net: JudgeNet, images: Tensor, labels: Tensor) -> dict[str, float]:
        heldout_images, heldout_labels = self._half("heldout")
        right = (net.probabilities(images).argmax(1) == labels).double()
        results = {
            "n": len(images),
            "classifier_heldout_accuracy": float(
                (net.probabilities(heldout_images).argmax(1) == heldout_labels).double().mean()
            ),
            "agreement": float(right.mean()),
        }
        for label in labels.unique().tolist():
            results[f"agreement_class_{label}"] = float(right[labels == label].mean())
        return results

    def _distances(self, net: JudgeNet, images: Tensor, subsets: list[dict[str, Tensor]]) -> dict[str, float]:
        pixels = {"samples": _pixels(images)}
        features = {"samples": net.features(images)}
        for name in ("train", "heldout"):
            real_images, _ = self._half(name)
            pixels[name] = _pixels(real_images)
            features[name] = net.features(real_images)
        heldout_nearest = nearest_distances(pixels["heldout"], pixels["train"])

        covered, real_covered, distance, floor, copies, nearest = [], [], [], [], [], []
        for subset in subsets:
            train, heldout = subset["train"], subset["heldout"]
            covered.append(coverage(pixels["heldout"][heldout], pixels["samples"], self.k))
            real_covered.append(coverage(pixels["heldout"][heldout], pixels["train"][train], self.k))
            distance.append(frechet_from_features(features["samples"], features["heldout"][heldout]))
            floor.append(frechet_from_features(features["train"][train], features["heldout"][heldout]))
            copied = features["train"][subset["copies"]]
            copies.append(frechet_from_features(copied, features["heldout"][heldout]))
            nearest.append(float(heldout_nearest[heldout].mean()))
        results = {
            "coverage": float(np.mean(covered)),
            "coverage_real": float(np.mean(real_covered)),
            "nearest_train_distance_samples": nearest_distance(pixels["samples"], pixels["train"]),
            "nearest_train_distance_heldout": float(np.mean(nearest)),
            "frechet": float(np.mean(distance)),
            "frechet_real_floor": float(np.mean(floor)),
            "frechet_real_floor_std": float(np.std(floor)),
            "frechet_copies": float(np.mean(copies)),
            "frechet_copies_std": float(np.std(copies)),
        }
        for denominator in ("nearest_train_distance_heldout", "frechet_real_floor"):
            if results[denominator] <= 0.0:
                raise ValueError(f"digit judge: {denominator} is zero, so nothing can be compared with it")
        results["nearest_train_distance_ratio"] = (
            results["nearest_train_distance_samples"] / results["nearest_train_distance_heldout"]
        )
        for name in ("frechet", "frechet_copies"):
            results[f"{name}_ratio"] = results[name] / results["frechet_real_floor"]
        return results

    def protocol(self) -> dict[str, Any]:
        """Seeds, sizes, spaces and thresholds."""
        return super().protocol() | {
            "judge_seed": self.seed,
            "train_n": len(self._train[0]) if self._train else 0,
            "heldout_n": len(self._heldout[0]) if self._heldout else 0,
            "classifier": "ensemble of two small convolutional nets, fitted on the training half alone",
            "classifier_fit": {
                "steps": self.fit_steps,
                "batch": self.fit_batch,
                "augmentation": "shifts of 1 pixel",
            },
            "coverage": {"space": "pixels in [0, 1]", "k": self.k, "ball": "closed", "real": "heldout"},
            "nearest_train_distance": "mean Euclidean distance of pixels in [0, 1] to the nearest training image",
            "frechet": {
                "features": "penultimate layers of the classifier",
                "num_features": JudgeNet.num_features,
                "distance": "samples to held-out subsets",
                "floor": "training subsets to held-out subsets",
                "copies": "training images drawn with replacement to held-out subsets",
            },
            "subsets": {"number": self.num_subsets, "class_counts": "those of the samples", "result": "mean"},
            "thresholds": asdict(self.thresholds),
        }


def judge(
    samples: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    train: LabeledImages,
    heldout: LabeledImages,
    **options: Any,
) -> dict[str, float]:
    """Judge one set: samples uint8 (N, C, H, W) with the labels (N,) asked for; options as :class:`DigitJudge`.

    Raises:
        ValueError: as the methods of :class:`DigitJudge`.
    """
    metric = DigitJudge(**options)
    metric.set_reference(train, heldout)
    metric.update(samples, labels, torch.arange(len(samples)))
    return metric.compute()


def _pixels(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) to (N, C*H*W) float64 in [0, 1]."""
    return images.reshape(len(images), -1).to(torch.float64) / 255.0
