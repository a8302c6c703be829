"""The demo's page in gradio: scene on the left, question and answer on the right.

gradio is imported inside the functions, since it is an extra.

Shapes: K objects.
"""

import html
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any

import numpy as np

from ..models.named_proposals import best_proposals
from ..visualization.pictures import data_url
from ..visualization.scene_frame import box_layers, framed_scene, inline_frame
from ..visualization.shown_boxes import ShownBoxes
from .demo_answers import DEMO_TASKS, Told, answers, make_sample
from .demo_scenes import DemoScenes, Opened

CSS = """
main.fillable {padding: 8px 24px !important} h1 {margin-bottom: 0 !important} h3 {margin-bottom: 0 !important}
#status {min-height: 2em} .problem {color: #b91c1c; font-weight: 600}
.empty {height: 520px; border: 2px dashed #c7cbd4; border-radius: 8px; display: flex; align-items: center;
  justify-content: center; text-align: center; color: #667085; line-height: 1.7}
.views {display: flex; flex-wrap: wrap; gap: 10px} .views figure {margin: 0; width: 190px}
.views img {width: 100%; border-radius: 6px} .views figcaption {font-size: 12px; color: #667085}
table.boxes {border: 0 !important; border-collapse: collapse; font-size: 13px; width: 100%}
table.boxes :is(td, th) {padding: 3px 8px !important; border-width: 0 0 1px 0 !important; border-color: #e4e7ec}
"""
EMPTY = (
    '<div class="empty"><div><b>No scene yet</b><br>Open a generated room, or upload a PLY scan,<br>'
    "under “1. Scene”; it appears here and can be turned.</div></div>"
)
# what moves boxes into the frame that is there, so that the camera stays
_SHOW_BOXES = """(boxes) => {
  const frame = document.querySelector("#scene iframe");
  if (frame && boxes) frame.contentWindow.postMessage(boxes, "*");
}"""
BROKEN = "Something went wrong on the server, and was noted there. Try again, or open another scene."
Values = dict[Any, Any]
_log = logging.getLogger(__name__)


class InWords:
    """A block whose bugs a visitor hears of in one sentence, and the server's log in full."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            _log.error("the demo failed", exc_info=error)
            raise import_module("gradio").Error(BROKEN, duration=None) from None


def notice(sentence: str) -> str:
    """A sentence for what the visitor has to change."""
    return f'<span class="problem" role="alert">{html.escape(sentence)}</span>'


def summary(opened: Opened) -> str:
    """What stands under an opened scene."""
    words = f"<b>{html.escape(opened.title)}</b> · {len(opened.scene.points_N3):,} points"
    words += f" · {len(opened.names)} detected objects"
    if opened.scene.notes:
        words += f"<br><small>assumed: {html.escape('; '.join(opened.scene.notes))}</small>"
    return words


def box_names(boxes: Sequence[Sequence[float]], opened: Opened) -> list[str]:
    """A name for each answered box: that of the detected object it covers, where there is one."""
    covering = best_proposals(np.asarray(boxes, dtype=np.float32), opened.objects_K7)
    return [f"box {number}" if one is None else opened.names[one] for number, one in enumerate(covering, start=1)]


def layers_of(
    opened: Opened, boxes: Sequence[Sequence[float]], asked: int | None, detected: bool
) -> dict[str, ShownBoxes]:
    """Boxes to show: what was detected, where that is wanted, the object asked about, and those of the answer."""
    found = opened.objects_K7.tolist() if detected else []
    numbers = [] if asked is None else [asked]
    return {
        "boxes": ShownBoxes.from_rows(found),
        "asked": ShownBoxes.from_rows(opened.objects_K7[numbers].tolist(), [opened.names[one] for one in numbers]),
        "answered": ShownBoxes.from_rows(boxes, box_names(boxes, opened)),
    }


def boxes_table(boxes: Sequence[Sequence[float]], opened: Opened) -> str:
    """The answer's boxes as a table."""
    if not boxes:
        return "<small>The answer points at nothing.</small>"
    rows = ""
    for name, box in zip(box_names(boxes, opened), boxes, strict=True):
        cells = (", ".join(f"{number:.2f}" for number in part) for part in (box[:3], box[3:6]))
        rows += f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "<tr><th>object</th><th>centre x, y, z (m)</th><th>size (m)</th></tr>"
    return f'<table class="boxes" id="answer-boxes">{head}{rows}</table>'


def views_strip(views: Sequence[int], opened: Opened) -> str:
    """The views that the model chose, as pictures."""
    pool = opened.observation.pool
    if not views or pool is None:
        return "<small>This model looks at no views.</small>"
    shown = [
        f'<figure><img alt="view" src="{data_url(pool.images_VHW3[view])}">'
        f"<figcaption>{html.escape(pool.names[view])}</figcaption></figure>"
        for view in views
    ]
    return f'<div class="views">{"".join(shown)}</div>'


class Page:
    """The components and what they do. `build` makes the page once."""

    def __init__(self, scenes: DemoScenes):
        self.scenes = scenes

    def build(self) -> Any:
        """The page, a gradio.Blocks."""
        gr = import_module("gradio")
        with gr.Blocks(title="3D-R1 demo", analytics_enabled=False, fill_width=True) as page:
            gr.Markdown("# 3D-R1\nOpen a scene, ask about it, and see thought, answer, boxes and the views looked at.")
            self.key = gr.State(None, time_to_live=3600, delete_callback=self.scenes.shelf.drop)
            self.turns, self.told = gr.State([]), gr.State(([], None))
            with gr.Row():
                with gr.Column(scale=3, min_width=420):
                    self.scene = gr.HTML(EMPTY, elem_id="scene")
                    self.summary = gr.HTML("", elem_id="summary")
                    self.detected = gr.Checkbox(False, label="Show all detected objects (orange)", elem_id="detected")
                    self.views = gr.HTML("", label="Chosen views", elem_id="views")
                with gr.Column(scale=2, min_width=360):
                    self._scene_part(gr)
                    self._question_part(gr)
                    self._answer_part(gr)
            self.boxes = gr.JSON(visible="hidden")
            self._connect(gr)
        page.queue(max_size=self.scenes.limits.waiting, api_open=False)
        return page

    def _scene_part(self, gr: Any) -> None:
        gr.Markdown("### 1. Scene")
        limits, button = self.scenes.limits, {"variant": "primary", "min_width": 140, "scale": 0}
        with gr.Tabs():
            with gr.Tab("Generated room"), gr.Row():
                self.number = gr.Number(7, label="Another number, another room", precision=0, elem_id="number")
                self.open_room = gr.Button("Open room", variant="primary", elem_id="open-room", min_width=140, scale=0)
            if self.scenes.prepared:
                with gr.Tab("Prepared scene"), gr.Row():
                    names = self.scenes.prepared
                    self.name = gr.Dropdown(names, value=names[0], label="Scene", elem_id="prepared")
                    self.open_prepared = gr.Button("Open scene", elem_id="open-prepared", **button)
            with gr.Tab("Your scan (PLY)", elem_id="upload-tab"):
                size = f"{limits.file_bytes // 2**20} MB and {limits.rows:,} points"
                self.file = gr.File(
                    label=f"PLY cloud or mesh, up to {size}", file_types=[".ply"], elem_id="upload", height=150
                )

    def _question_part(self, gr: Any) -> None:
        gr.Markdown("### 2. Question")
        choices = [(task.title, name) for name, task in DEMO_TASKS.items()]
        first = DEMO_TASKS["qa"]
        self.task = gr.Dropdown(choices, value="qa", label="Task", elem_id="task")
        self.hint = gr.Markdown(first.hint)
        most = self.scenes.limits.characters
        self.situation = gr.Textbox(
            label="Situation", placeholder="I am standing at the door, facing the window.", visible=False,
            max_length=most, elem_id="situation",
        )  # fmt: skip
        self.question = gr.Textbox(
            label="Question", placeholder="Write a question, or take an example below", max_length=most,
            elem_id="question", lines=2,
        )  # fmt: skip
        self.object = gr.Dropdown([], label="Detected object (blue)", visible=False, elem_id="object")
        self.examples = gr.Dataset(
            components=[self.question], samples=[[text] for text in first.examples], label="Examples",
            elem_id="examples",
        )  # fmt: skip
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
            self.stop = gr.Button("Stop", elem_id="stop")

    def _answer_part(self, gr: Any) -> None:
        gr.Markdown("### 3. Answer")
        self.status = gr.HTML("Open a scene first.", elem_id="status")
        self.answer = gr.Textbox(label="Answer", elem_id="answer", lines=2, interactive=False)
        self.think = gr.Textbox(label="Thought", elem_id="think", lines=3, max_lines=12, interactive=False)
        self.table = gr.HTML("", elem_id="boxes")

    def _connect(self, gr: Any) -> None:
        """Which event does what."""
        quiet: dict[str, Any] = {"api_visibility": "private"}
        opening = {**quiet, "concurrency_id": "open", "concurrency_limit": 2}
        opened = [self.key, self.scene, self.summary, self.object, self.turns, self.told, self.status]
        opened += [self.answer, self.think, self.table, self.views, self.boxes, self.detected, self.file]
        self.open_room.click(self._opening(gr, self.scenes.room), [self.number, self.key], opened, **opening)
        self.file.upload(self._opening(gr, self.scenes.upload), [self.file, self.key], opened, **opening)
        if self.scenes.prepared:
            open_one = self._opening(gr, self.scenes.prepared_scene)
            self.open_prepared.click(open_one, [self.name, self.key], opened, **opening)
        forms = [self.hint, self.situation, self.question, self.object, self.examples]
        self.task.change(self._task_form(gr), [self.task], forms, queue=False, **quiet)
        self.examples.click(lambda row: row[0], [self.examples], [self.question], queue=False, **quiet)
        asked = [self.key, self.task, self.question, self.situation, self.object, self.turns, self.detected]
        shown = [self.status, self.answer, self.think, self.table, self.views, self.boxes, self.turns, self.told]
        asking = {**quiet, "concurrency_id": "ask", "concurrency_limit": 1, "show_progress": "hidden"}
        events = [on(self._asking, asked, shown, **asking) for on in (self.ask.click, self.question.submit)]
        self.stop.click(lambda: "Stopped.", None, [self.status], cancels=events, queue=False, **quiet)
        again = [self.key, self.told, self.detected]
        self.detected.input(self._show_again, again, [self.boxes], queue=False, **quiet)
        self.boxes.change(None, [self.boxes], None, js=_SHOW_BOXES, queue=False, **quiet)

    def _opening(self, gr: Any, open_scene: Callable[[Any], str]) -> Callable[[Any, str | None], Values]:
        """Opens a scene in the place of the one that is open."""

        def opening(wanted: Any, before: str | None) -> Values:
            with InWords(), self.scenes.openings.begin() as may_begin:
                if not may_begin:
                    return {self.status: notice("The demo is being stopped.")}
                try:
                    key = open_scene(wanted)
                except ValueError as error:
                    return {self.status: notice(str(error)), self.file: None}
                self.scenes.shelf.drop(before)
                opened = self.scenes.shelf.get(key)
                frame = inline_frame(framed_scene(opened.scene), opened.title)
            choices = list(zip(opened.names, range(len(opened.names)), strict=True))
            objects = gr.Dropdown(choices=choices, value=0 if choices else None)
            return {
                self.key: key, self.scene: frame, self.summary: summary(opened), self.object: objects,
                self.turns: [], self.told: ([], None), self.status: "Ready: ask a question.", self.answer: "",
                self.think: "", self.table: "", self.views: "", self.boxes: None, self.detected: False,
                self.file: None,
            }  # fmt: skip

        return opening

    def _task_form(self, gr: Any) -> Callable[[str], Values]:
        """Shows what a task needs."""

        def form(name: str) -> Values:
            task = DEMO_TASKS.get(name, DEMO_TASKS["qa"])
            samples = [[text] for text in task.examples]
            return {
                self.hint: task.hint,
                self.situation: gr.Textbox(visible=task.situation),
                self.question: gr.Textbox(visible=task.question),
                self.object: gr.Dropdown(visible=task.object),
                self.examples: gr.Dataset(samples=samples, visible=bool(samples)),
            }

        return form

    def _asking(
        self, key: str | None, task: str, question: str, situation: str, number: int | None,
        turns: list[tuple[str, str]], detected: bool,
    ) -> Iterator[Values]:  # fmt: skip
        """Answers a question, showing it as it comes."""
        scenes = self.scenes
        try:
            opened = scenes.shelf.get(key)
            sample = make_sample(
                opened, task, question=question or "", situation=situation or "", number=number, turns=turns,
                limits=scenes.limits,
            )  # fmt: skip
        except ValueError as error:
            yield {self.status: notice(str(error))}
            return
        asked = number if DEMO_TASKS[task].object else None
        yield {
            self.status: "Looking at the scene…", self.answer: "", self.think: "", self.table: "", self.views: "",
            self.boxes: box_layers(layers_of(opened, [], asked, detected), opened.scene),
        }  # fmt: skip
        with InWords():
            for told in answers(scenes.model, scenes.lock, sample, opened, scenes.limits):
                if not told.done:
                    yield {self.status: "Writing…", self.answer: told.answer, self.think: told.think}
                    continue
                yield self._whole(opened, told, asked, detected) | {
                    self.turns: [*turns, (question.strip(), told.answer)] if task == "dialogue" else turns
                }

    def _whole(self, opened: Opened, told: Told, asked: int | None, detected: bool) -> Values:
        """A whole answer."""
        ended = "Answered" if told.finished else "Stopped, at the limit of words or time,"
        return {
            self.status: f"{ended} after {told.seconds:.1f} s.",
            self.answer: told.answer or "(nothing)",
            self.think: told.think or "(this answer comes without a thought)",
            self.table: boxes_table(told.boxes, opened),
            self.views: "<b>Views that the model chose</b>" + views_strip(told.views, opened),
            self.boxes: box_layers(layers_of(opened, told.boxes, asked, detected), opened.scene),
            self.told: (list(told.boxes), asked),
        }

    def _show_again(self, key: str | None, told: tuple[list[list[float]], int | None], detected: bool) -> Any:
        """The boxes with or without the detected ones."""
        if not key:
            return None
        try:
            opened = self.scenes.shelf.get(key)
        except ValueError:
            return None
        return box_layers(layers_of(opened, told[0], told[1], detected), opened.scene)
