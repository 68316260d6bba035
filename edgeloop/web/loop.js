// The loop: its field, the controls that write it, and what the server's parser says of it.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { getLoop } from "./api.js";
import { Stack } from "./stack.js";

const DEBOUNCE_MS = 200;
const SOLVERS = [
  ["euler", "naive", "anchored", "residual-scaled", "input-anchor", "heavy-ball", "midpoint", "heun", "rk4"],
  ["uniform", "moving-average", "running-mean", "auto-align"], // and poly, whose weights only the field can say
].flat();
const PASSES_A_STEP = { midpoint: 2, heun: 2, rk4: 4 };
const KV = {
  frozen: "frozen: first pass's",
  own: "own: each pass's",
  first: "first: mixed, keeps first",
  last: "last: mixed, keeps last",
};
const CHOICE = /^(unit|scope|routing|norm)=/; // these mean the same with every solver
const MAX_PASSES = 64;
const USUAL_PASSES = 8; // what the slider spans unless more are asked for

/** A spec's parts: {spans, solver, kv, rest}. The spans come from the server, which resolves fractions and auto. */
function parts({ loop, spans }) {
  const options = loop.split(":")[1]?.split(",") ?? [];
  const solver = options.find((option) => !option.includes("=")) ?? "euler";
  const kv = options.find((option) => option.startsWith("kv="))?.slice(3) ?? "frozen";
  return { spans, solver, kv, rest: options.filter((option) => option.includes("=") && !option.startsWith("kv=")) };
}

function spell({ spans, solver, kv, rest }) {
  if (!spans.length) return "off";
  const options = [...(solver === "euler" ? [] : [solver]), ...rest, ...(kv === "frozen" ? [] : [`kv=${kv}`])];
  return spans.map((s) => `${s.first}-${s.last}x${s.passes}`).join("+") + (options.length ? `:${options.join(",")}` : "");
}

/** Four layers in the middle, three passes: where the published gains are. */
function usual(nLayer) {
  const first = Math.max(0, Math.round(nLayer * 0.525) - 2);
  return `${first}-${Math.min(first + 3, nLayer - 1)}x3`;
}

/**
 * The loop as {spec, parts, facts, error, isOn, type, edit}: `spec` is the field's text, `parts` what the controls show,
 * `facts` what the server says of it, first `initial`. A wrong spec leaves parts and facts at the last right one.
 */
export function useLoop(initial) {
  const [loop, setLoop] = useState({ spec: initial.loop, parts: parts(initial), facts: initial, error: "" });
  useEffect(() => {
    const abort = new AbortController();
    const { spec } = loop;
    // unless it was edited since
    const learn = (what) => setLoop((now) => (now.spec === spec ? { ...now, ...what } : now));
    const check = () =>
      getLoop(spec, abort.signal).then(
        (facts) => learn({ parts: parts(facts), facts, error: "" }),
        (problem) => problem.status === 422 && learn({ error: problem.message }), // a server that is gone is Send's to say
      );
    const timer = setTimeout(check, DEBOUNCE_MS);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [loop.spec]);
  return {
    ...loop,
    isOn: loop.spec.trim() !== "off",
    type: (spec) => setLoop((now) => ({ ...now, spec })),
    edit: (change) =>
      setLoop((now) => {
        const parts = { ...now.parts, ...change };
        return { ...now, parts, spec: spell(parts) };
      }),
  };
}

export function LoopControl({ loop, nLayer }) {
  const { spans, solver, kv, rest } = loop.parts;
  const lastOn = useRef(usual(nLayer));
  if (loop.isOn && !loop.error) lastOn.current = loop.spec;
  const end = spans.at(-1)?.last;
  const step = PASSES_A_STEP[solver] ?? 1;

  const setSpan = (i, span) => loop.edit({ spans: spans.map((old, j) => (j === i ? span : old)) });
  const setSolver = (name) => {
    const step = PASSES_A_STEP[name] ?? 1;
    const round = (span) => ({ ...span, passes: Math.min(MAX_PASSES, Math.ceil(span.passes / step) * step) });
    loop.edit({ solver: name, spans: spans.map(round), rest: rest.filter((option) => CHOICE.test(option)) });
  };
  const addSpan = () => {
    const first = Math.min(end + 2, nLayer - 1);
    loop.edit({ spans: [...spans, { first, last: Math.min(first + 3, nLayer - 1), passes: Math.max(2, step) }] });
  };

  return html`
    <div class="row">
      <h2 id="loop-heading">Loop</h2>
      <button
        type="button" role="switch" class="switch" aria-checked=${String(loop.isOn)} aria-labelledby="loop-heading"
        onClick=${() => loop.type(loop.isOn ? "off" : lastOn.current)}
      ><span class="knob"></span></button>
    </div>
    <div class="field">
      <label for="loop">Spec</label>
      <input
        id="loop" class="mono" type="text" value=${loop.spec} maxlength="2000" spellcheck=${false} autocapitalize="off"
        autocomplete="off" aria-invalid=${String(Boolean(loop.error))} aria-describedby="loop-error loop-means"
        onInput=${(event) => loop.type(event.target.value)}
      />
      <p id="loop-error" class="error" aria-live="polite">${loop.error}</p>
    </div>
    <${Stack} nLayer=${nLayer} spans=${spans} isLayerwise=${rest.includes("unit=layer")} isStale=${Boolean(loop.error)} />
    <p id="loop-means" class="means">${!loop.error && meaning(loop.facts, nLayer)}</p>
    ${spans.map((span, i) => {
      // all sliders have the picture's scale, and stop at the neighbours
      const [low, high] = [(spans[i - 1]?.last ?? -1) + 1, (spans[i + 1]?.first ?? nLayer) - 1];
      const layers = { min: 0, max: nLayer - 1, low, high };
      const passes = { min: step, max: Math.max(USUAL_PASSES, span.passes), step };
      return html`
        <fieldset class="span" key=${i}>
          <legend>${spans.length > 1 ? `Span ${i + 1}` : "Span"}</legend>
          <${Slider} label="First layer" ...${layers} value=${span.first}
            onChange=${(first) => setSpan(i, { ...span, first, last: Math.max(first, span.last) })} />
          <${Slider} label="Last layer" ...${layers} value=${span.last}
            onChange=${(last) => setSpan(i, { ...span, last, first: Math.min(span.first, last) })} />
          <${Slider} label="Passes" ...${passes} value=${span.passes}
            onChange=${(passes) => setSpan(i, { ...span, passes })} />
          ${spans.length > 1 &&
          html`<button type="button" class="quiet remove" aria-label="Remove span ${i + 1}"
            onClick=${() => loop.edit({ spans: spans.filter((_, j) => j !== i) })}>Remove</button>`}
        </fieldset>
      `;
    })}
    ${spans.length > 0 &&
    html`
      <button type="button" class="quiet" disabled=${end >= nLayer - 1} onClick=${addSpan}>Add a span</button>
      <${Select} label="Solver" value=${solver} onChange=${setSolver}
        options=${(SOLVERS.includes(solver) ? SOLVERS : [...SOLVERS, solver]).map((name) => [name, name])} />
      <${Select} label="K/V" value=${kv} onChange=${(kv) => loop.edit({ kv })} options=${Object.entries(KV)} />
    `}
  `;
}

function meaning({ cost, memory_bytes: memory, why, spans }, nLayer) {
  if (!spans.length) return why ?? `The plain model: each of its ${nLayer} layers once.`;
  const room = memory === null ? "A recurrent state more for each pass" : `${memory ? bytes(memory) : "No"} extra memory`;
  return html`${why && `${why}. `}<strong>${cost.toFixed(2)}×</strong> the layers: ${Math.round(cost * nLayer)} applied to
    each token instead of ${nLayer}. ${room}.`;
}

const bytes = (n) => (n < 1e9 ? `${Math.ceil(n / 1e6)} MB` : `${(n / 1e9).toFixed(1)} GB`);

export function Slider({ label, value, min, max, low = min, high = max, step = 1, onChange }) {
  const change = ({ target }) => onChange((target.value = Math.min(high, Math.max(low, target.valueAsNumber))));
  return html`
    <label class="slider">
      <span>${label}</span>
      <input type="range" ...${{ min, max, step }} value=${value} onInput=${change} />
      <span class="mono" aria-hidden="true">${value}</span>
    </label>
  `;
}

function Select({ label, value, options, onChange }) {
  return html`
    <label class="choice">
      <span>${label}</span>
      <select value=${value} onChange=${(event) => onChange(event.target.value)}>
        ${options.map(([name, text]) => html`<option value=${name}>${text}</option>`)}
      </select>
    </label>
  `;
}
