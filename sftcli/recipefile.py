"""Recipes as files: YAML and `--set a.b=c` -> typed sections, and what is wrong with them in one line."""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import ValidationError

from sftcli.errors import UsageError
from sftcli.recipe import Options, Recipe

MAX_RECIPE_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases (no billion laughs) and without duplicate keys (no silent last-wins)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a recipe file into plain values. Raises UsageError naming file and line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise UsageError(f"recipe {path} is larger than {MAX_RECIPE_BYTES} bytes")
    try:
        value = yaml.load(data, _StrictLoader)
    except RecursionError:
        raise UsageError(f"recipe {path} is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{path}:{mark.line + 1 if mark else 1}: not a recipe: {problem}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a recipe: expected sections such as `train:`")
    return value


def apply_settings(values: dict[str, Any], settings: list[str], prefix: str = "") -> dict[str, Any]:
    """Lay `a.b=c` settings over nested values. With `prefix`, keys may leave the section's own name out."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {setting}: expected key=value, such as optimizer.lr=1e-3")
        try:
            value = yaml.load(text, _StrictLoader)
        except yaml.YAMLError:
            value = text
        keys = path.removeprefix(f"{prefix}.").split(".") if prefix else path.split(".")
        place = values
        for key in keys[:-1]:
            inner = place.get(key)
            if isinstance(inner, str):  # a shorthand such as `schedule: cosine`
                inner = {"kind": inner}
            place[key] = dict(inner) if isinstance(inner, dict) else {}
            place = place[key]
        place[keys[-1]] = value
    return values


def parse(kind: type[Options], values: dict[str, Any], section: str = "", source: str = "") -> Any:
    """Validate plain values as `kind`. Raises UsageError with the path, what was expected and the nearest name."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explained(error, kind, section, source) from None


def _explained(error: ValidationError, kind: type[Options], section: str, source: str) -> UsageError:
    first = error.errors()[0]
    loc = [part for part in first["loc"] if isinstance(part, int) or not _is_tag(part)]
    path = ".".join(str(part) for part in ([section] if section else []) + loc)
    start = f"{source}: " if source else ""
    if first["type"] == "extra_forbidden":
        kinds = _kinds_beside(kind, loc)
        if owner := next((k.model_fields["kind"].default for k in kinds if loc[-1] in k.model_fields), None):
            place = ".".join([*path.split(".")[:-1], "kind"])
            return UsageError(f"{start}{path}: unknown key of this kind", hint=f"{place}: {owner} has it")
        names = sorted({name for k in kinds for name in k.model_fields})
        inside = [place for k in kinds for place in _places_of(str(loc[-1]), k)]
        near = difflib.get_close_matches(str(loc[-1]), names, 1, 0.6) or list(dict.fromkeys(inside))
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(names)}"
        return UsageError(f"{start}{path}: unknown key", hint=hint)
    if first["type"] in ("literal_error", "union_tag_invalid"):
        context: dict[str, Any] = first["ctx"]
        names = re.findall("'([^']*)'", context.get("expected") or context["expected_tags"])
        given, place = (context["tag"], ".kind") if "tag" in context else (first["input"], "")
        near = difflib.get_close_matches(str(given), names, 1, 0.6)
        told = f"{start}{path}{place}: {given!r} is not one of {', '.join(names)}"
        return UsageError(told, hint=f"did you mean {near[0]}?" if near else None)
    reason = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return UsageError(f"{start}{path + ': ' if path else ''}{reason[0].lower() + reason[1:]}{given}")


def _places_of(name: str, kind: type[Options]) -> list[str]:
    """Where the sections inside of a class of options have a key: `optimizer.lr`, `train.optimizer.lr`."""
    found = []
    for field, info in kind.model_fields.items():
        for section in _sections(info.annotation):
            found += [f"{field}.{name}"] if name in section.model_fields else []
            found += [f"{field}.{place}" for place in _places_of(name, section)]
    return found


def _sections(annotation: Any) -> list[type[Options]]:
    """The option classes inside an annotation: a class, a union, an Annotated or Optional of them."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return [annotation]
    if typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [found for inner in typing.get_args(annotation) for found in _sections(inner)]
    return []


def _is_tag(part: str) -> bool:
    """pydantic puts the tag of a union into the path of an error; people did not write it there."""
    return part in ("adamw", "muon", "lora", "prefix", "prompt", "causal", "glm", "bert")


def _kinds_beside(kind: type[Options], loc: list[Any]) -> list[type[Options]]:
    """The option classes whose keys may stand at the place of an unknown one."""
    kinds: list[type[Options]] = [kind]
    for part in loc[:-1]:
        fields = [k.model_fields[part] for k in kinds if part in k.model_fields]
        kinds = [found for field in fields for found in _sections(field.annotation)] or kinds
    return kinds


def load_recipe(path: str, settings: list[str] | None = None) -> Recipe:
    """Read, override and validate a whole recipe."""
    recipe: Recipe = parse(Recipe, apply_settings(read_yaml(path), settings or []), source=path)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120))
