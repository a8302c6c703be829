"""3D-LLM dialogue as LL3DA filtered it: `annotations/3d_llm_embodied_dialogue_filtered_{train,val}.json`.

The question holds the whole conversation so far, written `### human: … ### assistant: …`.
"""

from .common import benchmark_3d_llm

BENCHMARK = benchmark_3d_llm("embodied_dialogue_filtered", "dialogue")
