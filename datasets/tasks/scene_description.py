"""3D-LLM scene description as LL3DA filtered it: `annotations/3d_llm_scene_description_{train,val}.json`.

One description of the room a scene.
"""

from .common import benchmark_3d_llm

BENCHMARK = benchmark_3d_llm("scene_description", "scene_description")
