// The page: what the server runs, the loop, the settings, and the two views.

import { html, render, useEffect, useState } from "./vendor/htm-preact.js";
import { getModel, saveKey } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { LoopControl, Slider, useLoop } from "./loop.js";

const VIEWS = { chat: "Chat", compare: "Compare" };

function App() {
  const [model, setModel] = useState(null);
  const [problem, setProblem] = useState(null);
  const connect = () => getModel().then(setModel, setProblem);
  useEffect(connect, []);
  if (model) return html`<${Workbench} model=${model} />`;
  if (problem?.status === 401) return html`<${KeyForm} onKey=${connect} problem=${problem} />`;
  if (!problem) return html`<main class="alone"><p>Connecting to the server.</p></main>`;
  return html`
    <main class="alone">
      <h1>edgeloop</h1>
      <p role="alert">${problem.message}</p>
      <button type="button" class="primary" onClick=${connect}>Try again</button>
    </main>
  `;
}

function KeyForm({ onKey, problem }) {
  const [key, setKey] = useState("");
  const submit = (event) => {
    event.preventDefault();
    saveKey(key.trim());
    onKey();
  };
  return html`
    <main class="alone">
      <h1>edgeloop</h1>
      <form class="field" onSubmit=${submit}>
        <label for="key">This server wants its API key</label>
        <input id="key" type="password" autocomplete="current-password" required value=${key}
          onInput=${(event) => setKey(event.target.value)} aria-describedby="key-problem" />
        <p id="key-problem" class="error" aria-live="polite">${problem.message}</p>
        <button type="submit" class="primary">Continue</button>
      </form>
    </main>
  `;
}

function Workbench({ model }) {
  const loop = useLoop(model.loop);
  const view = useHash();
  const [settings, setSettings] = useState({ temperature: 0, maxTokens: 512, system: "" });
  const [isOpen, setOpen] = useState(false); // the panel, on narrow screens
  const onWrongLoop = () => {
    setOpen(true);
    setTimeout(() => document.getElementById("loop").focus()); // once it is shown
  };
  const props = { model, loop, settings, onWrongLoop };
  return html`
    <a class="skip" href="#message-${view}" onClick=${(event) => {
      event.preventDefault(); // the hash is the view's
      document.getElementById(`message-${view}`).focus();
    }}>Skip to the message</a>
    <header>
      <img src="web/icon.svg" alt="" width="28" height="28" />
      <h1>edgeloop</h1>
      <p class="model" title=${model.id}>${model.id}<span> ${model.architecture}, ${model.n_layer} layers</span></p>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(([name, title]) => html`
          <a href="#${name}" aria-current=${name === view ? "page" : undefined}>${title}</a>
        `)}
      </nav>
    </header>
    <aside aria-label="Loop and settings">
      <button type="button" class="disclose" aria-expanded=${String(isOpen)} aria-controls="panel"
        onClick=${() => setOpen(!isOpen)}>
        Loop and settings <code>${loop.spec}</code>
      </button>
      <div id="panel" class=${isOpen ? "open" : ""}>
        <section aria-labelledby="loop-heading"><${LoopControl} loop=${loop} nLayer=${model.n_layer} /></section>
        <${Settings} ...${{ settings, setSettings }} />
      </div>
    </aside>
    <main>
      <${Chat} ...${props} isShown=${view === "chat"} />
      <${Compare} ...${props} isShown=${view === "compare"} />
    </main>
  `;
}

function Settings({ settings, setSettings }) {
  const set = (name) => (value) => setSettings({ ...settings, [name]: value });
  return html`
    <section aria-labelledby="settings-heading">
      <h2 id="settings-heading">Answers</h2>
      <div>
        <${Slider} label="Temperature" min=${0} max=${2} step=${0.1} value=${settings.temperature}
          onChange=${set("temperature")} />
        <${Slider} label="Tokens at most" min=${16} max=${4096} step=${16} value=${settings.maxTokens}
          onChange=${set("maxTokens")} />
      </div>
      <div class="field">
        <label for="system">System prompt</label>
        <textarea id="system" rows="2" value=${settings.system}
          onInput=${(event) => set("system")(event.target.value)}></textarea>
      </div>
    </section>
  `;
}

/** The view that the address names, so that it can be linked to and Back works. */
function useHash() {
  const read = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat");
  const [view, setView] = useState(read);
  useEffect(() => {
    const change = () => setView(read());
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  return view;
}

render(html`<${App} />`, document.body);
