"""The typed, bounded reading of a parsed JSON file: every value of a config.json passes through here.

A file is nobody's friend: numbers are bounded before anything is computed or built from them, and a value is shown in an
error only shortened and escaped. The bounds are far beyond every released model.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modeling.errors import ConfigError

MAX_INTEGER = 2**31 - 1  # sizes, positions, windows, token ids: what 32 bits hold
MAX_LAYERS = 10_000
MAX_HEAD_DIM = 2**16
MAX_VOCAB = 2**26
MAX_IDS = 1000  # ids in a list of ends
NUMBERS = (1e-6, 1e9)  # of a number for which nothing narrower is said
SHOWN = 80  # characters of a value in a message
SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = {SLIDING: SLIDING, FULL: FULL, "attention": FULL}  # as files spell them -> as we do


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print, and takes long to print, what is longer than a few thousand digits.
        return f"a number of {int(x.bit_length() * 0.30103) + 1} digits" if x.bit_length() > 256 else repr(x)


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = SHOWN


def shown(value: object) -> str:
    """repr of a value that came from a file: one line without control characters, of at most SHOWN characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def plain(value: float) -> str:
    """A bound, as a reader would write it: 2147483647, 0.001, 1e+15."""
    return str(value) if isinstance(value, int) else f"{value:g}"


class Fields:
    """The keys of a config.json, read with their types and within bounds. A missing or ill-typed one is named with its place.

    A key that is null counts as absent, except where null means "none" (windows, softcaps, token ids).
    """

    def __init__(self, raw: Mapping[str, Any], place: str = "config.json"):
        self.raw = raw
        self.place = place

    def refuse(self, text: str) -> ConfigError:
        return ConfigError(f"{self.place}: {text}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """A whole number (64.0 counts) from `minimum` to `maximum`; ConfigError when absent and without default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"{key!r} is missing; it must be a whole number")
        if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INTEGER:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            limits = f"at least {minimum}" + (f" and at most {maximum}" if _above(value, maximum) else "")
            raise self.refuse(f"{key!r} is {shown(value)}; it must be a whole number of {limits}")
        return value

    def number(self, key: str, default: float | None = None, limits: tuple[float, float] = NUMBERS) -> float:
        """A number within `limits`, both of which are above 0; ConfigError when absent and without default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"{key!r} is missing; it must be a number")
        low, high = limits
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            positive = isinstance(value, int | float) and value > 0
            wanted = f"from {plain(low)} to {plain(high)}" if positive else "above 0"
            raise self.refuse(f"{key!r} is {shown(value)}; it must be a number {wanted}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(f"{key!r} is {shown(value)}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is not None and not isinstance(value, str):
            raise self.refuse(f"{key!r} is {shown(value)}; it must be a string")
        return value

    def section(self, key: str) -> dict[str, Any]:
        """A nested object, {} when absent or null."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self.refuse(f"{key!r} is {shown(value)}; it must be an object")
        return value

    def softcap(self, key: str, default: float | None) -> float | None:
        """A softcap: absent means the family's default, null means none."""
        if key in self.raw and self.raw[key] is None:
            return None
        return default if key not in self.raw else self.number(key)

    def window(self, default: int | None) -> int | None:
        """`sliding_window`: absent means the family's default, null means none."""
        if "sliding_window" in self.raw and self.raw["sliding_window"] is None:
            return None
        return default if "sliding_window" not in self.raw else self.integer("sliding_window")

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One id or a list of at most MAX_IDS; absent means the default, null means none."""
        if key not in self.raw:
            return default
        value = self.raw[key]
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_IDS:
            raise self.refuse(f"{key!r} lists {len(ids)} token ids; at most {MAX_IDS} are allowed")
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_INTEGER for i in ids):
            raise self.refuse(f"{key!r} is {shown(value)}; it must be a token id or a list of them")
        return tuple(ids)

    def layer_types(self, num_layers: int) -> tuple[str, ...] | None:
        """`layer_types`, each "sliding_attention" or "full_attention"; None when absent or null.

        Raises ConfigError for an unknown layer type and for a wrong count.
        """
        types = self.raw.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, Sequence) or isinstance(types, str):
            raise self.refuse(f"'layer_types' is {shown(types)}; it must be a list of one type per layer")
        if len(types) != num_layers:
            raise self.refuse(f"'layer_types' has {len(types)} entries for {num_layers} layers; give one per layer")
        for name in types:
            if not isinstance(name, str) or name not in LAYER_TYPES:
                raise self.refuse(f"layer type {shown(name)} is unknown; known are {SLIDING}, {FULL}")
        return tuple(LAYER_TYPES[name] for name in types)

    def layer_windows(
        self, num_layers: int, window: int | None, is_sliding: Callable[[int], bool]
    ) -> tuple[int | None, ...]:
        """Window of each layer: by `layer_types` when given, else where is_sliding(layer) says so.

        Raises ConfigError as layer_types does, and for a sliding layer without a window.
        """
        types = self.layer_types(num_layers) or [SLIDING if is_sliding(i) else FULL for i in range(num_layers)]
        if SLIDING in types and window is None:
            raise self.refuse("a layer has sliding attention but 'sliding_window' is not set; give its length")
        return tuple(window if name == SLIDING else None for name in types)

    def no_windows(self, family: str, num_layers: int) -> None:
        """Raise ConfigError where the file asks a family without windows for one.

        transformers' models of such a family do not read these keys, but their caches do, and drop what lies outside.
        """
        types = self.layer_types(num_layers)
        if SLIDING in (types or ()):
            raise self.refuse(f"'layer_types' has {SLIDING!r}, but {family} has no sliding layers; remove the key")
        if types is None and self.raw.get("sliding_window") is not None:
            window = shown(self.raw["sliding_window"])
            raise self.refuse(f"'sliding_window' is {window}, but {family} has no sliding layers; set it to null")


def _above(value: object, maximum: int) -> bool:
    return isinstance(value, int | float) and value > maximum
