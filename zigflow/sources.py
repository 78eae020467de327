"""Which data a configuration reads: opened, said in one line, and held against what the configuration asks for.

What is left null (number of classes, image size, channels) follows from the data, here and nowhere else. Classes of all
sets are numbered by their names, those of the training set first.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

from hydra.utils import get_class

from zigflow.data.class_names import are_numbers, by_name, only_renames, shown
from zigflow.data.facts import DataFacts, facts_of, innermost
from zigflow.data.streaming import StreamSource
from zigflow.data.subset import Subset
from zigflow.data.tar import ShardError
from zigflow.nn import as_denoiser
from zigflow.nodes import make
from zigflow.settings import Settings, SettingsError

log = logging.getLogger(__name__)

SPLITS = ("source", "heldout")
# Keys that may be null until the data is read, by group.
_FOLLOW_DATA = {
    "model": ("num_classes", "img_dim", "in_channels"),
    "data": ("num_classes", "image_size", "channels", "class_names"),
}


def build_source(settings: Settings, split: str = "source", say: bool = True) -> Any:
    """The data source of ``data.source`` or ``data.heldout``, cut to ``data.limit`` samples if that is set.

    Its classes have the numbers that ``data.class_names`` gives them, held-out ones those of the training set.

    Args:
        say: log in one line what was found.

    Raises:
        SettingsError: it cannot be read, or has classes that the training set does not have; one line.
    """
    node = getattr(settings.data, split)
    if not node or ("root" in node and node["root"] is None):
        return None
    if split == "source" and settings.data.order == "streaming":
        raise SettingsError(
            f"data={settings.data.name} has data.order=streaming: its samples have no numbers, and only training can "
            "read them; give data.heldout, or download the shards and set data.order=indexed"
        )
    source = make(f"data.{split}", node)
    limit = settings.data.limit
    if limit is not None and split == "source":
        try:
            source = Subset(source, limit)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return _numbered(settings, source, split, say)


def build_stream(settings: Settings, node: Mapping[str, Any]) -> StreamSource:
    """What the source's class makes of the same keywords for one pass after another: its method ``stream``."""
    target = str(node["_target_"])
    if not hasattr(get_class(target), "stream"):
        raise SettingsError(
            f"data.order=streaming: {target} of data={settings.data.name} cannot be streamed, shards can "
            "(zigflow.datasets.shards.ShardSource); use data.order=indexed"
        )
    source = make("data.source", {**node, "_target_": f"{target}.stream"})
    what = f"data={settings.data.name}"
    try:
        if settings.data.num_classes is None or settings.data.num_classes > 0:
            source.number_by(settings.data.class_names or ())
    except ValueError as error:
        raise SettingsError(f"{what} {error}") from error
    say_facts(facts_of(source, what))
    return source


def _called(settings: Settings, split: str) -> str:
    return f"data={settings.data.name}" + (" (heldout)" if split == "heldout" else "")


def say_facts(facts: DataFacts, more: str = "") -> None:
    """One line about a data set, and one more where its classes are named by other numbers."""
    log.info("%s%s", facts.line(), more)
    if facts.renumbered():
        log.warning("%s; labels=[...] takes names in quotes, too", facts.renumbered())


def class_names(settings: Settings) -> tuple[str, ...]:
    """The names of the training set's classes by number, as the configuration or else the set says; () for none."""
    return _known_names(settings) or ()


def _known_names(settings: Settings) -> tuple[str, ...] | None:
    """As :func:`class_names`; None where it cannot be told, since the set is not at hand."""
    if settings.data.class_names is not None:
        return settings.data.class_names
    node = settings.data.source
    if not node or ("root" in node and node["root"] is None):
        return None
    try:
        streams = settings.data.order == "streaming"
        source = build_stream(settings, node) if streams else make("data.source", node)
    except (SettingsError, OSError, ShardError) as error:
        log.warning("the names of the classes are not known, the training set cannot be read: %s", error)
        return None
    return tuple(getattr(source, "class_names", ()))


def _numbered(settings: Settings, source: Any, split: str, say: bool) -> Any:
    """``source`` with the numbers of the training set's classes."""
    data, what = settings.data, _called(settings, split)
    facts = facts_of(source, what)
    known = data.num_classes if data.num_classes is not None else 0
    with_classes = facts.has_labels and (data.num_classes is None or data.num_classes > 0)
    own = facts.class_names
    if not with_classes:
        if say:
            say_facts(facts)
        return source
    names = data.class_names
    if names is None and split == "heldout" and not are_numbers(own):
        names = _known_names(settings)
    if names == () and split == "heldout" and not are_numbers(own):
        raise SettingsError(
            f"{what} has {facts.classes()}, and the classes of the training set have no names: give "
            "data.class_names=[...], theirs in the order of their numbers"
        )
    names = names or ()
    if split == "heldout" and known and not names and (facts.num_classes or 0) > known:
        raise SettingsError(
            f"{what} has {facts.classes()}, data.num_classes={known}: give it no other classes than the training set"
        )
    if known and facts.num_classes is None and hasattr(source, "limit_classes"):
        source.limit_classes(known)
    unnamed = not own or only_renames(own, names)
    if names and unnamed and split == "heldout" and not are_numbers(names):
        log.warning(
            "%s has no names of its classes: its labels are taken as the training set's numbers", what
        )
    try:
        numbered = by_name(source, names)
    except ValueError as error:
        raise SettingsError(f"{what} {error}") from error
    missing = [name for name in names if not unnamed and name not in own]
    if say:
        say_facts(facts, f"; no sample of {shown(missing)}" if missing else "")
    return numbered


def as_continued(plain: dict[str, Any], stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of a run that continues: what is null, and would follow from the data, is as it was stored."""
    if stored is None:
        return plain
    plain = copy.deepcopy(plain)
    groups = [(plain[group], stored.get(group) or {}, keys) for group, keys in _FOLLOW_DATA.items()]
    for split in SPLITS:
        node, before = plain["data"].get(split) or {}, (stored.get("data") or {}).get(split) or {}
        groups.append((node, before, tuple(node)))
    for node, before, keys in groups:
        for key in keys:
            if key in node and node[key] is None and before.get(key) is not None:
                node[key] = before[key]
    plain["data"] = with_old_defaults(plain["data"], stored.get("data") or {})
    return plain


def with_old_defaults(data: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The group ``data`` for what was trained by release 0.1, with its defaults of keys that it did not have."""
    data = dict(data)
    if "class_names" in stored:
        return data
    for split in SPLITS:
        node, before = data.get(split), stored.get(split) or {}
        if not node or not before or node.get("_target_") != before.get("_target_"):
            continue
        try:
            old = getattr(get_class(str(node["_target_"])), "before_0_2", {})
        except Exception:
            continue  # What is wrong with it is told where it is built.
        data[split] = {**node, **{key: value for key, value in old.items() if key not in before}}
    return data


def settled(
    plain: dict[str, Any],
    source: Any,
    codec: Any,
    stored: Mapping[str, Any] | None = None,
    follows: bool = True,
) -> dict[str, Any]:
    """The configuration with everything in it that follows from the training data.

    Args:
        plain: the composed configuration.
        follows: ``model.num_classes`` is ``data.num_classes``, wherever that comes from.
        stored: that of the checkpoint which the run continues; what was wrong there already is only warned of.

    Raises:
        SettingsError: classes that the data does not have, or labels that it does not have; with the cure.
    """
    plain = copy.deepcopy(plain)
    data, model = plain["data"], plain["model"]
    facts = facts_of(source, f"data={data['name']}")
    asked = (data.get("num_classes"), model.get("num_classes", -1))
    problem = "" if model.get("has_text") else _class_problem(plain, facts, source, follows)
    if problem:
        old = None if stored is None else (
            stored["data"].get("num_classes"), stored["model"].get("num_classes", -1)
        )  # fmt: skip
        if old != asked:
            raise SettingsError(problem)
        log.warning("the run goes on as it was started, but: %s", problem)
    _settle_classes(data, model, facts)
    _check_kept_names(data, stored)
    _settle_shapes(plain, facts, codec)
    return plain


def _check_kept_names(data: Mapping[str, Any], stored: Mapping[str, Any] | None) -> None:
    """A run that continues keeps the class that each embedding belongs to."""
    before = list(((stored or {}).get("data") or {}).get("class_names") or ())
    now = list(data["class_names"] or ())
    if data["num_classes"] > 0 and before != now and not are_numbers(before):
        raise SettingsError(
            f"data.class_names={shown(now) or '[]'}, and the run that continues was trained with {shown(before)}: drop "
            "data.class_names, or start a new run that takes the weights with ckpt="
        )


def _class_problem(plain: Mapping[str, Any], facts: DataFacts, source: Any, follows: bool) -> str:
    """What is wrong with the classes of data and model, and the cure; "" for nothing."""
    data, model, name = plain["data"], plain["model"], plain["model"].get("name")
    asked, reads = data.get("num_classes"), model.get("num_classes", -1)
    conditional = reads is None or reads > 0
    if not facts.has_labels:
        wanted = (
            f"data.num_classes={asked}" if (asked or 0) > 0 else f"model={name} is conditioned on classes"
        )
        return _without_labels(facts, source, wanted, follows) if conditional or (asked or 0) > 0 else ""
    if asked is not None and asked <= 0:
        return "" if not conditional else (
            f"data.num_classes={asked} trains without classes, model={name} has model.num_classes={reads}: set "
            "model.num_classes=0, or drop data.num_classes"
        )  # fmt: skip
    listed = data.get("class_names") or ()
    raw = tuple(getattr(innermost(source), "class_names", ()))
    missing = [label for label in listed if raw and label not in raw]
    if missing and not only_renames(raw, listed):
        return (
            f"data.class_names lists {shown(missing)}, which {facts.name} does not have: it has {shown(raw)}"
        )
    there = facts.num_classes or len(listed) or None
    if there is not None and listed and len(listed) != there:
        return f"data.class_names lists {len(listed)} names, {facts.name} has {facts.classes()}: give {there} names"
    if there is None:
        there = asked if asked is not None else reads
        if there is None:
            return (
                f"{facts.name} has labels, and nothing says how many classes: give data.num_classes=N (0: train "
                "without classes), or data.class_names=[...]"
            )
    off = [("data.num_classes", asked)] if asked not in (None, there) else []
    if conditional and reads not in (None, there) and not (off and follows):
        off.append(("model.num_classes", reads))
    if not off:
        return _labels_problem(facts, innermost(source), there, len(listed))
    found = facts.classes() if facts.num_classes is not None else f"data.num_classes={there}"
    return (
        f"{facts.name} has {found}, {' and '.join(f'{key}={value}' for key, value in off)}: set "
        f"{' '.join(f'{key}={there}' for key, _ in off)}"
    )


def _labels_problem(facts: DataFacts, source: Any, classes: int, listed: int) -> str:
    """What is wrong with the number of classes of a set whose index does not say, by its labels; "" for nothing."""
    found = source.highest_label() if not getattr(source, "counted", True) else None
    if found is None:
        return ""
    (highest, count), samples = found, len(source)
    cure = f"give {highest + 1} names" if listed else f"set data.num_classes={highest + 1}"
    asked = f"data.class_names lists {listed} names" if listed else f"the number of classes is {classes}"
    if highest >= classes:
        return f"{facts.name} has labels up to {highest}, and {asked}: {cure} or more"
    # A trial with a few samples of a published set cannot hold all its classes, and is only warned of.
    if highest + 1 < classes and count == samples >= classes:
        return f"{facts.name} has no label above {highest}, and {asked}: {cure}"
    # Were all classes as frequent, less than once in a thousand sets.
    if ((highest + 1) / classes) ** count < 1e-3:
        log.warning("%s: none of %d labels is above %d, and %s", facts.name, count, highest, asked)
    return ""


def _without_labels(facts: DataFacts, source: Any, wanted: str, follows: bool) -> str:
    hint_of: Callable[[], str] | None = getattr(innermost(source), "label_hint", None)
    hint = hint_of() if hint_of is not None else ""
    cures = [f"'data.source.rename={hint}' to read labels there"] if hint else []
    if "captions" in facts.fields and not hint:
        cures.append("'data.source.rename={txt: labels}' where the texts are classes")
    keys = "data.num_classes=0" if follows else "model.num_classes=0 data.num_classes=0"
    cures.append(f"{keys} to train without classes")
    beside = f"; its samples also have {', '.join(facts.ignored)}" if facts.ignored else ""
    found = f"{facts.name} has no labels (fields {', '.join(facts.fields)}{beside})"
    return f"{found}, and {wanted}: set {', or '.join(cures)}"


def _settle_classes(data: dict[str, Any], model: dict[str, Any], facts: DataFacts) -> None:
    asked = data.get("num_classes")
    if asked is None:
        data["num_classes"] = (facts.num_classes or model.get("num_classes") or 0) if facts.has_labels else 0
        if "num_classes" in model and model["num_classes"] is None:
            model["num_classes"] = data["num_classes"]
            log.warning("data.num_classes is not given: %s of %s are taken", facts.classes(), facts.name)
    if data.get("class_names") is None:
        data["class_names"] = list(facts.class_names)
    without_classes(model)


def without_classes(model: dict[str, Any]) -> None:
    """A model without classes has none to drop."""
    classes = model.get("num_classes", -1)
    if model.get("has_text") or "num_classes" not in model or classes is None or classes > 0:
        return
    if model.get("class_dropout_prob"):
        log.info("model.num_classes=%s: there are no classes to drop, class_dropout_prob=0", classes)
        model["class_dropout_prob"] = 0.0


def _settle_shapes(plain: dict[str, Any], facts: DataFacts, codec: Any) -> None:
    data, model = plain["data"], plain["model"]
    point = facts.shape
    if facts.has_pixels:
        if data.get("image_size") is None:
            data["image_size"] = _side(facts.shape)
        if data.get("channels") is None:
            data["channels"] = facts.shape[-3]
        if plain.get("use_latent") and hasattr(codec, "latent_shape"):
            point = tuple(codec.latent_shape(point))
    for key, value in (("img_dim", _side(point)), ("in_channels", point[-3])):
        if key in model and model[key] is None:
            model[key] = value


def _side(shape: tuple[int, ...]) -> int | list[int]:
    return shape[-1] if shape[-1] == shape[-2] else list(shape[-2:])


def check_fit(settings: Settings, model: Any, source: Any, codec: Any) -> None:
    """Refuse data that the model cannot read, before the first step.

    Raises:
        SettingsError: another shape, latents in the place of pixels or the other way round, no text; one line.
    """
    facts = facts_of(source, f"data={settings.data.name}")
    stored = bool({"latents", "moments"} & set(facts.fields))
    if settings.is_latent and not stored:
        raise SettingsError(
            f"is_latent=true, but the samples of {facts.name} hold {', '.join(facts.fields)} only"
        )
    if settings.is_latent and facts.has_pixels:
        raise SettingsError(
            f"the samples of {facts.name} hold pixels and latents: read one of them, with data.source.fields or "
            "data.source.rename"
        )
    check_shape(settings, model, source, codec)
    asked = as_denoiser(model)
    if asked.has_text and "tokens" not in facts.fields:
        raise SettingsError(
            f"model.has_text=true, but the samples of {facts.name} have no tokens: name a caption-feature key in "
            "data.source.rename, or set model.has_text=false"
        )
    classes = asked.num_classes
    if classes > 0 and "num_classes" not in settings.model:
        # The class's own default, which no configuration names.
        problem = _class_problem(
            {"data": {"num_classes": None}, "model": {**settings.model, "num_classes": classes}},
            facts, source, False,
        )  # fmt: skip
        if problem:
            raise SettingsError(problem)


def check_shape(settings: Settings, model: Any, source: Any, codec: Any, split: str = "source") -> None:
    """Refuse samples of another shape than the model reads.

    Raises:
        SettingsError: both shapes and the keys to choose.
    """
    facts = facts_of(source, _called(settings, split))
    wanted, given = as_denoiser(model).sample_shape, facts.shape
    if settings.use_latent and facts.has_pixels:
        given = tuple(codec.latent_shape(given))
    if given != wanted:
        raise SettingsError(
            f"{facts.name} has samples of shape {given}, model={settings.model.get('name')} reads {wanted}: "
            "choose fitting data.image_size, data.channels, model"
        )
