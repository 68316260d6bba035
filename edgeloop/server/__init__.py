"""An OpenAI-compatible HTTP server for one model, where every request may name its own loop.

model.py       a Llama that another thread can stop and that no request can bring down
engine.py      the one thread that owns the model, and the queue in front of it
completion.py  a prompt -> pieces of text, token by token
chat.py        messages and tools -> a prompt, text -> tool calls
grammar.py     JSON schemas -> grammars, within bounds
types.py       what requests and answers look like
http.py        errors in OpenAI's shape, keys, body sizes, event streams
app.py         the routes

The request types are those of llama_cpp.server. Its app is not used: it ends a stream as soon as the next request comes,
notices a closed connection only where it streams, and answers through Llama.create_completion, which gives
log-probabilities only if the logits of the whole context are kept, and cannot be stopped.
"""
