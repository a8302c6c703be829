"""3D-LLM planning as LL3DA filtered it: `annotations/3d_llm_embodied_planning_filtered_{train,val}.json`.

The question holds the goal and the steps already done, the answer the next step.
"""

from .common import benchmark_3d_llm

BENCHMARK = benchmark_3d_llm("embodied_planning_filtered", "planning")
