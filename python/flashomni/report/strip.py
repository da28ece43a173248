"""A run's pictures as one PNG, for a README: a row a prompt, a column an arm, with their seconds and PSNR."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from flashomni.report import data, figures, page

SIDE, GAP, CAPTION = 256, 16, 46
PAPER, INK, SOFT = (255, 255, 255), (28, 33, 40), (89, 99, 110)


def compose(run: data.Run) -> Image.Image:
    """The strip; pictures keep their pixels."""
    arms, pictures = run.json["arms"], run.json["pictures"]
    width = len(arms) * (SIDE + GAP) + GAP
    strip = Image.new("RGB", (width, len(pictures) * (SIDE + CAPTION + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(strip)
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    for row, picture in enumerate(pictures):
        top = GAP + row * (SIDE + CAPTION + GAP)
        for column, arm in enumerate(arms):
            result = picture["arms"][arm["key"]]
            left = GAP + column * (SIDE + GAP)
            image = Image.open(run.picture(row, arm["key"])).convert("RGB").resize((SIDE, SIDE))
            strip.paste(image, (left, top))
            pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=(216, 222, 228))
            below = figures.seconds(result["seconds"])
            if arm["key"] != run.reference:
                below += f", PSNR {page.psnr_text(result['psnr'])}"
            pen.text((left, top + SIDE + 6), arm["title"], INK, bold)
            pen.text((left, top + SIDE + 26), below, SOFT, plain)
    return strip


def write(run: data.Run, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    compose(run).save(path, "PNG", optimize=True)
    return path
