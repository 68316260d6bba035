// A picture of the layers: a cell each, above a span one more row for every further pass, so that area is work.

import { html } from "./vendor/htm-preact.js";

const WIDTH = 320;
const CELL = 24; // height of a layer
const PASSES = 40; // height of all passes after the first, however many
const PASS = 12; // and of one of them at most
const HEAD = 30; // for the arrow and how often
const TICK = 16;
const TOP = HEAD + PASSES; // of the cells
const CHAR = 7.5; // width of a character, about

export function Stack({ nLayer, spans, isLayerwise, isStale }) {
  const pitch = WIDTH / nLayer;
  const gap = pitch > 6 ? 1.5 : pitch > 3 ? 0.75 : 0;
  const loops = spans.filter(({ passes }) => passes > 1);
  const isLooped = (il) => loops.some(({ first, last }) => first <= il && il <= last);
  const text = loops.map(({ first, last, passes }) => `layers ${first} to ${last} make ${passes} passes`).join(", ");
  const labels = loops.map((s) => ({ text: `×${s.passes}`, at: ((s.first + s.last + 1) / 2) * pitch, passes: s.passes }));
  const ends = [0, nLayer - 1, ...spans.flatMap(({ first, last }) => [first, last])];
  const ticks = ends.map((il) => ({ text: String(il), at: (il + 0.5) * pitch, isLooped: isLooped(il) }));
  return html`
    <svg class=${isStale ? "stack stale" : "stack"} viewBox="0 0 ${WIDTH} ${TOP + CELL + TICK}"
      role="img" aria-label="${nLayer} layers: ${text || "each once"}">
      ${Array.from({ length: nLayer }, (_, il) => html`
        <rect class=${isLooped(il) ? "layer looped" : "layer"} x=${il * pitch + gap / 2} y=${TOP} width=${pitch - gap}
          height=${CELL} rx=${Math.min(2, pitch / 4)} />
      `)}
      ${loops.map((span) => html`<${Passes} ...${{ span, pitch, gap, isLayerwise }} />`)}
      ${readable(labels).map(({ text, x, passes }) => html`
        <text class="times" x=${x} y=${passesTop(passes) - 16}>${text}</text>
      `)}
      ${readable(ticks).map(({ text, x, isLooped }) => html`
        <text class=${isLooped ? "tick looped" : "tick"} x=${x} y=${TOP + CELL + 12}>${text}</text>
      `)}
    </svg>
  `;
}

const passHeight = (passes) => Math.min(PASS, PASSES / (passes - 1));
const passesTop = (passes) => TOP - passHeight(passes) * (passes - 1);

/** Above the cells of a span: its further passes and the way back to its first layer. */
function Passes({ span: { first, last, passes }, pitch, gap, isLayerwise }) {
  const x = first * pitch + gap / 2;
  const width = (last - first + 1) * pitch - gap;
  const height = passHeight(passes);
  const top = passesTop(passes);
  const between = height > 4 ? 2 : height / 4;
  // with unit=layer each layer repeats by itself, so the passes are columns
  const blocks = isLayerwise
    ? Array.from({ length: last - first + 1 }, (_, i) => [x + i * pitch, top, pitch - gap, TOP - top - 2])
    : Array.from({ length: passes - 1 }, (_, i) => [x, top + i * height, width, height - between]);
  const reach = Math.max(3.5, width / 2 - 3);
  const corner = Math.min(5, reach);
  const back = `M${x + width / 2 + reach} ${top - 3}v${corner - 9}q0 -${corner} -${corner} -${corner}
    h${2 * (corner - reach)}q-${corner} 0 -${corner} ${corner}v${9 - corner}m-3 -3.5 3 3.5 3 -3.5`;
  return html`
    ${blocks.map(([x, y, width, height]) => html`
      <rect class="pass" x=${x} y=${y} width=${width} height=${height} rx=${Math.min(2, width / 4, height / 3)} />
    `)}
    <path class="back" d=${back} />
  `;
}

/** The texts that fit at their places with a little air between them, earlier ones first. */
function readable(texts) {
  const placed = [];
  for (const text of texts) {
    const half = (CHAR * text.text.length) / 2;
    const x = Math.min(WIDTH - half, Math.max(half, text.at));
    if (placed.every((other) => Math.abs(other.x - x) > other.half + half + 2)) placed.push({ ...text, x, half });
  }
  return placed;
}
