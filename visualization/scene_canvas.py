"""A scene that turns under the mouse: one small page of points and boxes, drawn by WebGL, for an inline frame.

Boxes can be changed while it is shown, by `postMessage` with what `box_list` gives, so that the camera stays where it
is. All positions are in the world frame.

Shapes: N points.
"""

import base64
import html
import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from ..datasets.scene import Scene

SHOWN_POINTS = 80_000
_CEILING_SHARE = 0.9  # what lies above is left out, so that one looks into a room from above
_WALL, _ROOM = 0.2, 1.0  # metres: how thick a wall is, and a scan so high and twice as wide is a room
_TOP = 65535
Group: TypeAlias = tuple[Sequence[Sequence[float]], tuple[int, int, int], Sequence[str]]

_PAGE = """<!doctype html><meta charset="utf-8"><title>scene</title>
<style>
 html,body{margin:0;height:100%;overflow:hidden;background:#f4f5f7;font:13px system-ui,sans-serif}
 canvas{width:100%;height:100%;display:block;touch-action:none;cursor:grab}
 #labels span{position:absolute;transform:translate(-50%,-100%);padding:1px 6px;border-radius:4px;color:#fff;
  pointer-events:none;white-space:nowrap}
 #help{position:absolute;left:10px;bottom:8px;color:#667;background:#fffc;padding:2px 8px;border-radius:4px}
</style>
<canvas></canvas><div id="labels"></div>
<div id="help">drag: turn · shift + drag: move · wheel: nearer, farther · double click: as before</div>
<script>
"use strict";
const DATA = __DATA__;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const canvas = document.querySelector("canvas"), labels = document.getElementById("labels");
const gl = canvas.getContext("webgl");
const corner = [[-1,-1,-1],[1,-1,-1],[-1,1,-1],[1,1,-1],[-1,-1,1],[1,-1,1],[-1,1,1],[1,1,1]];
const edges = [[0,1],[2,3],[4,5],[6,7],[0,2],[1,3],[4,6],[5,7],[0,4],[1,5],[2,6],[3,7]];
const quads = [0,1,3,0,3,2,4,6,7,4,7,5,0,4,5,0,5,1,2,3,7,2,7,6,0,2,6,0,6,4,1,5,7,1,7,3];
let program, view, boxes = DATA.boxes, count = 0, buffers = {};
const reset = () => { view = {yaw: -2.2, pitch: 0.75, far: 1.25 * DATA.reach, at: DATA.middle.slice()}; };
function shader(kind, source) {
  const made = gl.createShader(kind); gl.shaderSource(made, source); gl.compileShader(made);
  gl.attachShader(program, made);
}
function buffer(name, array) {
  buffers[name] = buffers[name] || gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]); gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
}
function placed(box, p) {
  const c = Math.cos(box[6]), s = Math.sin(box[6]), x = p[0] * box[3] / 2, y = p[1] * box[4] / 2;
  return [box[0] + c * x - s * y, box[1] + s * x + c * y, box[2] + p[2] * box[5] / 2];
}
function setBoxes(list) {  // each edge a thin bar
  boxes = list; const at = [], colors = [], thick = 0.0012 * DATA.reach;
  for (const {box, color} of boxes) for (const [a, b] of edges) {
    const ends = corner.map(p => p.map((v, k) => corner[a][k] === corner[b][k]
      ? corner[a][k] + v * 2 * thick / Math.max(box[3 + k], 1e-3) : v));
    for (const k of quads) { at.push(...placed(box, ends[k])); colors.push(...color, 255); }
  }
  count = at.length / 3; buffer("boxes", new Float32Array(at)); buffer("boxColors", new Uint8Array(colors));
  labels.replaceChildren(...boxes.filter(each => each.label).map(each => {
    const span = document.createElement("span"); span.textContent = each.label;
    span.style.background = `rgb(${each.color})`; return span;
  }));
  draw();
}
function matrix() {
  const {yaw, pitch, far, at} = view;
  const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
  const back = [cp * cy, cp * sy, sp], right = [-sy, cy, 0], up = [-sp * cy, -sp * sy, cp];
  const eye = at.map((v, k) => v + far * back[k]), dot = (u, v) => u[0]*v[0] + u[1]*v[1] + u[2]*v[2];
  const f = 1 / Math.tan(0.4), aspect = canvas.width / canvas.height, n = 0.02 * far, z = far + 3 * DATA.reach;
  const depth = back.map(v => v * (n + z) / (n - z));
  const rows = [right.map(v => v * f / aspect), up.map(v => v * f), depth, back.map(v => -v)];
  const last = [-dot(rows[0], eye), -dot(rows[1], eye), -dot(depth, eye) + 2 * n * z / (n - z), dot(back, eye)];
  Object.assign(view, {right, up, eye});
  return new Float32Array([0,1,2].flatMap(k => rows.map(r => r[k])).concat(last));
}
function bind(name, place, size, kind, normalized) {
  gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]); gl.enableVertexAttribArray(place);
  gl.vertexAttribPointer(place, size, kind, normalized, 0, 0);
}
function draw() {
  if (!gl) return;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
  if (!canvas.width || !canvas.height) return;
  const m = matrix(), uniform = name => gl.getUniformLocation(program, name);
  gl.viewport(0, 0, canvas.width, canvas.height); gl.clearColor(0.957, 0.961, 0.969, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT); gl.enable(gl.DEPTH_TEST);
  gl.uniformMatrix4fv(uniform("m"), false, m); gl.uniform3fv(uniform("low"), DATA.low);
  gl.uniform3fv(uniform("eye"), view.eye); gl.uniform1f(uniform("wall"), DATA.wall);
  gl.uniform3fv(uniform("size"), DATA.size); gl.uniform1f(uniform("spot"), DATA.spacing * canvas.height * 1.7);
  bind("points", 0, 3, gl.UNSIGNED_SHORT, true); bind("colors", 1, 4, gl.UNSIGNED_BYTE, true);
  gl.drawArrays(gl.POINTS, 0, DATA.count);
  gl.uniform3fv(uniform("low"), [0,0,0]); gl.uniform3fv(uniform("size"), [1,1,1]);
  gl.uniform1f(uniform("wall"), 0);
  if (count) {
    bind("boxes", 0, 3, gl.FLOAT, false); bind("boxColors", 1, 4, gl.UNSIGNED_BYTE, true);
    gl.drawArrays(gl.TRIANGLES, 0, count);
  }
  boxes.filter(each => each.label).forEach(({box}, k) => {
    const p = [box[0], box[1], box[2] + box[5] / 2, 1], at = r => p.reduce((sum, v, k) => sum + v * m[4 * k + r], 0);
    const span = labels.children[k]; span.hidden = at(3) <= 0;
    span.style.left = `${(at(0) / at(3) + 1) / 2 * canvas.clientWidth}px`;
    span.style.top = `${(1 - at(1) / at(3)) / 2 * canvas.clientHeight - 4}px`;
  });
}
if (gl) {
  program = gl.createProgram();
  shader(gl.VERTEX_SHADER, `attribute vec3 p; attribute vec4 c; uniform mat4 m; uniform vec3 low, size, eye;
    uniform float spot, wall; varying vec4 v; void main() {
    gl_Position = m * vec4(low + p * size, 1.0); v = c; gl_PointSize = clamp(spot / gl_Position.w, 1.5, 14.0);
    vec2 from = p.xy * size.xy, to = size.xy - from; bvec2 before = lessThan(eye.xy, low.xy);
    bvec2 behind = greaterThan(eye.xy, low.xy + size.xy);  // walls between the camera and the room are left out
    if (wall > 0.0 && (before.x && from.x < wall || behind.x && to.x < wall || before.y && from.y < wall
      || behind.y && to.y < wall))
      gl_Position = vec4(2.0, 2.0, 2.0, 1.0); }`);
  shader(gl.FRAGMENT_SHADER, "precision mediump float; varying vec4 v; void main() { gl_FragColor = v; }");
  gl.bindAttribLocation(program, 0, "p"); gl.bindAttribLocation(program, 1, "c");
  gl.linkProgram(program); gl.useProgram(program);
  buffer("points", new Uint16Array(bytes(DATA.points).buffer)); buffer("colors", bytes(DATA.colors));
  reset(); setBoxes(boxes);
} else document.getElementById("help").textContent = "This browser has no WebGL; see the pictures below.";
let held = null;
canvas.onpointerdown = e => { held = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); };
canvas.onpointerup = canvas.onpointercancel = () => { held = null; };
canvas.onpointermove = e => {
  if (!held) return;
  const dx = e.clientX - held[0], dy = e.clientY - held[1]; held = [e.clientX, e.clientY];
  if (e.shiftKey || e.buttons & 2) {
    const k = 0.85 * view.far / canvas.clientHeight;
    view.at = view.at.map((v, i) => v - k * dx * view.right[i] + k * dy * view.up[i]);
  } else {
    view.yaw -= dx * 0.008; view.pitch = Math.min(1.55, Math.max(-0.5, view.pitch + dy * 0.008));
  }
  draw();
};
canvas.oncontextmenu = e => e.preventDefault();
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  view.far = Math.min(6, Math.max(0.05, view.far / DATA.reach * Math.exp(e.deltaY * 0.001))) * DATA.reach;
  draw();
}, {passive: false});
canvas.ondblclick = () => { reset(); draw(); };
window.addEventListener("resize", draw);
window.addEventListener("message", e => { if (gl && e.data && Array.isArray(e.data.boxes)) setBoxes(e.data.boxes); });
</script>"""


def box_list(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Boxes as the page takes them: {box: [7 numbers], color: [r, g, b], label}.

    Args:
        groups: boxes [x, y, z, dx, dy, dz(, heading)], their colour, and their labels (fewer leave the rest bare).
    """
    found = []
    for boxes, color, names in groups:
        labels = [*names, *[""] * len(boxes)]
        for box, label in zip(boxes, labels, strict=False):
            numbers = [round(float(number), 4) for number in (*box, 0.0)[:7]]
            found.append({"box": numbers, "color": list(color), "label": label})
    return found


def scene_page(scene: Scene, groups: Sequence[Group] = (), *, max_points: int = SHOWN_POINTS) -> str:
    """The page of a scene with boxes; it needs no other file and no network."""
    points_N3, colors_N3 = scene.points_N3, scene.colors_N3
    low_3, high_3 = points_N3.min(0), points_N3.max(0)
    below_N = points_N3[:, 2] <= low_3[2] + _CEILING_SHARE * (high_3[2] - low_3[2])
    kept = np.flatnonzero(below_N if below_N.mean() > 0.2 else np.ones_like(below_N))
    if len(kept) > max_points:
        kept = np.random.default_rng(0).choice(kept, max_points, replace=False)
    size_3 = np.maximum(high_3 - low_3, 1e-3)
    cells_N3 = np.rint((points_N3[kept] - low_3) / size_3 * _TOP).clip(0, _TOP).astype("<u2")
    opaque_N4 = np.concatenate([colors_N3[kept], np.full((len(kept), 1), 255, np.uint8)], axis=1)
    area = float(size_3[0] * size_3[1] + 2 * size_3[2] * (size_3[0] + size_3[1]))
    data = {
        "count": len(kept),
        "points": base64.b64encode(cells_N3.tobytes()).decode(),
        "colors": base64.b64encode(opaque_N4.astype(np.uint8).tobytes()).decode(),
        "low": low_3.tolist(),
        "size": size_3.tolist(),
        "middle": [*((low_3 + high_3) / 2)[:2].tolist(), float(low_3[2] + 0.3 * size_3[2])],
        "reach": float(np.linalg.norm(size_3)),
        "spacing": float(np.sqrt(area / max(len(kept), 1))),
        "wall": _WALL if min(size_3[:2]) > 2 * _ROOM and size_3[2] > _ROOM else 0.0,
        "boxes": box_list(groups),
    }
    text = json.dumps(data).replace("<", "\\u003c")  # a label must not end the script
    return _PAGE.replace("__DATA__", text)


def inline_frame(page: str, title: str, *, height: int = 520) -> str:
    """The page as an element of another one. Its scripts run apart: they see neither that page nor its cookies."""
    style = f"width:100%;height:{height}px;border:0;border-radius:8px;display:block"
    source = html.escape(page, quote=True)
    return f'<iframe sandbox="allow-scripts" title="{html.escape(title)}" style="{style}" srcdoc="{source}"></iframe>'
