"""The rule teacher: thoughts and answers worked out from a scene's labelled boxes, without a network or a model.

It reads the question and the boxes and nothing else, least of all the benchmark's answer, so that the filters judge
it as they judge any teacher. What its rules do not settle it leaves, with the reason `cannot_tell`.
"""

from collections.abc import Mapping

from ...utils.text import format_response
from ..rooms.words import sentence
from ..scene_store import SceneInfo
from .filters import last_step
from .rule_solvers import Solution, solve_grounding, solve_question
from .scene_reading import CannotTell, SceneReading
from .teacher import Reply, Request

VERSION = 1  # raise it when the rules change, so that older replies are not reused
IDENTITY = f"rules-{VERSION}"
CONCLUSION = "Last, what has been found leads to the conclusion: "


def write_thought(solution: Solution) -> str:
    """The steps with their cues; the last one holds the answer."""
    return f"First, {solution.first}. Next, {solution.following}. {CONCLUSION}{solution.answer}."


def answer_of_thought(think: str) -> str:
    """The answer that a thought of `write_thought` leads to, read from its last step alone; "" where there is none."""
    _, found, answer = last_step(think).rpartition("conclusion: ")
    return sentence(answer.strip().rstrip(".")) + "." if found else ""


class RuleTeacher:
    """Answers from labelled boxes.

    Args:
        index: the scenes' labels and boxes.
    """

    def __init__(self, index: Mapping[str, SceneInfo]):
        self.identity = IDENTITY
        self._index = index
        self._scene_id = ""
        self._reading: SceneReading | None = None

    def _read(self, scene_id: str) -> SceneReading:
        if self._reading is None or self._scene_id != scene_id:
            self._scene_id, self._reading = scene_id, SceneReading(self._index[scene_id])
        return self._reading

    async def ask(self, request: Request) -> Reply:
        """A thought and an answer, or, where a thought is given, the answer that it leads to."""
        if request.think:
            answer = answer_of_thought(request.think)
            return Reply(f"<answer>{answer}</answer>", "" if answer else "cannot_tell")
        question = request.question
        solve = solve_grounding if question.task == "grounding" else solve_question
        try:
            solution = solve(self._read(question.scene_id), question.text)
        except CannotTell as why:
            return Reply(str(why), "cannot_tell")
        return Reply(format_response(write_thought(solution), sentence(solution.answer) + "."))

    async def close(self) -> None:
        """Nothing to close."""
