"""Names for axes, guessed from the arrays that have them: the stream, heads, tables, inner axes."""

import re
from collections.abc import Iterable, Mapping, Sequence

from growjax.trace import Node, Place


_WORDS = {
    "positions": ("pos",),
    "token_types": ("type", "segment"),
    "vocab": ("tok", "wte", "vocab", "word", "embed", "table", "lookup"),
}
_ARRAYS = {
    "weight",
    "bias",
    "kernel",
    "w",
    "b",
    "scale",
    "weight_ih",
    "weight_hh",
    "bias_n",
    "table",
}


STREAMS = ("embed", "channels")


class Names:
    """Chooses a name for every axis that grows, each once."""

    def __init__(self, paths: Sequence[str], taken: Iterable[str] = ()):
        self.paths, self.taken = paths, set(taken)
        self.given: dict[Node, str] = {}

    def give(self, atom: Node, name: str) -> None:
        """Name an axis, if it has no name yet; a name that is taken gets a number."""
        if atom in self.given:
            return
        name = re.sub(r"\W", "_", name).strip("_") or "axis"
        name = name if name.isidentifier() else f"axis_{name}"
        taken = self.taken | set(self.given.values())
        number, unique = 2, name
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        self.given[atom] = unique

    def module(self, leaf: int) -> str:
        """The name of the module, in the model, that holds an array."""
        plain = re.sub(r"\.layers\.\d+\.", ".", self.paths[leaf])  # those of an `eqx.nn.MLP`
        parts = [part for part in plain.split(".") if not part.isdigit()]
        while len(parts) > 1 and parts[-1] in _ARRAYS:
            parts.pop()
        return parts[-1]

    def lookup(self, leaf: int) -> str:
        """A name for the rows of a table, from the path of the table."""
        path = self.paths[leaf].lower()
        for name, words in _WORDS.items():
            if any(word in path for word in words):
                return name
        return f"{self.module(leaf)}_rows"


def name_axes(
    names: Names,
    places: Mapping[Node, Sequence[Place]],
    role: Mapping[Place, str],
    products: Sequence[Sequence[Node]],
    stacks: Mapping[Node, str],
    convolved: set[int],
    fields: Mapping[Node, str],
    everywhere: Mapping[Node, Sequence[Place]],
    outputs: set[Node],
) -> None:
    """Name every axis of `places`: stacks, tables, the stream, heads, and the rest by their modules."""
    for atom, name in stacks.items():
        names.give(atom, name)
    for atom, where in places.items():
        tables = [p.leaf for p in where if role[p] == "lookup"]
        if tables:
            names.give(atom, "vocab" if atom in outputs else names.lookup(tables[0]))
    for atom, field in fields.items():
        if atom in places and field != "shape":
            names.give(atom, re.sub(r"^(num|n)_|_(size|dim)$", "", field))
    for atom, where in places.items():
        if any(names.paths[p.leaf].endswith("weight_hh") and role[p] == "consumed" for p in where):
            names.give(atom, "hidden")
    stream = _stream(names, everywhere, role)
    if stream is not None and stream in places:
        kernels = {p.leaf for p in places[stream]} & convolved
        mostly = 4 * len(kernels) > len({p.leaf for p in places[stream]})
        names.give(stream, "channels" if mostly else "embed")
    for atoms in sorted(products, key=len, reverse=True):
        _heads(names, atoms, places)
    for atom, where in places.items():
        names.give(atom, _hidden(names, where, role, stream, everywhere))


def _stream(names, places, role) -> Node | None:
    """The axis that most arrays carry of those that are read, and made by several or by a table."""
    best, most = None, (0, 0)
    tables = {p.leaf for where in places.values() for p in where if role[p] == "lookup"}
    for atom, where in places.items():
        made = [p for p in where if role[p] == "produced"]
        rows = {p.leaf for p in made} & tables
        several = rows or len({names.module(p.leaf) for p in made}) > 1
        both = several and any(role[p] == "consumed" for p in where)
        score = (len(rows), len({p.leaf for p in where}))
        if both and score > most and atom not in names.given:
            best, most = atom, score
    return best


def _heads(names: Names, atoms: Sequence[Node], places) -> None:
    """Name two or three axes that share a dimension: heads, and the axes inside each of them."""
    words = {2: ("heads", "head_dim"), 3: ("kv_heads", "group", "head_dim")}.get(len(atoms), ())
    for atom, word in zip(atoms, words, strict=False):
        if atom in places:
            value = word == "head_dim" and "head_dim" in names.given.values()
            names.give(atom, "value_dim" if value else word)


def _hidden(names: Names, where: Sequence[Place], role, stream, places) -> str:
    made = [p.leaf for p in where if role[p] == "produced"]
    read = [p.leaf for p in where if role[p] == "consumed"]
    if not read:
        module = names.module(made[0] if made else where[0].leaf)
        return {"head": "classes", "classifier": "classes"}.get(module, f"{module}_out")
    on_stream = {p.leaf for p in places.get(stream, ())}
    if made and set(made) & on_stream and set(read) & on_stream:
        return "mlp"
    return names.module(made[0] if made else where[0].leaf)
