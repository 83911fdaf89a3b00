"""What the layers of a decoder see, in config.json: windows and rotary positions, alike or by layer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from growjax.hf.family import ConfigFile
from growjax.hf.rotary import KINDS, Rotation, read_block, read_rotary, write_rotary, write_scaling
from growjax.models import DecoderConfig, Sight


FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Sights:
    """How a family says what its layers see: without windows, as in Llama.

    **Fields**

    - `theta`, `positions`: defaults of `rope_theta` and `max_position_embeddings`.
    - `part`: the default share of a head that is turned; None if it is always all of it.
    - `outside`: the keys of theta and the share in old files.
    - `kinds`: the scalings of rotary positions that the family knows.
    - `length`: the default of `original_max_position_embeddings`, where the file has it outside of the
      object of rotary positions.
    """

    theta: float = 10000.0
    positions: int = 2048
    part: float | None = None
    outside: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    kinds: Sequence[str] = KINDS
    length: int | None = None

    def read(
        self, file: ConfigFile, layers: int, head_dim: int
    ) -> tuple[tuple[Sight, ...], int | None]:
        """The pattern of the layers, and how many coordinates of a head are turned."""
        rotation = self.rotation(file)
        turned = None
        if self.part is not None and rotation.part != 1:
            turned = int(head_dim * rotation.part)
            if turned % 2 or not turned:
                file.complaints.append(
                    f"{self.outside[1]}: expected an even number of coordinates, got {turned} of "
                    f"{head_dim}"
                )
        windows = self.windows(file, layers)
        every = tuple(Sight(window, rotation.theta, rotation.scaling) for window in windows)
        return shortest(every), turned

    def rotation(self, file: ConfigFile) -> Rotation:
        """The rotary positions of all layers."""
        return read_rotary(
            file,
            theta=self.theta,
            positions=self.positions,
            part=self.part,
            outside=self.outside,
            kinds=self.kinds,
            length=self.length,
        )

    def windows(self, file: ConfigFile, layers: int) -> list[int | None]:
        """The window of every layer."""
        return [None] * max(layers, 1)

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of the pattern."""
        sight = config.pattern[0]
        part = None if self.part is None else (config.turned or config.head_dim) / config.head_dim
        keys = write_rotary(sight.theta, sight.scaling, part)
        if self.outside[0] != "rope_theta":
            keys[self.outside[0]] = keys.pop("rope_theta")
            keys[self.outside[1]] = keys.pop("partial_rotary_factor")
        if self.length is not None:
            keys["original_max_position_embeddings"] = getattr(sight.scaling, "length", self.length)
        return keys

    def limits(self, config: DecoderConfig) -> list[str]:
        """What of the pattern the family cannot say."""
        faults = []
        if not all(sight.rotary for sight in config.pattern):
            faults.append("pattern: in this family every layer has rotary positions")
        elif len({(sight.theta, sight.scaling) for sight in config.pattern}) > 1:
            faults.append("pattern: in this family all layers have the same rotary positions")
        if self.part is None and config.turned is not None:
            faults.append(f"turned: in this family heads are turned whole, got {config.turned}")
        kinds = [write_scaling(s.scaling)["rope_type"] for s in config.pattern if s.scaling]
        faults += [
            f"pattern: this family has no {kind} scaling"
            for kind in kinds
            if kind not in self.kinds
        ]
        return faults + self.window_limits(config)

    def window_limits(self, config: DecoderConfig) -> list[str]:
        """What of the windows the family cannot say."""
        if any(sight.window is not None for sight in config.pattern):
            return ["pattern: in this family no layer has a window"]
        return []


@dataclasses.dataclass(frozen=True)
class OneWindow(Sights):
    """One window for all layers, or none (Mistral, Phi-3).

    `window` is the default; with `switch`, `use_sliding_window` turns it on (and is off by default).
    """

    window: int | None = None
    switch: bool = False

    def windows(self, file: ConfigFile, layers: int) -> list[int | None]:
        """The window of every layer."""
        on = file.flag("use_sliding_window", default=False) if self.switch else True
        if self.switch and file.count("max_window_layers", default=0) and on:
            file.complaints.append(
                "max_window_layers: old readers leave so many layers without a window, and new ones "
                "none; remove it, or set use_sliding_window to false"
            )
        default = self.window if "sliding_window" not in file.values else None
        given = file.get("sliding_window", default=default)
        window = file.size("sliding_window", default=default) if on and given is not None else None
        return [window] * max(layers, 1)

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of the pattern."""
        window = config.pattern[0].window
        switch = {"use_sliding_window": window is not None} if self.switch else {}
        return super().write(config) | {"sliding_window": window} | switch

    def window_limits(self, config: DecoderConfig) -> list[str]:
        """What of the windows the family cannot say."""
        if len({sight.window for sight in config.pattern}) > 1:
            return ["pattern: in this family all layers have the same window"]
        return []


@dataclasses.dataclass(frozen=True)
class TypedLayers(Sights):
    """One window, for the layers that `layer_types` calls sliding (Qwen, Gemma 2).

    **Fields**

    - `window`: the default of `sliding_window`.
    - `switch`: whether `use_sliding_window` turns windows on (and is off by default).
    - `types`: a function from a file and the number of a layer to whether it slides, where there is no
      `layer_types`.
    """

    window: int | None = 4096
    switch: bool = True
    types: Callable[[ConfigFile, int], bool] = lambda file, i: False

    def windows(self, file: ConfigFile, layers: int) -> list[int | None]:
        """The window of every layer."""
        on = file.flag("use_sliding_window", default=False) if self.switch else True
        default = self.window if "sliding_window" not in file.values else None
        given = file.get("sliding_window", default=default)
        window = file.size("sliding_window", default=default) if on and given is not None else None
        # Gemma 2's first files have it twice, and transformers reads the other one
        if file.get("sliding_window_size", default=given) != given:
            file.complaints.append(
                "sliding_window_size: expected the sliding_window, or no such key"
            )
        slides = self.sliding(file, max(layers, 1), window)
        if any(slides) and window is None:
            file.complaints.append(
                f"layer_types: {SLIDING} needs a sliding_window"
                + (", and use_sliding_window" if self.switch else "")
            )
        return [window if sliding else None for sliding in slides]

    def sliding(self, file: ConfigFile, layers: int, window: int | None) -> list[bool]:
        """Which layers slide."""
        derived = [self.types(file, i) and window is not None for i in range(layers)]
        given = file.get("layer_types")
        if given is None:
            return derived
        known = isinstance(given, list) and all(kind in (FULL, SLIDING) for kind in given)
        if not known or len(given) != layers:
            file.complaints.append(
                f"layer_types: expected {FULL} or {SLIDING} for each of {layers} layers, got {given!r}"
            )
            return derived
        return [kind == SLIDING for kind in given]

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of the pattern."""
        return super().write(config) | self.written_windows(config)

    def written_windows(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of windows."""
        every = by_layer(config)
        window = next((s.window for s in every if s.window is not None), None)
        types = [FULL if s.window is None else SLIDING for s in every]
        keys: dict[str, Any] = {"layer_types": types}
        if self.switch:
            keys |= {"use_sliding_window": window is not None}
        return keys | ({} if window is None else {"sliding_window": window})

    def window_limits(self, config: DecoderConfig) -> list[str]:
        """What of the windows the family cannot say."""
        windows = {s.window for s in config.pattern if s.window is not None}
        if len(windows) > 1:
            return [f"pattern: in this family all windows are alike, got {sorted(windows)}"]
        return []


@dataclasses.dataclass(frozen=True)
class TwoRotations(TypedLayers):
    """Sliding layers with rotary positions of their own (Gemma 3).

    `bases` are the keys of the two thetas in old files. A `rope_scaling` is that of the other layers, or
    of all of them (`everywhere`).
    """

    theta: float = 1e6
    local: float = 1e4
    switch: bool = False
    bases: tuple[str, str] = ("rope_theta", "rope_local_base_freq")
    everywhere: bool = False

    def read(
        self, file: ConfigFile, layers: int, head_dim: int
    ) -> tuple[tuple[Sight, ...], int | None]:
        """The pattern of the layers; heads are turned whole."""
        blocks = file.get("rope_parameters", default={})
        old = file.get("rope_scaling", default={})
        if not isinstance(blocks, dict) or not isinstance(old, dict):
            file.complaints.append("rope_parameters: expected an object for each type of layers")
            blocks, old = {}, {}
        unknown = [key for key in blocks if key not in (FULL, SLIDING)]
        if unknown:
            file.complaints.append(
                f"rope_parameters: expected {FULL} and {SLIDING} in it, got {', '.join(unknown)}"
            )
        rotations = {}
        for kind, theta, key in (
            (FULL, self.theta, self.bases[0]),
            (SLIDING, self.local, self.bases[1]),
        ):
            base = file.number(key, default=theta)
            own = blocks.get(kind) or {}
            given = (own | old) if kind == FULL or self.everywhere else own
            block = ConfigFile(given if isinstance(given, dict) else {"rope_type": given}, ())
            rotations[kind] = read_block(block, file, base, self.positions, kinds=self.kinds)
            file.complaints.extend(f"rope_parameters.{kind}.{x}" for x in block.complaints)
        every = [
            Sight(window, *rotations[FULL if window is None else SLIDING][:2])
            for window in self.windows(file, layers)
        ]
        return shortest(tuple(every)), None

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of the pattern."""
        blocks = {
            FULL: {"rope_type": "default", "rope_theta": self.theta},
            SLIDING: {"rope_type": "default", "rope_theta": self.local},
        }
        for sight in config.pattern:
            kind = FULL if sight.window is None else SLIDING
            scaled = {} if sight.scaling is None else write_scaling(sight.scaling)
            blocks[kind] = {"rope_type": "default", "rope_theta": sight.theta} | scaled
        old = {key: x for key, x in blocks[FULL].items() if key != "rope_theta"}
        keys = {
            "rope_parameters": blocks,
            self.bases[0]: blocks[FULL]["rope_theta"],
            self.bases[1]: blocks[SLIDING]["rope_theta"],
            **self.written_windows(config),
        }
        if not self.everywhere:
            keys["rope_scaling"] = None if old == {"rope_type": "default"} else old
        return keys

    def limits(self, config: DecoderConfig) -> list[str]:
        """What of the pattern the family cannot say."""
        faults = self.window_limits(config)
        turned = getattr(config, "turned", None)
        if turned is not None or not all(sight.rotary for sight in config.pattern):
            faults.append("pattern: in this family every layer turns whole heads")
        kinds = {(s.window is None, s.theta, s.scaling) for s in config.pattern}
        if len(kinds) != len({full for full, _, _ in kinds}):
            faults.append(
                "pattern: in this family all layers of one type have the same rotary positions"
            )
        return faults


@dataclasses.dataclass(frozen=True)
class SomeWithout(TypedLayers):
    """Layers without positions among others (SmolLM 3): every `no_rope_layer_interval`-th by default."""

    def read(
        self, file: ConfigFile, layers: int, head_dim: int
    ) -> tuple[tuple[Sight, ...], int | None]:
        """The pattern of the layers; heads are turned whole."""
        rotation = self.rotation(file)
        rotary = self.rotary(file, max(layers, 1))
        file.get("max_window_layers")  # in the published files, and no reader knows it
        every = [
            Sight(window, rotation.theta, rotation.scaling)
            if turns
            else Sight(window, rotary=False)
            for window, turns in zip(self.windows(file, layers), rotary, strict=True)
        ]
        return shortest(tuple(every)), None

    def rotary(self, file: ConfigFile, layers: int) -> list[bool]:
        """Which layers have rotary positions."""
        every = file.size("no_rope_layer_interval", default=4)
        derived = [(i + 1) % every != 0 for i in range(layers)]
        given = file.get("no_rope_layers")
        if given is None:
            return derived
        known = isinstance(given, list) and all(x in (0, 1) for x in given)
        if not known or len(given) != layers:
            file.complaints.append(
                f"no_rope_layers: expected 0 or 1 for each of {layers} layers, got {given!r}"
            )
            return derived
        return [bool(x) for x in given]

    def sliding(self, file: ConfigFile, layers: int, window: int | None) -> list[bool]:
        """Which layers slide: by default those without positions."""
        if file.get("layer_types") is None:
            return [window is not None and not turns for turns in self.rotary(file, layers)]
        return super().sliding(file, layers, window)

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of the pattern."""
        turning = [s for s in config.pattern if s.rotary] or [Sight()]
        keys = write_rotary(turning[0].theta, turning[0].scaling)
        flags = [int(sight.rotary) for sight in by_layer(config)]
        return keys | self.written_windows(config) | {"no_rope_layers": flags}

    def limits(self, config: DecoderConfig) -> list[str]:
        """What of the pattern the family cannot say."""
        turning = tuple(s for s in config.pattern if s.rotary)
        return super().limits(dataclasses.replace(config, pattern=turning or (Sight(),)))


def by_layer(config: DecoderConfig) -> list[Sight]:
    """How each layer sees."""
    return [config.pattern[i % len(config.pattern)] for i in range(config.layers)]


def shortest(every: tuple[Sight, ...]) -> tuple[Sight, ...]:
    """The shortest list that repeats to `every`."""
    for period in range(1, len(every)):
        if all(every[i] == every[i % period] for i in range(len(every))):
            return every[:period]
    return every
