"""What the arguments of `annotate` declare: every array's declaration, and layers' static fields."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx

from growjax.annotation import layers
from growjax.annotation.packing import has_shape, walk
from growjax.axes import Declaration, declaration_of
from growjax.errors import AxisError


def unreadable(mappings: Mapping[str, Any], names: Mapping[str, Any], stream: Any) -> Iterator[str]:
    """The arguments of `annotate` that are of another type, a line each."""
    for name, value in mappings.items():
        if not isinstance(value, Mapping):
            yield f"{name}: expected a dict of patterns, got {value!r}"
            continue
        yield from (
            f"{name}: expected a pattern, got {each!r}"
            for each in value
            if not isinstance(each, str)
        )
    statics, stacks = (mappings[name] for name in ("statics", "stacks"))
    for pattern, size in statics.items() if isinstance(statics, Mapping) else ():
        texts = size if isinstance(size, tuple) else (size,)
        if not all(isinstance(text, str) and re.fullmatch(r"[\w\s()+]+", text) for text in texts):
            yield (
                f'statics: {pattern}: expected a size such as "embed" or "4 embed", or a tuple of such, '
                f"got {size!r}"
            )
    for pattern, axis in stacks.items() if isinstance(stacks, Mapping) else ():
        if not isinstance(axis, str) or not axis.isidentifier():
            yield f"stacks: {pattern}: expected the name of an axis, got {axis!r}"
    for name, value in names.items():
        if isinstance(value, str):
            # A string is a sequence too, of its letters
            yield f"{name}: expected a list, got {value!r}; give [{value!r}]"
        elif not isinstance(value, list | tuple | set | frozenset) or not all(
            isinstance(each, str) for each in value
        ):
            yield f"{name}: expected a list of names, got {value!r}"
    if not isinstance(stream, str):
        yield f"stream: expected the name of an axis, got {stream!r}"


def declared_arrays(tree, specs) -> tuple[list[tuple[str, Declaration]], dict[str, Any], list[str]]:
    """Every array pattern with its declaration, the static fields of whole layers, and the errors.

    A pattern that names a layer is replaced by the paths of the layer's arrays.
    """
    places = list(walk(tree))
    arrays = [path for _, path, leaf in places if has_shape(leaf)]
    absent = [path for _, path, leaf in places if leaf is None]
    modules = [(path, node) for _, path, node in places if isinstance(node, eqx.Module)]
    declared: list[tuple[str, Declaration]] = []
    statics: dict[str, Any] = {}
    complaints = []
    for pattern, text in specs.items():
        try:
            declaration = _declaration(text)
        except AxisError as error:
            complaints.append(f"pattern {pattern!r}: {error}")
            continue
        if fnmatch.filter(arrays, pattern):
            declared.append((pattern, declaration))
            continue
        matched = [(path, node) for path, node in modules if matches(path, [pattern])]
        if not matched and fnmatch.filter(absent, pattern):
            declared.append((pattern, declaration))
        elif not matched:
            complaints.append(f"pattern {pattern!r} matches no array")
        for path, node in matched:
            try:
                written, own = layers.specs_of(node, declaration.spec)
            except AxisError as error:
                complaints.append(f"pattern {pattern!r}: {path}: {error}")
                continue
            declared += _of_layer(path, declaration, written)
            statics |= {f"{path}.{name}": axis for name, axis in own.items()}
    return declared, statics, complaints


def _declaration(given: Any) -> Declaration:
    """What an entry of `specs` declares.

    A string is a parameter, or the epsilon of a norm (`<embed>`): a buffer, which is not trained, since
    it is rescaled where its axis grows by zeros. Raises `AxisError` for what declares no array.
    """
    if isinstance(given, str):
        epsilon = re.search(r"<~?[A-Za-z_]\w*>", given)
        return Declaration("buffer" if epsilon else "param", given)
    declaration = given if isinstance(given, Declaration) else declaration_of(given)
    if declaration is None:
        raise AxisError(
            'expected a spec such as "embed -> mlp", or gj.buffer("head_dim") for an array that is not '
            f"trained, got {given!r}"
        )
    if declaration.kind not in ("param", "buffer"):
        raise AxisError(
            f"a {declaration.kind} declares no array of this model; gates=[...] gives it gates"
        )
    for name in ("born", "origin", "closes"):
        if getattr(declaration, name) is not None:
            raise AxisError(
                f"{name}: it names an attribute of a module that declares its own arrays"
            )
    return declaration


def _of_layer(path: str, declaration: Declaration, written: Mapping[str, str]):
    """The declarations of a layer's arrays; running statistics are buffers, which are not trained."""
    for name, spec in written.items():
        kind = (
            "buffer" if "_index.init" in name or name == "batch_counter.init" else declaration.kind
        )
        yield f"{path}.{name}", dataclasses.replace(declaration, kind=kind, spec=spec)


def written(declaration: Declaration) -> str:
    """A declaration as it would be written in a call of `gj.annotate`."""
    if declaration == _declaration(declaration.spec):
        return repr(declaration.spec)
    options = {"init": declaration.init, "fan_in": declaration.fan_in}
    more = [f", {name}={value!r}" for name, value in options.items() if value is not None]
    return f"gj.{declaration.kind}({declaration.spec!r}{''.join(more)})"


def matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
