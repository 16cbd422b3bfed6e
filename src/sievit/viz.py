"""Pictures of an image, its detections and its trace; never of a model.

Images come as (3, h, w) floats of 0..1 or as PIL images, detections as torchvision's dicts in the pixels of that image;
`size` is the (height, width) that the image had inside the network's input, `image_size` that input's own, padding
included.
Every function returns a PIL image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from sievit.tokens import Trace

Picture = Tensor | Image.Image
Colour = tuple[int, int, int]

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
class View:
    """One model's answer for one image: what `figure` shows of it.

    Attributes:
        title: who answered.
        note: a few words under the title, e.g. cost and time.
        detections: boxes (k, 4) xyxy pixels, labels (k,) from 1, scores (k,), masks (k, [1,] h, w) if there are any.
    """

    title: str
    note: str
    detections: dict[str, Tensor]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def to_pil(image: Picture) -> Image.Image:
    """An RGB PIL image of a (3, h, w) float tensor of 0..1, or of a PIL image."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
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


def keep_maps(
    image: Picture,
    trace: Trace,
    index: int,
    *,
    size: tuple[int, int],
    image_size: tuple[int, int],
    width: int = 1200,
    columns: int = 6,
) -> Image.Image:
    """One panel per block for image `index` of the batch: the title is the share of tokens, skipped ones are faded."""
    depth = len(trace.keep)
    columns = min(columns, depth)
    gap, head = 10, 22
    panel_width = (width - gap * (columns - 1)) // columns
    base = to_pil(image)
    panel = fit(base, (panel_width, round(panel_width * 1.4)))
    rows = -(-depth // columns)
    sheet = Image.new("RGB", (width, rows * (panel.height + head + gap) - gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    shares = trace.shares()[:, index].tolist()
    for block, keep in enumerate(trace.keep):
        x = (block % columns) * (panel_width + gap)
        y = (block // columns) * (panel.height + head + gap)
        computed = _on_pixels(keep[index].float(), trace, panel.size, size, image_size) > 0.5
        pen.text((x, y + 2), f"block {block}", fill=INK, font=_font(14))
        pen.text((x + panel.width, y + 2), f"{shares[block]:.0%}", fill=FAINT, font=_font(14), anchor="ra")
        sheet.paste(_faded(panel, computed), (x, y + head))
    return sheet


def heat_map(
    image: Picture,
    trace: Trace,
    index: int,
    *,
    size: tuple[int, int],
    image_size: tuple[int, int],
    box: tuple[int, int] = (960, 960),
) -> Image.Image:
    """How many blocks computed each token of image `index`: dark for none, bright for all, over the image in grey."""
    canvas = fit(to_pil(image), box)
    blocks = torch.stack([keep[index] for keep in trace.keep]).float().mean(0)  # (n,) share of the blocks
    share = _on_pixels(blocks, trace, canvas.size, size, image_size)
    grey = np.asarray(canvas.convert("L"), dtype=float)[..., None] / 255
    return Image.fromarray((_heat(share) * (0.55 + 0.45 * grey)).clip(0, 255).astype(np.uint8))


def figure(
    image: Picture,
    views: Sequence[View],
    classes: Sequence[str],
    trace: Trace,
    index: int,
    *,
    size: tuple[int, int],
    image_size: tuple[int, int],
    title: str = "",
    width: int = 1640,
    min_score: float = 0.5,
) -> Image.Image:
    """The whole story of one image: input, one panel per view, blocks per token, and below them the map of every block.

    `trace` is that of the view that skips tokens.
    """
    margin, gap, head = 24, 14, 44
    depth = len(trace.keep)
    base = to_pil(image)
    inner = width - 2 * margin
    panel_width = (inner - gap * (len(views) + 1)) // (len(views) + 2)
    box = (panel_width, round(panel_width * 1.4))
    panels = [("input", f"{base.width} x {base.height} pixels", fit(base, box))]
    for view in views:
        panels.append(
            (view.title, view.note, predictions(base, view.detections, classes, min_score=min_score, box=box))
        )
    mean = trace.shares()[:, index].mean().item()
    panels.append(
        (
            "blocks per token",
            f"{mean:.0%} of all computed",
            heat_map(base, trace, index, size=size, image_size=image_size, box=box),
        )
    )
    maps = keep_maps(base, trace, index, size=size, image_size=image_size, width=inner)
    top = margin + (34 if title else 0)
    panel_height = panels[0][2].height
    bar = 30
    sheet = Image.new("RGB", (width, top + head + panel_height + bar + gap + maps.height + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, margin - 6), title, fill=INK, font=_font(24))
    for i, (name, note, panel) in enumerate(panels):
        x = margin + i * (panel_width + gap)
        pen.text((x, top), name, fill=INK, font=_font(18))
        pen.text((x, top + 22), note, fill=FAINT, font=_font(14))
        sheet.paste(panel, (x, top + head))
    _colour_bar(
        sheet,
        (margin + (len(panels) - 1) * (panel_width + gap), top + head + panel_height + 8),
        panels[-1][2].width,
        depth,
    )
    sheet.paste(maps, (margin, top + head + panel_height + bar + gap))
    return sheet


def _on_pixels(
    values: Tensor, trace: Trace, canvas: tuple[int, int], size: tuple[int, int], image_size: tuple[int, int]
) -> np.ndarray:
    """(height, width) of `canvas` (width, height): the value (n,) of the token that each of its pixels belongs to."""
    grid = values.detach().cpu().reshape(trace.grid).numpy()
    at = []
    for axis, pixels in ((0, canvas[1]), (1, canvas[0])):
        network = (np.arange(pixels) + 0.5) * size[axis] / pixels  # in pixels of the network's input
        at.append(np.minimum((network * trace.grid[axis] / image_size[axis]).astype(int), trace.grid[axis] - 1))
    return grid[at[0][:, None], at[1][None]]


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


def _colour_bar(sheet: Image.Image, at: tuple[int, int], width: int, depth: int) -> None:
    """The legend of `heat_map`: no block at the left, all of them at the right."""
    pen = ImageDraw.Draw(sheet)
    left = at[0] + 16
    length = width - 16 - 22
    ramp = _heat(np.linspace(0, 1, length))[None].repeat(10, axis=0).astype(np.uint8)
    sheet.paste(Image.fromarray(ramp), (left, at[1]))
    pen.text((at[0], at[1] + 5), "0", fill=FAINT, font=_font(14), anchor="lm")
    pen.text((at[0] + width, at[1] + 5), str(depth), fill=FAINT, font=_font(14), anchor="rm")


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
