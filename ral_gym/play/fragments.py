"""The pieces of HTML that show a session. Every picture is inside the page, as PNG data; nothing is fetched."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ral_gym.envs.rendering import GREY
from ral_gym.play.comparison import Ending, Mistake
from ral_gym.play.session import Choice, Score, Session
from ral_gym.play.sharing import python_lines

LABELS = {"MLE": "before reinforcement learning (MLE)", "RAL": "after reinforcement learning (RAL)"}
"""The generators, in words."""
SHOWN = 10
"""How many of the next codes are shown."""
WIDE, TALL = 3, 2
"""A choice is shown with its neighbours, in a picture of so many cells."""
ROW = 4
"""Images in a row."""
MOST_NUMBERS = 8
"""Maps of more rows or columns have no numbers in their cells."""


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A file as the source of an image or a link."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def picture(pixels: np.ndarray) -> str:
    """Pixels (h, w, 3) uint8 as the source of an image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def pixels_of(images: Tensor) -> np.ndarray:
    """Images (n, C, h, w) uint8 as (n, h, w, 3)."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def decoded(session: Session, codes: np.ndarray) -> np.ndarray:
    """The images (n, S, S, 3) uint8 of codes (n, T); cells that are not drawn yet are grey.

    With two levels a cell whose bottom codes are missing shows what its top code alone decodes to.
    """
    grid = replace(session.grid, classes=0)
    drawn = torch.from_numpy(codes != grid.not_drawn)  # (n, T)
    filled = torch.from_numpy(np.where(codes == grid.not_drawn, 0, codes))
    pixels = pixels_of(session.models.world.decode(filled.to(session.models.world.device)))
    seen = np.zeros(pixels.shape[:3], bool)
    for level, (height, width) in zip(grid.split(drawn), grid.shapes, strict=True):
        scale = pixels.shape[1] // height
        seen |= level.reshape(-1, height, width).numpy().repeat(scale, 1).repeat(scale, 2)
    return np.where(seen[..., None], pixels, np.uint8(GREY))


# The board ------------------------------------------------------------------------------------------------------------


def board(session: Session) -> str:
    """The image so far under its cells: drawn ones are buttons, the next one is marked."""
    first, (height, width) = clickable(session)
    cells = "".join(_cell(session, first, width, number) for number in range(height * width))
    source = picture(decoded(session, session.codes[None])[0])
    said = f"the image so far, {session.drawn} of {session.grid.n_codes} cells drawn"
    return (
        f'<div class="board" data-drawn="{session.drawn}"><img src="{source}" alt="{said}">'
        f'<div class="cells" style="--columns:{width}">{cells}</div></div>{progress(session)}{_photo(session)}'
    )


def clickable(session: Session) -> tuple[int, tuple[int, int]]:
    """The first position, and the rows and columns, of the level that is being drawn."""
    sizes = session.grid.level_sizes
    level = 0 if session.position < sizes[0] or len(sizes) == 1 else 1
    return sum(sizes[:level]), session.grid.shapes[level]


def _cell(session: Session, first: int, width: int, number: int) -> str:
    position = first + number
    code = int(session.codes[position])
    if code == session.grid.not_drawn:
        return f'<span class="{"next" if position == session.position else ""}"></span>'
    kind = "wrong" if position in session.state.wrong else "given" if session.given[position] else ""
    said = f"row {number // width + 1}, column {number % width + 1}: code {code}. Click to put in a wrong one"
    return f'<button type="button" class="{kind}" data-cell="{position}" title="{said}" aria-label="{said}"></button>'


def place(session: Session, position: int) -> str:
    """A position in words."""
    sizes = session.grid.level_sizes
    level = int(position >= sizes[0])
    row, column = divmod(position - sizes[0] * level, session.grid.shapes[level][1])
    fine = " of the fine grid" if level else ""
    return f"row {row + 1}, column {column + 1}{fine}"


def progress(session: Session) -> str:
    """One line on where the episode is."""
    if not session.finished:
        said = (
            f"<b>{session.drawn}</b> of {session.grid.n_codes} cells drawn. Next: {place(session, session.position)}."
        )
    elif (score := session.score()) is not None:
        said = f"<b>Finished.</b> The critic scores it <b>{signed(score.value)}</b>{_usual(session)}."
    else:
        said = "<b>Finished.</b>"
    return f'<p class="where" role="status">{said}</p>'


def signed(value: float) -> str:
    """A score with its sign."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _usual(session: Session) -> str:
    usual = session.models.real_score
    return "" if usual is None else f"; real images get {signed(usual)} on average"


def _photo(session: Session) -> str:
    if session.state.image is None:
        return ""
    source = picture(pixels_of(session.state.image[None])[0])
    words = f"The original. Its first {session.state.rows} rows were given."
    return f'<div class="original"><img src="{source}" alt="the original"><span>{words}</span></div>'


# What comes next ------------------------------------------------------------------------------------------------------


def choices(session: Session) -> str:
    """The likeliest next codes, as buttons with a picture, a bar and a percentage."""
    if session.finished:
        return '<p class="hint">The image is finished. <b>New image</b> begins another one; <b>Undo</b> goes back.</p>'
    found = session.choices(min(SHOWN, session.grid.codebook_size))
    most, rest = found[0].probability, 1 - sum(one.probability for one in found)
    rows = "".join(
        _choice(one, patch, one.probability / most) for one, patch in zip(found, _patches(session, found), strict=True)
    )
    others = session.grid.codebook_size - len(found)
    last = f'<p class="hint">The {others} other codes together: {percent(max(0.0, rest))}.</p>' if others else ""
    effective = float(torch.exp(torch.special.entr(session.distribution()).sum()))
    unsure = f"as unsure as between <b>{effective:.0f}</b> equally likely ones" if effective >= 1.5 else "almost sure"
    return (
        f'<p class="hint">For {place(session, session.position)} the model is {unsure}. '
        f"<b>Click one to draw it yourself.</b></p><div class='choices'>{rows}</div>{last}"
    )


def _choice(one: Choice, patch: str, share: float) -> str:
    said = f"code {one.code}, {percent(one.probability)}"
    return (
        f'<button type="button" data-code="{one.code}" aria-label="draw {said}" title="draw {said}">'
        f'{patch}<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>'
        f'<span class="percent">{percent(one.probability)}</span></button>'
    )


def percent(share: float) -> str:
    """A share in words, never a rounded zero."""
    if share < 0.0001:
        return "under 0.01 %"
    return f"{100 * share:.2f} %" if share < 0.01 else f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _patches(session: Session, found: list[Choice]) -> list[str]:
    """What the image would look like at the next cell, which is framed, and beside it, for each choice."""
    codes = np.repeat(session.codes[None], len(found), 0)
    codes[:, session.position] = [one.code for one in found]
    first, (height, width) = clickable(session)
    row, column = divmod(session.position - first, width)
    above, left = (max(0, min(at, most)) for at, most in ((row - 1, height - TALL), (column - 1, width - WIDE)))
    columns, rows = min(WIDE, width), min(TALL, height)
    pixels = decoded(session, codes)
    scale = pixels.shape[1] // height
    pixels = pixels[:, above * scale : (above + rows) * scale, left * scale : (left + columns) * scale]
    at = f"left:{100 * (column - left) / columns:.2f}%;top:{100 * (row - above) / rows:.2f}%"
    where = f"{at};width:{100 / columns:.2f}%;height:{100 / rows:.2f}%"
    return [
        f'<span class="patch"><img src="{picture(image)}" alt=""><span style="{where}"></span></span>'
        for image in pixels
    ]


# Maps -----------------------------------------------------------------------------------------------------------------


def score_map(session: Session) -> str:
    """The critic's map over the finished image."""
    score = session.score()
    if session.models.world.scorer is None:
        return (
            '<p class="hint">This run has no critic (its third stage has not been trained), so there is no score.</p>'
        )
    if score is None:
        return '<p class="hint">The critic judges whole images: finish this one to see what it says.</p>'
    return (
        f"{scored(session, Ending(session.codes, score, session.seed), mapped=True, caption='')}"
        '<p class="hint legend"><span class="fake"></span> looks made up <span class="real"></span> looks real. '
        f"The mean, {signed(score.value)}, is the reward of this image{_usual(session)}.</p>"
    )


def scored(session: Session, ending: Ending, *, mapped: bool = False, caption: str | None = None) -> str:
    """A finished image, with the critic's map over it if `mapped`, and below it its score or another caption."""
    source = picture(decoded(session, ending.codes[None])[0])
    over = critic_cells(ending.score) if mapped and ending.score is not None else ""
    score = "" if ending.score is None else f"score {signed(ending.score.value)}"
    below = score if caption is None else caption
    image = f'<img src="{source}" alt="image of seed {ending.seed}">'
    return f'<figure><div class="over">{image}{over}</div>{_below(below)}</figure>'


def _below(caption: str) -> str:
    return f"<figcaption>{caption}</figcaption>" if caption else ""


def critic_cells(score: Score) -> str:
    """Coloured cells, as strong as the score is far from 0."""
    scores, (height, width) = score.score_map, score.score_map.shape
    strongest = max(float(np.abs(scores).max()), 1e-6)
    numbers = max(height, width) <= MOST_NUMBERS
    cells = "".join(
        f'<span class="{"real" if value > 0 else "fake"}" style="--strength:{abs(value) / strongest:.2f}">'
        f"{signed(value) if numbers else ''}</span>"
        for value in map(float, scores.flat)
    )
    return f'<div class="map" style="--columns:{width}">{cells}</div>'


# Comparisons ----------------------------------------------------------------------------------------------------------


def endings(session: Session, found: dict[str, list[Ending]]) -> str:
    """A row of images for every generator: the first `ROW` endings, and the mean score of all of them."""
    groups = []
    for name, images in found.items():
        row = "".join(scored(session, ending) for ending in images[:ROW])
        words = f"<h4>{LABELS[name]} <span>{_mean(images)}</span></h4>"
        groups.append(f'<section data-generator="{name}">{words}<div class="strip">{row}</div></section>')
    alone = "" if len(found) > 1 else " This run has only one model: train its third stage to compare."
    note = f"Not selected: seeds {session.seed} to {session.seed + ROW - 1}."
    above = " Images above each other share their random numbers." if len(found) > 1 else ""
    return f'<div class="endings">{"".join(groups)}</div><p class="hint">{note}{above}{alone}</p>'


def _mean(images: list[Ending]) -> str:
    """The mean score of images and its standard error, in words."""
    scores = np.array([ending.score.value for ending in images if ending.score is not None])
    if len(scores) < 2:
        return ""
    error = scores.std(ddof=1) / len(scores) ** 0.5
    return f"mean score of {len(scores)} endings {signed(scores.mean())} \N{PLUS-MINUS SIGN} {error:.2f}"


def mistake(session: Session, found: Mistake) -> str:
    """An image with and without the wrong code, and how far the mistake reaches."""
    without, with_it = (
        scored(session, ending, caption=words + (f"<br>score {signed(ending.score.value)}" if ending.score else ""))
        for ending, words in ((found.without, "without the wrong code"), (found.with_it, "with it"))
    )
    return (
        f'<div class="strip three">{without}{with_it}{_ripple(session, found)}</div>'
        f'<p class="hint">At {place(session, found.position)} the model gave the wrong code a chance of '
        f"{percent(found.chance)}. Of the {found.later} codes drawn after it, <b>{int(found.changed.sum())}</b> are "
        "others than without it, from the same random numbers. The third picture shows how far the wrong code "
        "alone changes what the model expects at each later cell: 0 where it has recovered, 100 where nothing is as "
        "before.</p>"
    )


def _ripple(session: Session, found: Mistake) -> str:
    """The ripple on the level of the wrong code, over the image without it."""
    sizes = session.grid.level_sizes
    level = int(found.position >= sizes[0])
    first, (height, width) = sum(sizes[:level]), session.grid.shapes[level]
    numbers = max(height, width) <= MOST_NUMBERS
    cells = "".join(
        f'<span class="{"wrong" if first + number == found.position else "ripple"}" style="--strength:{value:.2f}">'
        f"{round(100 * value) if numbers and value >= 0.005 else ''}</span>"
        for number, value in enumerate(map(float, found.ripple[first : first + height * width]))
    )
    source = picture(decoded(session, found.without.codes[None])[0])
    caption = "how far it changes what the model expects, in %"
    return (
        f'<figure><div class="over faint"><img src="{source}" alt="how far the wrong code reaches">'
        f'<div class="map" style="--columns:{width}">{cells}</div></div>{_below(caption)}</figure>'
    )


# To take away ---------------------------------------------------------------------------------------------------------


def lines(session: Session) -> str:
    """The five lines of Python, with a button that copies them."""
    text = escape(python_lines(session))
    return f'<div class="lines"><button type="button" data-copy>Copy</button><pre>{text}</pre></div>'


def animation(content: bytes) -> str:
    """The GIF, and a link that saves it."""
    source = data_uri(content, "image/gif")
    link = f'<a href="{source}" download="episode.gif">Save episode.gif</a> ({len(content) / 1000:.0f} kB)'
    image = f'<img src="{source}" alt="the episode as an animation">'
    return f'<figure class="gif">{image}<figcaption>{link}</figcaption></figure>'
