// The conversation, and what both views share: the field for a message and the line under an answer.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ask } from "./api.js";
import { render } from "./markdown.js";

const AT_END = 80; // pixels from the end of the page that still count as being there

export function Chat({ model, loop, settings, isShown, onWrongLoop }) {
  const [turns, setTurns] = useState([]);
  const [abort, setAbort] = useState(null); // of the answer under way
  useFollow(turns);

  const send = async (prompt) => {
    const abort = new AbortController();
    setAbort(abort);
    const answered = turns.filter(({ answer }) => answer.text); // templates want an answer to every question
    const past = answered.flatMap((turn) => [user(turn.prompt), { role: "assistant", content: turn.answer.text }]);
    const body = request(model, settings, loop.spec, [...past, user(prompt)]);
    await ask(body, abort.signal, (answer) => setTurns([...turns, { prompt, loop: loop.spec, answer }]));
    setAbort(null);
  };

  return html`
    <section class="view chat" hidden=${!isShown} aria-labelledby="chat-heading">
      <h2 id="chat-heading" class=${turns.length ? "hidden" : "title"}>Ask ${model.id}</h2>
      ${!turns.length && html`
        <p class="intro">
          ${loop.isOn
            ? "It answers with the loop that is set, and every answer says which that was."
            : "The loop is off: this is the plain model."}
          ${" A loop changes answers; whether for the better has to be measured."}
        </p>
      `}
      <ol class="turns">
        ${turns.map((turn, i) => html`
          <li key=${i}>
            <div class="said"><h3>You</h3><p class="plain">${turn.prompt}</p></div>
            <div class="said">
              <h3><${LoopName} spec=${turn.loop} /></h3>
              <div>
                <div class="markdown" dangerouslySetInnerHTML=${{ __html: render(turn.answer.text) }}></div>
                <${Footer} answer=${turn.answer} />
              </div>
            </div>
          </li>
        `)}
      </ol>
      <p class="hidden" role="status">${announcement(turns.at(-1)?.answer)}</p>
      <${Composer} id="message-chat" label="Message" action="Send" ...${{ abort, loop, isShown, onWrongLoop }}
        onSend=${send} onClear=${turns.length && (() => setTurns([]))} />
    </section>
  `;
}

const user = (content) => ({ role: "user", content });

export const request = (model, { system, temperature, maxTokens }, loop, messages) => ({
  model: model.id,
  messages: system.trim() ? [{ role: "system", content: system }, ...messages] : messages,
  temperature,
  max_tokens: maxTokens,
  loop,
});

export const LoopName = ({ spec }) => (spec.trim() === "off" ? "Loop off" : html`<code>${spec}</code>`);

/** A message, and one button that sends it or stops the answer. `onClear` is falsy where there is nothing to clear. */
export function Composer({ id, label, action, keeps, abort, loop, isShown, onSend, onClear, onWrongLoop }) {
  const [text, setText] = useState("");
  const field = useRef();
  useEffect(() => {
    // a touch screen would cover half the page with its keyboard
    if (isShown && matchMedia("(hover: hover)").matches) field.current.focus();
  }, [isShown]);
  const submit = (event) => {
    event.preventDefault();
    if (abort) return abort.abort();
    if (!text.trim()) return field.current.focus();
    if (loop.error) return onWrongLoop();
    if (!keeps) setText("");
    onSend(text.trim());
  };
  const press = (event) => {
    if (event.key === "Escape") abort?.abort();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!abort) submit(event);
  };
  const clear = () => {
    onClear();
    field.current.focus();
  };
  return html`
    <form class="composer" onSubmit=${submit}>
      <label class="hidden" for=${id}>${label}</label>
      <textarea id=${id} ref=${field} rows="2" value=${text} placeholder=${label} aria-describedby="${id}-keys"
        onInput=${(event) => setText(event.target.value)} onKeyDown=${press}></textarea>
      <button type="submit" class=${abort ? "stop" : "primary"}>${abort ? "Stop" : action}</button>
      <p class="keys" id="${id}-keys">Enter sends, Shift+Enter begins a line, Escape stops.</p>
      <button type="button" class="quiet" disabled=${abort || !onClear} onClick=${clear}>Clear</button>
    </form>
  `;
}

/** How an answer is doing, in a line: its length and speed, or why it ended. */
export function Footer({ answer: { state, tokens, rate, error } }) {
  if (state === "failed") return html`<p class="error" role="alert">${error}</p>`;
  const facts = [
    { waiting: "reading the message", stopped: "stopped", cut: "cut off" }[state],
    tokens > 0 && `${tokens} tokens`,
    rate && `${rate.toFixed(1)} tokens/s`,
  ];
  return html`<p class="footer" data-state=${state}>${facts.filter(Boolean).join(", ")}</p>`;
}

/** What a screen reader says of an answer: the whole of it once, rather than word by word. */
function announcement(answer) {
  const says = { waiting: "Answering.", stopped: "Stopped.", done: answer?.text, cut: `${answer?.text} Cut off.` };
  return says[answer?.state] ?? "";
}

/** Keep the end of the page in sight while the last turn grows, unless the reader has scrolled away from it. */
function useFollow(turns) {
  const follows = useRef(true);
  const page = document.documentElement;
  useEffect(() => {
    const look = () => (follows.current = innerHeight + scrollY > page.scrollHeight - AT_END);
    addEventListener("scroll", look, { passive: true });
    return () => removeEventListener("scroll", look);
  }, []);
  useEffect(() => {
    follows.current = true; // to what was just asked
  }, [turns.length]);
  useEffect(() => {
    if (follows.current && turns.length) scrollTo(0, page.scrollHeight);
  }, [turns]);
}
