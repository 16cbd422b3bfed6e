"""Pictures of an image, its detections or labels, and the tokens that were computed; never of a model.

Images come as (3, h, w) floats of 0..1 or as PIL images, detections as torchvision's dicts in the pixels of that image.
Every function returns a PIL image.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

Picture = Tensor | Image.Image
Colour = tuple[int, int, int]
MARGIN, GAP = 24, 14
"""Around a figure and between its panels, in pixels."""
INK: Colour = (38, 42, 51)
FAINT: Colour = (128, 134, 145)
PAPER: Colour = (255, 255, 255)
VEILS: tuple[Colour, Colour] = ((236, 239, 244), (46, 56, 80))  # over skipped tokens of dark pictures, of light ones
PALETTE: tuple[Colour, ...] = (
    (255, 99, 72), (46, 196, 182), (255, 200, 40), (96, 125, 255), (240, 98, 190), (124, 207, 70),
    (255, 146, 43), (72, 178, 255), (178, 120, 255), (0, 168, 120), (255, 130, 150), (190, 200, 40),
)  # fmt: skip
HEAT = np.array(
    [(24, 20, 58), (70, 24, 106), (142, 36, 104), (211, 64, 74), (247, 128, 40), (252, 234, 148)], dtype=float
)


@dataclass(frozen=True)
class Panel:
    """One of the pictures that stand side by side in a `figure`.

    Attributes:
        title: what it shows.
        note: a few words under the title, e.g. cost and time.
        draw: the picture, from the `box` (width, height) that it has to fit.
    """

    title: str
    note: str
    draw: Callable[..., Image.Image]


@dataclass(frozen=True)
class Exits:
    """Where in an image tokens left.

    Attributes:
        stage: (h, w) int64, an index into `places`.
        places: in words, from the first exit to those that stayed.
    """

    stage: Tensor
    places: tuple[str, ...]

    def shares(self) -> list[float]:
        """Of the pixels, for each of the places."""
        return [(self.stage == i).float().mean().item() for i in range(len(self.places))]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def to_pil(image: Picture) -> Image.Image:
    """An RGB PIL image of a (3, h, w) float tensor of 0..1, or of a PIL image, upright."""
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def fit(image: Image.Image, box: tuple[int, int]) -> Image.Image:
    """The image at the largest size that fits into `box` (width, height) with its own shape."""
    scale = min(box[0] / image.width, box[1] / image.height)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def predictions(
    image: Picture,
    detections: dict[str, Tensor],
    classes: Sequence[str],
    *,
    min_score: float = 0.5,
    box: tuple[int, int] = (960, 960),
) -> Image.Image:
    """The image with masks, boxes and labels drawn on it; objects scored under `min_score` are left out.

    Colours tell classes apart, or objects where there is one class or more than there are colours. The picture is
    scaled to fit `box` (width, height), so that small images are drawn finely.
    """
    base = to_pil(image)
    canvas = fit(base, box)
    scale = canvas.width / base.width, canvas.height / base.height
    shown = (detections["scores"] >= min_score).nonzero().flatten()
    shown = shown[detections["scores"][shown].argsort()]  # the most certain ones on top
    boxes = (detections["boxes"][shown].cpu() * torch.tensor(scale * 2)).tolist()
    labels = detections["labels"][shown].tolist()
    by_class = 1 < len(classes) <= len(PALETTE)
    colours = [PALETTE[(label - 1 if by_class else i) % len(PALETTE)] for i, label in enumerate(labels)]
    if "masks" in detections:
        pixels = np.asarray(canvas).copy()
        masks = detections["masks"][shown]
        masks = masks.flatten(0, 1) if masks.ndim == 4 else masks
        for mask, corners, colour in zip(masks, boxes, colours, strict=True):
            _paint(pixels, mask.cpu(), corners, scale, colour)
        canvas = Image.fromarray(pixels)
    pen = ImageDraw.Draw(canvas)
    width = 1 if len(boxes) > 40 else 2
    for corners, colour in zip(boxes, colours, strict=True):
        pen.rectangle(_inside(corners, canvas), outline=colour, width=width)
    if len(classes) > 1 or len(boxes) <= 12:  # the scores of many objects of one kind would hide them
        names = (f"{classes[label - 1]} " if len(classes) > 1 else "" for label in labels)
        scores = detections["scores"][shown].tolist()
        texts = [f"{name}{score:.2f}" for name, score in zip(names, scores, strict=True)]
        _tags(pen, canvas, boxes[::-1], texts[::-1], colours[::-1])
    return canvas


def palette(count: int) -> tuple[Colour, ...]:
    """So many colours that can be told apart as far as possible: `PALETTE`, then hues by the golden ratio."""
    more = []
    for i in range(count - len(PALETTE)):
        hue, value = (i * 0.618034) % 1.0, (0.95, 0.7, 0.5)[i % 3]
        r, g, b = colorsys.hsv_to_rgb(hue, (0.55, 0.85)[i % 2], value)
        more.append((round(255 * r), round(255 * g), round(255 * b)))
    return (*PALETTE[:count], *more)


def label_map(
    image: Picture,
    labels: Tensor,
    colours: Sequence[Colour],
    *,
    strength: float = 0.6,
    box: tuple[int, int] = (960, 960),
) -> Image.Image:
    """The image with each pixel's class (h, w) laid over it, and lines where classes meet; scaled to fit `box`.
    Pixels of no class, such as -1, stay as they are."""
    canvas = fit(to_pil(image), box)
    fine = _resized(labels.int(), canvas)
    known = (fine >= 0) & (fine < len(colours))
    table = np.array(colours, dtype=float)
    pixels = np.asarray(canvas, dtype=float)
    painted = (1 - strength) * pixels + strength * table[np.where(known, fine, 0)]
    edge = np.zeros(fine.shape, dtype=bool)
    edge[:, 1:] |= (fine[:, 1:] != fine[:, :-1]) & known[:, 1:] & known[:, :-1]
    edge[1:] |= (fine[1:] != fine[:-1]) & known[1:] & known[:-1]
    painted = np.where(edge[..., None], 0.35 * painted, painted)
    return Image.fromarray(np.where(known[..., None], painted, pixels).clip(0, 255).astype(np.uint8))


def exit_map(image: Picture, exits: Exits, *, box: tuple[int, int] = (960, 960)) -> Image.Image:
    """Where tokens left: the image in grey, in the colour of the stage, from dark (early) to bright (never)."""
    grey = fit(to_pil(image), box).convert("L").convert("RGB")
    return label_map(grey, exits.stage, exit_colours(len(exits.places)), strength=0.65, box=box)


def exit_colours(count: int) -> tuple[Colour, ...]:
    """One colour per place, from the first exit to those that stayed."""
    shades = _heat(np.linspace(0.08, 0.9, count)).round().astype(int)
    return tuple((int(r), int(g), int(b)) for r, g, b in shades)


def exits_panel(image: Picture, exits: Exits) -> Panel:
    """Where tokens left, as a panel of a figure."""
    return Panel("where tokens left", f"{1 - exits.shares()[-1]:.0%} left early", partial(exit_map, image, exits))


def exits_legend(exits: Exits) -> list[tuple[str, Colour | None]]:
    """What the colours of `exit_map` mean, for `legend`."""
    texts = [f"{place} ({share:.0%})" for place, share in zip(exits.places, exits.shares(), strict=True)]
    return [("tokens left:", None), *zip(texts, exit_colours(len(texts)), strict=True)]


def legend(entries: Sequence[tuple[str, Colour | None]], width: int) -> Image.Image:
    """Names with their colours, in as many lines of `width` pixels as it takes."""
    font, line, places = _font(15), 24, []
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    x = y = 0
    for name, colour in entries:
        length = (22 if colour else 0) + round(measure.textlength(name, font=font)) + 20
        if x and x + length > width:
            x, y = 0, y + line
        places.append((x, y, name, colour))
        x += length
    sheet = Image.new("RGB", (width, y + line), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, y, name, colour in places:
        if colour:
            pen.rectangle((x, y + 4, x + 15, y + 19), fill=colour)
        pen.text((x + (22 if colour else 0), y + 12), name, fill=INK, font=font, anchor="lm")
    return sheet


def keep_maps(image: Picture, keep: Tensor, *, width: int = 1200, columns: int = 6) -> Image.Image:
    """One panel per block: the title is the share of the image that it computed, the rest of it is faded.

    Args:
        keep: (depth, h, w) bool, on pixels of the image at any resolution: whether a block computed the token there.
    """
    columns, head = min(columns, len(keep)), 22
    box = _panel_box(width, columns)
    panel = fit(to_pil(image), box)
    row_height = panel.height + head + GAP
    sheet = Image.new("RGB", (width, -(-len(keep) // columns) * row_height - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for block, computed in enumerate(keep):
        x, y = (block % columns) * (box[0] + GAP), (block // columns) * row_height
        share = computed.float().mean().item()
        pen.text((x, y + 2), f"block {block}", fill=INK, font=_font(14))
        pen.text((x + panel.width, y + 2), f"{share:.0%}", fill=FAINT, font=_font(14), anchor="ra")
        sheet.paste(_faded(panel, _resized(computed, panel) > 0), (x, y + head))
    return sheet


def heat_map(image: Picture, share: Tensor, *, box: tuple[int, int] = (960, 960)) -> Image.Image:
    """Shares (h, w) of 0..1 over the image in grey: dark for 0, bright for 1."""
    canvas = fit(to_pil(image), box)
    grey = np.asarray(canvas.convert("L"), dtype=float)[..., None] / 255
    heat = _heat(_resized(share, canvas))
    return Image.fromarray((heat * (0.55 + 0.45 * grey)).clip(0, 255).astype(np.uint8))


def heat_panel(image: Picture, keep: Tensor) -> Panel:
    """Blocks per token, above the legend of its colours, as a panel of a figure; see `keep_maps`."""
    note = f"{keep.float().mean().item():.0%} of all computed"
    return counts_panel(image, keep.sum(0), len(keep), title="blocks per token", note=note)


def counts_panel(image: Picture, counts: Tensor, most: int, *, title: str, note: str) -> Panel:
    """Whole numbers (h, w) of 0 to `most` as a heat map, above the legend of its colours."""

    def draw(box: tuple[int, int]) -> Image.Image:
        picture = heat_map(image, counts / max(most, 1), box=box)
        width, y = picture.width, picture.height + 8
        out = Image.new("RGB", (width, y + 22), PAPER)
        out.paste(picture)
        ramp = _heat(np.linspace(0, 1, width - 38))[None].repeat(10, axis=0).astype(np.uint8)
        out.paste(Image.fromarray(ramp), (16, y))
        pen = ImageDraw.Draw(out)
        pen.text((0, y + 5), "0", fill=FAINT, font=_font(14), anchor="lm")
        pen.text((width, y + 5), str(most), fill=FAINT, font=_font(14), anchor="rm")
        return out

    return Panel(title, note, draw)


def bars_panel(shares: Sequence[float], *, title: str, note: str) -> Panel:
    """A bar for each of the shares 0..1, numbered from 0, with its value in % above it."""

    def draw(box: tuple[int, int]) -> Image.Image:
        width, height = box[0], min(box[1], round(0.75 * box[0]))
        out = Image.new("RGB", (width, height), PAPER)
        pen, font = ImageDraw.Draw(out), _font(13 if width > 30 * len(shares) else 10)
        top, bottom, step = 18, height - 20, width / max(len(shares), 1)
        pen.line((0, bottom, width, bottom), fill=FAINT)
        every = 1 if step > 15 else 4
        for i, share in enumerate(shares):
            x0, x1, y = i * step + 0.12 * step, (i + 1) * step - 0.12 * step, bottom - share * (bottom - top)
            pen.rectangle((x0, min(y, bottom - 1), x1, bottom), fill=(70, 130, 180))
            if i % every == 0:
                pen.text(((x0 + x1) / 2, y - 3), f"{100 * share:.0f}", fill=INK, font=font, anchor="mb")
                pen.text(((x0 + x1) / 2, bottom + 5), str(i), fill=FAINT, font=font, anchor="mt")
        return out

    return Panel(title, note, draw)


def figure(
    image: Picture,
    panels: Sequence[Panel],
    *,
    below: Sequence[Callable[[int], Image.Image]] = (),
    title: str = "",
    columns: int | None = None,
    width: int = 1640,
) -> Image.Image:
    """An image, panels beside it and pictures below.

    Args:
        below: pictures, from the width in pixels that they have to have.
        columns: how many panels stand side by side, the image included; None for all.
    """
    base, inner = to_pil(image), width - 2 * MARGIN
    panels = [Panel("input", f"{base.width} x {base.height} pixels", partial(fit, base)), *panels]
    columns = min(columns or len(panels), len(panels))
    box = _panel_box(inner, columns)
    pictures = [panel.draw(box=box) for panel in panels]
    others = [draw(inner) for draw in below]
    y, head, places = MARGIN + (34 if title else 0), 44, []
    for first in range(0, len(panels), columns):
        row = pictures[first : first + columns]
        places += [(MARGIN + i * (box[0] + GAP), y) for i in range(len(row))]
        y += head + max(picture.height for picture in row) + GAP
    sheet = Image.new("RGB", (width, y + sum(other.height + 6 for other in others) + MARGIN - 6), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 6), title, fill=INK, font=_font(24))
    for panel, picture, (x, top) in zip(panels, pictures, places, strict=True):
        pen.text((x, top), panel.title, fill=INK, font=_font(18))
        pen.text((x, top + 22), panel.note, fill=FAINT, font=_font(14))
        sheet.paste(picture, (x, top + head))
    for other in others:
        sheet.paste(other, (MARGIN, y))
        y += other.height + 6
    return sheet


def _panel_box(width: int, columns: int) -> tuple[int, int]:
    """Largest (width, height) of a panel where so many stand side by side."""
    panel = (width - GAP * (columns - 1)) // columns
    return panel, round(panel * 1.4)


def _resized(values: Tensor, canvas: Image.Image) -> np.ndarray:
    """(height, width) of the canvas: the nearest of the values (h, w)."""
    array = values.cpu().numpy()
    array = array.astype(np.float32 if values.is_floating_point() else np.int32)
    return np.asarray(Image.fromarray(array).resize(canvas.size, Image.Resampling.NEAREST))


def _faded(panel: Image.Image, computed: np.ndarray) -> Image.Image:
    """The panel, with the pixels of skipped tokens faded: to light in a dark picture, to dark in a light one."""
    pixels = np.asarray(panel, dtype=float)
    grey = pixels.mean(2, keepdims=True)
    veil = np.array(VEILS[int(grey.mean() > 127)])
    return Image.fromarray(np.where(computed[..., None], pixels, 0.2 * grey + 0.8 * veil).clip(0, 255).astype(np.uint8))


def _heat(share: np.ndarray) -> np.ndarray:
    """(..., 3) colours of 0..255 for shares of 0..1."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(share, stops, HEAT[:, c]) for c in range(3)], axis=-1)


def _paint(pixels: np.ndarray, mask: Tensor, corners: list[float], scale: tuple[float, float], colour: Colour) -> None:
    """Tint the mask's pixels and draw its outline, in place; only the part inside the box is looked at."""
    height, width = mask.shape
    x0, y0 = max(0, int(corners[0] / scale[0]) - 1), max(0, int(corners[1] / scale[1]) - 1)
    x1, y1 = min(width, int(corners[2] / scale[0]) + 2), min(height, int(corners[3] / scale[1]) + 2)
    if x1 <= x0 or y1 <= y0:
        return
    left, top = round(x0 * scale[0]), round(y0 * scale[1])
    right, bottom = min(round(x1 * scale[0]), pixels.shape[1]), min(round(y1 * scale[1]), pixels.shape[0])
    crop = Image.fromarray((mask[y0:y1, x0:x1].float() > 0.5).numpy().astype(np.uint8) * 255)
    fine = crop.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR).point(
        lambda v: 255 * (v > 127)
    )
    inside = np.asarray(fine) > 0
    edge = inside & ~(np.asarray(fine.filter(ImageFilter.MinFilter(3))) > 0)
    part = pixels[top:bottom, left:right]
    part[inside] = (0.58 * part[inside] + 0.42 * np.array(colour)).astype(np.uint8)
    part[edge] = (0.15 * part[edge] + 0.85 * np.array(colour)).astype(np.uint8)


def _inside(corners: list[float], canvas: Image.Image) -> tuple[float, float, float, float]:
    """The box, cut at the picture's border."""
    x0, y0, x1, y1 = corners
    x0, y0 = min(max(x0, 0), canvas.width - 1), min(max(y0, 0), canvas.height - 1)
    return x0, y0, min(max(x1, x0), canvas.width - 1), min(max(y1, y0), canvas.height - 1)


def _tags(
    pen: ImageDraw.ImageDraw,
    canvas: Image.Image,
    boxes: list[list[float]],
    texts: list[str],
    colours: list[Colour],
) -> None:
    """A small label above each box, or inside it at the picture's top; none that would hide its box or another one."""
    font, taken = _font(13), []
    for corners, text, colour in zip(boxes, texts, colours, strict=True):
        x0, y0, x1, y1 = _inside(corners, canvas)
        length = pen.textlength(text, font=font) + 6
        x, y = min(max(x0, 0), canvas.width - length), y0 - 16 if y0 >= 16 else y0
        hidden = any(x < a + la and a < x + length and abs(y - b) < 16 for a, b, la in taken)
        if hidden or y1 - y0 < 18 or x1 - x0 < length / 2.5:
            continue
        taken.append((x, y, length))
        pen.rectangle((x, y, x + length, y + 16), fill=colour)
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        pen.text((x + 3, y + 8), text, fill=INK if dark else PAPER, font=font, anchor="lm")
