// The same message without and with the loop, side by side, and where the answers part.

import { html, useMemo, useState } from "./vendor/htm-preact.js";
import { ask } from "./api.js";
import { Composer, Footer, LoopName, request } from "./chat.js";
import { compare, countWords, segments } from "./differences.js";

export function Compare({ model, loop, settings, isShown, onWrongLoop }) {
  const [pair, setPair] = useState(null);
  const [abort, setAbort] = useState(null); // of the answer under way

  const send = async (prompt) => {
    const abort = new AbortController();
    setAbort(abort);
    const seed = Math.floor(Math.random() * 2 ** 31); // one for both, so that chance is the same
    let pair = { prompt, loop: loop.spec, temperature: settings.temperature };
    for (const [side, spec] of [["off", "off"], ["on", loop.spec]]) {
      const body = { ...request(model, settings, spec, [{ role: "user", content: prompt }]), seed };
      const { state } = await ask(body, abort.signal, (answer) => setPair((pair = { ...pair, [side]: answer })));
      if (state !== "done" && state !== "cut") break;
    }
    setAbort(null);
  };

  return html`
    <section class="view" hidden=${!isShown} aria-labelledby="compare-heading">
      <h2 id="compare-heading" class=${pair ? "hidden" : "title"}>One message, two answers</h2>
      ${pair ? html`<${Pair} ...${pair} />` : html`
        <p class="intro">
          ${loop.isOn
            ? "The plain model answers first, then the same model with the loop. What differs is underlined."
            : "The loop is off, so both answers will be the plain model's. Turn it on to see what it changes."}
        </p>
      `}
      <${Composer} id="message-compare" label="Message for both" action="Compare" keeps onSend=${send}
        ...${{ abort, loop, isShown, onWrongLoop }} onClear=${pair && (() => setPair(null))} />
    </section>
  `;
}

function Pair({ prompt, loop, temperature, off, on }) {
  const isWhole = ["done", "cut", "stopped"].includes(on?.state);
  const found = useMemo(() => compare(off?.text ?? "", on?.text ?? "", isWhole), [off?.text, on?.text, isWhole]);
  return html`
    <div class="said"><h3>You</h3><p class="plain">${prompt}</p></div>
    <p class="summary" role="status">${isWhole ? summary(found, off, on, temperature) : progress(off, on)}</p>
    <div class="columns">
      <${Side} spec="off" answer=${off} found=${found} runs=${found.left} />
      <${Side} spec=${loop} answer=${on} found=${found} runs=${found.right} />
    </div>
  `;
}

function progress(off, on) {
  const what = { stopped: "Stopped", failed: "Failed" }[(on ?? off)?.state] ?? "Answering";
  return `${what} ${on ? "with" : "without"} the loop.`;
}

function Side({ spec, answer, found: { same, parted }, runs }) {
  return html`
    <article>
      <h3><${LoopName} spec=${spec} /></h3>
      <p class="plain">
        ${same}${parted && html`<span class="parting"><span class="hidden"> (here they part) </span></span>`}${runs.map(Run)}
      </p>
      ${answer && html`<${Footer} answer=${answer} />`}
    </article>
  `;
}

function Run({ text, differs }) {
  const [, before, words, after] = text.match(/^(\s*)(.*?)(\s*)$/s);
  return differs && words ? [before, html`<mark>${words}</mark>`, after] : text;
}

function summary({ parted, agree, shared, left, right }, off, on, temperature) {
  const first = (runs) => segments(runs.map((run) => run.text).join("")).find((word) => countWords([word])) ?? "the end";
  const words = `${agree} ${agree === 1 ? "word" : "words"}`;
  const same = `Both answers are the same, all ${words}.`;
  const parting = `The answers agree for ${words}, then part: “${first(left)}” without the loop, “${first(right)}” with it.`;
  const facts = [
    parted ? `${parting} They share ${Math.round(100 * shared)} % of their words.` : same,
    off.rate && on.rate && `A token took ${(off.rate / on.rate).toFixed(2)} times as long with the loop.`,
    temperature > 0 && "Above temperature 0 answers also differ by chance.",
  ];
  return facts.filter(Boolean).join(" ");
}
