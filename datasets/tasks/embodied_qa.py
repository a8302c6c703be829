"""3D-LLM embodied question answering, from LL3DA: `annotations/3d_llm_embodied_question_answer_{train,val}.json`.

The question holds the situation and is written `### human: … ### assistant:`. References stay as they stand: many end
in a comma, which scorers see as well.
"""

from .common import benchmark_3d_llm

BENCHMARK = benchmark_3d_llm("embodied_question_answer", "qa", raw=True)
