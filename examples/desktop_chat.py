"""A chat window with a slider for the passes: python desktop_chat.py model.gguf

The window runs in the main thread, as Tk wants it. An event loop in a second thread holds the AsyncLlama, which
computes in a third. Tasks go to the event loop with run_coroutine_threadsafe; what happens comes back through a queue
that the window empties thirty times a second, so that it never waits for the model.
"""

import asyncio
import queue
import sys
import threading
import tkinter as tk
from tkinter import ttk
from tkinter.scrolledtext import ScrolledText

import edgeloop

POLL_MS = 33


class ChatWindow(tk.Tk):
    def __init__(self, model: str, **options):
        super().__init__()
        self.title("edgeloop")
        self.geometry("720x560")
        self.messages: list[dict[str, str]] = []
        self.task = None  # the answer that is being computed
        self.happened: queue.SimpleQueue = queue.SimpleQueue()  # (method, arguments), called in the window's thread
        self.llm = edgeloop.AsyncLlama(model, **options)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        self._build()
        self.protocol("WM_DELETE_WINDOW", self.close)
        self.submit(self._open())
        self._poll()

    def _build(self) -> None:
        controls = ttk.Frame(self, padding=8)
        controls.pack(fill="x")
        self.passes, self.first, self.last = tk.IntVar(value=1), tk.IntVar(), tk.IntVar()
        ttk.Label(controls, text="Passes").pack(side="left")
        self.slider = tk.Scale(
            controls, from_=1, to=6, orient="horizontal", variable=self.passes, command=lambda _: self.show_loop()
        )
        self.slider.pack(side="left", padx=(4, 16))
        ttk.Label(controls, text="Layers").pack(side="left")
        for variable in (self.first, self.last):
            field = ttk.Spinbox(controls, textvariable=variable, width=4, from_=0, to=0)
            field.pack(side="left", padx=4)
            variable.trace_add("write", lambda *_: self.show_loop())
        self.spinboxes = [w for w in controls.winfo_children() if isinstance(w, ttk.Spinbox)]
        self.status = ttk.Label(controls, text="loading the model", wraplength=340)
        self.status.pack(side="left", padx=16)

        line = ttk.Frame(self, padding=8)
        line.pack(fill="x", side="bottom")
        self.entry = ttk.Entry(line)
        self.entry.pack(side="left", fill="x", expand=True)
        self.entry.bind("<Return>", lambda _: self.ask())
        self.button = ttk.Button(line, text="Send", command=self.send_or_stop, state="disabled")
        self.button.pack(side="left", padx=(8, 0))
        self.entry.focus()

        self.transcript = ScrolledText(self, wrap="word", state="disabled", padx=8, pady=8, font="TkDefaultFont")
        self.transcript.tag_config("user", font="TkDefaultFont 10 bold")
        self.transcript.tag_config("error", foreground="#b00020")
        self.transcript.pack(fill="both", expand=True)

    # in the window's thread

    def spec(self) -> str:
        """The loop that the controls stand for. Raises LoopError, or TclError while a field is empty."""
        if self.passes.get() == 1:
            return "off"
        spec = f"{self.first.get()}-{self.last.get()}x{self.passes.get()}"
        return str(edgeloop.Loop.parse(spec).resolve(self.llm.n_layer))

    def show_loop(self) -> None:
        try:
            loop = edgeloop.Loop.parse(self.spec())
            cost = f"{loop}, {loop.cost(self.llm.n_layer):.2f} times the layers"
            self.status["text"] = "the plain model" if loop.is_off else cost
        except (edgeloop.LoopError, tk.TclError) as problem:
            self.status["text"] = str(problem)

    def ask(self) -> None:
        question = self.entry.get().strip()
        if not question or self.task or self.button.instate(["disabled"]):
            return
        try:
            loop = self.spec()
        except (edgeloop.LoopError, tk.TclError):
            return  # the status line says why
        self.entry.delete(0, "end")
        self.write(f"{question}\n", "user")
        self.messages.append({"role": "user", "content": question})
        self.button["text"] = "Stop"
        self.task = self.submit(self._answer(list(self.messages), loop))

    def send_or_stop(self) -> None:
        if self.task:
            self.task.cancel()
        else:
            self.ask()

    def ready(self) -> None:
        n_layer = self.llm.n_layer
        for spinbox in self.spinboxes:
            spinbox["to"] = n_layer - 1
        # a few layers in the middle: where most published loops are
        self.first.set(n_layer * 2 // 5)
        self.last.set(n_layer * 2 // 5 + 2)
        self.button.state(["!disabled"])

    def answered(self, text: str) -> None:
        self.write("\n\n")
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()  # a question without an answer
        self.button["text"] = "Send"
        self.task = None

    def write(self, text: str, tag: str = "") -> None:
        self.transcript["state"] = "normal"
        self.transcript.insert("end", text, tag)
        self.transcript["state"] = "disabled"
        self.transcript.see("end")

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.llm.close(), self.loop).result()
        self.destroy()

    def _poll(self) -> None:
        while not self.happened.empty():
            method, *arguments = self.happened.get()
            method(*arguments)
        self.after(POLL_MS, self._poll)

    def submit(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    # in the event loop's thread

    async def _open(self) -> None:
        try:
            await self.llm.open()
            self.happened.put((self.ready,))
        except edgeloop.ModelError as problem:
            self.happened.put((self.write, str(problem), "error"))

    async def _answer(self, messages: list[dict[str, str]], loop: str) -> None:
        text = ""
        try:
            async for piece in self.llm.chat(messages, loop=loop):
                text += piece
                self.happened.put((self.write, piece))
        except Exception as problem:
            self.happened.put((self.write, str(problem), "error"))
        finally:  # also when it is stopped: the conversation goes on with what there is
            self.happened.put((self.answered, text))


if __name__ == "__main__":
    ChatWindow(sys.argv[1], n_ctx=4096).mainloop()
