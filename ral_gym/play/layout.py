"""What lies where on the page, in words and components; `page` says what happens."""

from __future__ import annotations

import os
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr

from ral_gym.play import fragments
from ral_gym.play.models import Models
from ral_gym.play.upload import MOST_MB

TEMPERATURE = 0.85
"""Where the page begins: at 1 the bundled models draw more broken faces."""

CLICKS = (
    "element.addEventListener('click', event => {{ const button = event.target.closest('[data-{name}]'); "
    "if (button) trigger('select', {{{name}: Number(button.dataset.{name})}}); }});"
)
COPY = (
    "element.addEventListener('click', event => { const button = event.target.closest('[data-copy]'); "
    "if (!button) return; const area = document.createElement('textarea'); "
    "area.value = element.querySelector('pre').innerText; document.body.append(area); area.select(); "
    "document.execCommand('copy'); area.remove(); button.textContent = 'Copied'; });"
)
IDEAS = (
    "<details><summary>Three things to try</summary><ol>"
    "<li>Finish an image. Click a cell in its first row, then, after <i>Undo</i>, one in its last row but one. Which "
    "mistake reaches further?</li>"
    "<li>Let both models finish an image at temperature 0.3, then at 1.5. What is gained, and what is lost?</li>"
    "<li>Draw the last ten cells of an image yourself, by clicking what may come next. Does the critic prefer them to "
    "the model's own?</li></ol></details>"
)
PHOTO = (
    '<label class="upload"><input type="file" accept="image/*" aria-label="Upload a photo">'
    "<span>Upload a photo</span></label>"
)
# Gradio's own button leaves an empty file behind at every upload.
UPLOAD = (
    "element.addEventListener('change', async event => { const input = event.target, file = input.files[0]; "
    "if (!file) return; let sent = {size: file.size}; "
    f"if (file.size <= {MOST_MB} * 2 ** 20) try {{ sent.path = (await upload(file)).path; }} catch {{}} "
    "input.value = ''; trigger('upload', sent); });"
)


class Layout:
    """The components, made inside a `gr.Blocks`, from top to bottom.

    Args:
        models: what is drawn with; parts of the page without a use for them are hidden.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.visit = gr.State(None)
        gr.HTML(self._introduction(), elem_classes="intro")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320, elem_classes="card"):
                self._image()
            with gr.Column(min_width=320):
                with gr.Column(elem_classes="card"):
                    gr.HTML("<h3>What may come next</h3>")
                    self.choices = gr.HTML(js_on_load=CLICKS.format(name="code"), elem_id="choices")
                with gr.Column(elem_classes="card"):
                    gr.HTML("<h3>How real does it look?</h3>")
                    self.critic = gr.HTML(elem_id="critic", elem_classes="critic")
        with gr.Column(elem_classes="card", visible=False) as self.mistaken:
            gr.HTML("<h3>Did it recover from the wrong code?</h3>")
            self.mistake = gr.HTML(elem_id="mistake")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320, elem_classes="card"):
                self._settings()
            with gr.Column(min_width=320, elem_classes="card", visible=models.grid.height > 1):
                self._photos()
        with gr.Column(elem_classes="card"):
            self._comparison()
        with gr.Column(elem_classes="card"):
            self._sharing()

    def _introduction(self) -> str:
        grid = self.models.grid
        shapes = " and then ".join(f"{height} \N{MULTIPLICATION SIGN} {width}" for height, width in grid.shapes)
        return (
            "<h1>Draw an image, one cell at a time</h1>"
            f"<p>This model draws {escape(self.models.name)} the way a language model writes a sentence: one piece "
            f"after another, each chosen after looking at all the pieces before it. An image is a grid of {shapes} "
            f"cells; each cell gets one of {grid.codebook_size} <i>codes</i>, which work like the pieces of a "
            f"puzzle. {self.models.remark}</p>{IDEAS}"
        )

    def _image(self) -> None:
        self.board = gr.HTML(js_on_load=CLICKS.format(name="cell"), elem_id="board")
        with gr.Row():
            self.step = gr.Button("Draw the next cell", variant="primary", min_width=130, elem_id="step")
            self.finish = gr.Button("Finish the image", variant="primary", min_width=130, elem_id="finish")
        with gr.Row():
            self.undo = gr.Button("Undo", min_width=90, elem_id="undo")
            self.new = gr.Button("New image", min_width=110, elem_id="new")
        gr.HTML(
            '<p class="hint"><b>Click a cell that is drawn</b> to put a wrong code there, and watch whether the model '
            "recovers.</p>"
        )

    def _settings(self) -> None:
        models = self.models
        gr.HTML('<h3>How it draws</h3><p class="hint">Changes count from the next cell on.</p>')
        names = [(fragments.LABELS[name], name) for name in models.generators]
        self.generator = gr.Radio(names, value=names[-1][1], label="Model", elem_id="generator")
        self.temperature = gr.Slider(
            0.1, 2, TEMPERATURE, step=0.05, label="Temperature", info="low: plays it safe; high: takes risks"
        )
        said = "the same seed draws the same image"
        self.seed = gr.Number(0, label="Seed", info=said, precision=0, minimum=0, elem_id="seed")
        self.label = gr.Dropdown(
            [(name, number) for number, name in enumerate(models.class_names)],
            value=0 if models.class_names else None,
            label="What to draw",
            visible=bool(models.class_names),
            elem_id="label",
        )
        said = "1: none; more: more typical of what is drawn, and less varied"
        self.guidance = gr.Slider(1, 8, 1, step=0.25, label="Guidance", info=said, visible=models.can_guide)

    def _photos(self) -> None:
        height = self.models.grid.height
        gr.HTML(
            '<h3>Begin with part of an image</h3><p class="hint">The model sees only the upper part, and draws the '
            "rest. A photo that you upload goes to the computer that runs this page and nowhere else; its file is "
            "deleted as soon as it is read.</p>"
        )
        said, rows = f"of {height} rows of cells", max(1, height // 2)
        self.rows = gr.Slider(
            1, max(2, height - 1), rows, step=1, label="Upper rows it sees", info=said, elem_id="rows"
        )
        with gr.Row():
            real = self.models.world.real_codes is not None
            self.real = gr.Button("An image it learned from", min_width=150, visible=real, elem_id="real")
            self.photo = gr.HTML(PHOTO, js_on_load=UPLOAD, elem_id="photo", min_width=150)

    def _comparison(self) -> None:
        if len(self.models.generators) > 1:
            said = (
                "<h3>Before and after reinforcement learning</h3>"
                '<p class="hint">Both models finish this image, each four times. The first learned to imitate images '
                "(MLE, maximum likelihood); the second went on learning from rewards, by drawing images and having "
                "them judged (RAL, reinforced adversarial learning).</p>"
            )
            button = "Let both finish this image"
        else:
            said = '<h3>Again and again</h3><p class="hint">The model finishes this image four times.</p>'
            button = "Finish this image four times"
        gr.HTML(said)
        with gr.Row():
            self.compare = gr.Button(button, elem_id="compare", min_width=300, scale=0)
        self.endings = gr.HTML(elem_id="endings")

    def _sharing(self) -> None:
        gr.HTML("<h3>Take it with you</h3>")
        with gr.Row():
            self.make_gif = gr.Button("Make an animation", elem_id="make-gif", min_width=300, scale=0)
        self.animation = gr.HTML(elem_id="animation")
        gr.HTML('<p class="hint">Five lines of Python that repeat this episode, wherever ral_gym is installed:</p>')
        self.lines = gr.HTML(js_on_load=COPY, elem_id="lines")

    @property
    def inputs(self) -> set[Any]:
        """What every handler is given, as a dict by component."""
        knobs = {self.generator, self.temperature, self.seed, self.guidance}
        return {self.visit, *knobs, self.label, self.rows}

    @property
    def outputs(self) -> list[Any]:
        """What `Page.show` fills, in its order."""
        image = [self.visit, self.board, self.choices, self.critic, self.lines]
        buttons = [self.undo, self.step, self.finish]
        of_this_image = [self.endings, self.animation]
        return [*image, *buttons, self.mistaken, self.mistake, self.seed, self.label, *of_this_image]
