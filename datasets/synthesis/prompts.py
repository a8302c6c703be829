"""What a teacher is asked: the paper's prompt, and the check that answers again from the thought alone."""

from ..prompts import TASK_TEMPLATES
from .sources import Question

# The paper's words. What follows in `REQUEST_FORMAT` is ours: it tells the teacher what the filters look for.
DESCRIBED = "{description} Following the scene description, think step by step"
UNDESCRIBED = "Think step by step"  # the ablation without a description
ANSWER_PROMPT = (
    "{opening} and answer the following question directly. "
    "Output format: <think>…</think> <answer>…</answer>. {format} Question: {question}"
)
VIEWS = "The {count} pictures show the scene from different places. "
ONE_VIEW = "The picture shows the scene. "
REQUEST_FORMAT = (
    "Begin the steps of the thought with Step 1, Step 2, Step 3 and so on, and its last sentence with Conclusion:, "
    "which names the thing that the question is about and the answer."
)
BOX_FORMAT = "Give the box of the object in the conclusion and in the answer, as <box>x, y, z, dx, dy, dz</box>."
CHECK_PROMPT = (
    "Here are thoughts about a question. Answer the question from these thoughts alone, in the words of their "
    "conclusion, and write nothing but the answer: <answer>…</answer>. Question: {question} Thoughts: {think}"
)


def question_text(question: Question) -> str:
    """The question as it is put to a reader: descriptions of objects become requests to find them."""
    return TASK_TEMPLATES[question.task].replace("{question}", question.text)


def answer_prompt(question: Question, description: str, views: int = 0) -> str:
    """Ask for a thought and an answer.

    Args:
        description: of the scene; "" leaves out the words about it.
        views: how many pictures of the scene stand before the prompt.
    """
    wanted = f"{REQUEST_FORMAT} {BOX_FORMAT}" if question.task == "grounding" else REQUEST_FORMAT
    opening = DESCRIBED.format(description=description) if description else UNDESCRIBED
    shown = "" if not views else ONE_VIEW if views == 1 else VIEWS.format(count=views)
    return shown + ANSWER_PROMPT.format(opening=opening, format=wanted, question=question_text(question))


def check_prompt(question: Question, think: str) -> str:
    """Ask for the answer again, from the thought alone."""
    return CHECK_PROMPT.format(question=question_text(question), think=think)
