"""The task's own evaluation score as a reward, so that training and evaluation measure the same thing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...utils.metrics.score import sample_score
from ...utils.predictions import Prediction
from ...utils.text import parse_response, resolve_boxes, strip_pointers


def task_reward(
    completions: list[str],
    *,
    task: Sequence[str],
    question: Sequence[str],
    references: Sequence[Sequence[str]],
    target_boxes: Sequence[np.ndarray | None],
    proposals: Sequence[np.ndarray],
    **columns: Any,  # noqa: ARG001
) -> list[float | None]:
    """`utils.metrics.score.sample_score` of each answer, in [0, 1]: matched IoU, exact match or ROUGE-L by task.

    None where the sample lacks what its task is scored with (target boxes for grounding, references elsewhere); 0
    for an answer with neither words nor boxes.

    ROUGE-L pays for any words in common: on 3D-LLM's planning, dialogue and descriptions the question said back earns
    0.11, "the" ten times as much, another sample's answer 0.20. It stays as the evaluation has it; where an echo
    should earn nothing, use the semantic reward.
    """
    rewards: list[float | None] = []
    for row, completion in enumerate(completions):
        targets = [] if target_boxes[row] is None else np.asarray(target_boxes[row]).tolist()
        boxes_asked = task[row] == "grounding"
        if not (targets if boxes_asked else references[row]):
            rewards.append(None)
            continue
        answer = parse_response(completion).answer
        if not boxes_asked and not strip_pointers(answer):
            rewards.append(0.0)
            continue
        prediction = Prediction(
            sample_id=str(row),
            task=task[row],
            scene_id="",
            question=question[row],
            text=completion,
            answer=answer,
            boxes=resolve_boxes(answer, np.asarray(proposals[row]).tolist()),
            references=list(references[row]),
            target_boxes=targets,
        )
        rewards.append(sample_score(task[row], prediction))
    return rewards
