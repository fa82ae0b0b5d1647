"""One meaning for each color, in every picture and widget."""

INK = "#1f2933"
MUTED = "#627283"
CARD = "#fbfcfd"
WHITE = "#ffffff"
BLACK = "#000000"
#: the base model, and all that a swap leaves alone
BASE = "#d5dde5"
#: nothing yet: padding, free memory
OFF = "#eef1f4"
#: hotswap_lab, and PEFT
OURS = "#6fb7f2"
PEFT = "#f2b36f"
#: an adapter without a name, as A and B in a drawing
ADAPTER = "#e8d66b"
#: errors, recompiles, differences
WRONG = "#c8374a"
#: passed checks
RIGHT = "#1a7f37"
#: buttons that were chosen, and the focus; white text on it can be read
ACTIVE = "#1765a8"

#: these colors in a picture for a dark theme
DARK = {CARD: "#0d1117", INK: "#e6edf3", MUTED: "#9ba7b4", BASE: "#606770", OFF: "#1c1f25"}

#: adapters; as text, all are readable on a card, and color-blind readers can distinguish them
ADAPTERS = ("#0d149a", "#7d1b03", "#521061", "#5209ee", "#e90616", "#d01066", "#377d83", "#1c71d6")
#: adapters that ship with the package, in the order of ADAPTERS
_SHIPPED = (
    ("caesar", "double", "no_vowels", "pig_latin", "reverse", "shout", "sort", "vowels_up"),
    ("bold", "inverted", "only_0", "only_3", "only_7", "slanted"),
    ("haiku", "json", "pirate", "socratic", "spanish"),
)
_KNOWN = {name: color for names in _SHIPPED for name, color in zip(names, ADAPTERS, strict=False)}
#: a widget's name of an unknown adapter, and PEFT's default name
_KNOWN |= {"another adapter": INK, "default": INK}
#: the colors of the user's adapters, in the order they come
_USERS: dict[str, str] = {}


def adapter_color(name: str | None) -> str:
    """Return the color of an adapter or of one of its versions, or of the base model for None.

    >>> adapter_color("reverse"), adapter_color("reverse@2"), adapter_color(None)
    ('#e90616', '#e90616', '#d5dde5')
    """
    if not name:
        return BASE
    name = name.partition("@")[0]
    return _KNOWN.get(name) or _USERS.setdefault(name, ADAPTERS[len(_USERS) % len(ADAPTERS)])


def mix(color: str, share: float, other: str = BASE) -> str:
    """Mix ``share`` of a color with another one.

    >>> mix("#ff0000", 0.5, "#ffffff")
    '#ff8080'
    """
    pairs = zip(bytes.fromhex(color[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + "".join(f"{round(share * one + (1 - share) * two):02x}" for one, two in pairs)


def ramp(color: str) -> list[str]:
    """Return seven tints of a color, from pale to dark. Readers can distinguish each from the next.

    >>> ramp("#ff0000")[4:]
    ['#ff0000', '#b20000', '#660000']
    """
    return [*(mix(color, step / 5) for step in range(1, 6)), mix(color, 0.7, BLACK), mix(color, 0.4, BLACK)]


def light(name: str | None) -> str:
    """Return a light form of an adapter's color, on which dark text is readable.

    >>> light("reverse")
    '#f8adb2'
    """
    return mix(adapter_color(name), 0.33, WHITE)
