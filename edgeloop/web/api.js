// Talks to the server that the page comes from. Knows nothing of the page.

const KEY = "edgeloop-api-key"; // kept for this tab only

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // of HTTP; 0 without an answer
  }
}

export const saveKey = (key) => sessionStorage.setItem(KEY, key);

/** {id, n_layer, architecture, n_ctx, loop: what getLoop says of the server's own}. */
export async function getModel() {
  const [{ id, edgeloop }] = (await (await request("v1/models")).json()).data;
  return { id, ...edgeloop, loop: await getLoop(edgeloop.loop) };
}

/** What a spec means on this model. Throws ServerError with the parser's sentence. */
export async function getLoop(spec, signal) {
  return (await request(`v1/loop?spec=${encodeURIComponent(spec)}`, { signal })).json();
}

/**
 * Stream one answer. `report` is called with {state, text, rate, tokens, error} whenever it grows, and its last value returned.
 * The states are waiting, streaming, and one of done, cut (at the token limit), stopped (by the signal) and failed.
 * The rate, in tokens/s, is measured here until the server gives its own.
 */
export async function ask(body, signal, report) {
  let answer = { state: "waiting", text: "", tokens: 0 };
  const grow = (more) => report((answer = { ...answer, ...more }));
  let firstAt = 0;
  let finish = null;
  grow({});
  try {
    const response = await request("v1/chat/completions", {
      method: "POST",
      signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    });
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new ServerError(chunk.error.message);
      const choice = chunk.choices?.[0];
      finish = choice?.finish_reason ?? finish;
      if (choice?.delta?.content) {
        firstAt ||= performance.now();
        const seconds = (performance.now() - firstAt) / 1000;
        const rate = seconds > 0.2 ? answer.tokens / seconds : undefined;
        grow({ state: "streaming", text: answer.text + choice.delta.content, tokens: answer.tokens + 1, rate });
      }
      if (chunk.usage) grow({ tokens: chunk.usage.completion_tokens });
      if (chunk.timings) grow({ rate: chunk.timings.predicted_per_second });
    }
    if (!finish) throw new ServerError("The connection ended before the answer did.");
    grow({ state: finish === "length" ? "cut" : "done" });
  } catch (error) {
    grow(signal.aborted ? { state: "stopped" } : { state: "failed", error: error.message });
  }
  return answer;
}

async function request(path, { headers, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  if (key) headers = { ...headers, Authorization: `Bearer ${key}` };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw options.signal?.aborted ? error : new ServerError("The server does not answer. Is edgeloop serve still running?");
  });
  if (response.ok) return response;
  const problem = (await response.json().catch(() => null))?.error?.message;
  throw new ServerError(problem ?? `The server answered ${response.status}.`, response.status);
}

/** The objects of a stream of server-sent events, up to [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
    }
  }
}
