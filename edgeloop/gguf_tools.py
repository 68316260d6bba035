"""What a model file says about itself, what a loop would cost on it, a loop in its metadata, and the repeated model."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Callable

from edgeloop.errors import LoopError, ModelError
from edgeloop.gguf_file import GGUFFile, Tensor, Value
from edgeloop.loop import Loop
from edgeloop.recipes import METADATA_KEY

CELL_PADDING = 256  # llama.cpp rounds the context up to a multiple
F16_BYTES = 2  # the K/V cache's default type

# per-layer arrays of the metadata, which have to be repeated with the layers
_PER_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "feed_forward_length",
)

# sliding window on all but every n-th layer, where the file does not say so itself
_WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "olmo2": 4, "exaone4": 4, "gpt-oss": 2}

# nothing but the sliding window depends on a layer's number
_EXPORTABLE = {
    *_WINDOW_PATTERN,
    *("apertus", "arcee", "command-r", "exaone", "gemma", "internlm2", "llama", "mistral3", "nemotron"),
    *("olmo", "olmoe", "orion", "phi2", "qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "stablelm"),
    *("starcoder2", "xverse", "mamba", "mamba2", "lfm2"),
}

# upstream takes a model of this many layers for another size of the family and computes differently
_SPECIAL_COUNTS = {"gemma2": {46}, "gemma3": {62}, "exaone4": {64}}

# upstream has this count in its source, not in the file
_GEMMA3N_LAYERS_WITH_KV = 20

# one of these says that a layer keeps a recurrent state, whose size upstream computes for each architecture
_RECURRENT_KEYS = ("ssm.conv_kernel", "ssm.state_size", "shortconv.l_cache", "wkv.head_size", "kda.head_dim")

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelInfo:
    """A model file in numbers. Sizes are bytes, `kv_bytes_per_cell` one entry per layer for an f16 cache."""

    path: str
    architecture: str
    name: str | None
    n_layer: int
    n_embd: int
    n_ctx_train: int
    n_params: int
    file_size: int
    layer_sizes: tuple[int, ...]
    token_bytes: int  # weights read for one token
    tensor_types: dict[str, int]
    kv_bytes_per_cell: tuple[int, ...]
    has_recurrent_state: bool
    metadata: dict[str, Value]  # all but the long arrays
    loop: str | None  # from the file's own metadata

    def kv_bytes(self, n_ctx: int) -> int:
        """Bytes of the plain model's K/V cache at a context size (sliding-window layers at full size)."""
        return sum(self.kv_bytes_per_cell) * kv_cells(n_ctx)

    def loop_memory_bytes(self, loop: Loop, n_ctx: int) -> int | None:
        """Bytes that a loop adds at a context size: (passes - 1) times the span's K/V with kv=own, else none.

        None for models with recurrent states, which every pass has of its own: `Llama.loop_memory_size()` tells there.
        """
        if self.has_recurrent_state:
            return None
        if loop.kv != "own":
            return 0
        spans = loop.resolve(self.n_layer).spans
        per_cell = sum((s.passes - 1) * sum(self.kv_bytes_per_cell[s.first : s.last + 1]) for s in spans)
        return per_cell * kv_cells(n_ctx)

    def predicted_cost(self, loop: Loop) -> float:
        """Bytes of weights read for one token with the loop / without."""
        counts = Counter(loop.expanded(self.n_layer))
        repeated = sum((counts[il] - 1) * size for il, size in enumerate(self.layer_sizes))
        return (self.token_bytes + repeated) / self.token_bytes


def kv_cells(n_ctx: int) -> int:
    """The cells that llama.cpp allocates for one sequence of `n_ctx` tokens."""
    return -(-n_ctx // CELL_PADDING) * CELL_PADDING


def inspect(path: str | os.PathLike) -> ModelInfo:
    """Read a model file's header. Raises ModelError when it is missing, truncated or not a model."""
    with GGUFFile(path) as gguf:
        return _info(gguf)


def _info(gguf: GGUFFile) -> ModelInfo:
    meta = gguf.metadata
    arch = meta.get("general.architecture")
    n_layer = meta.get(f"{arch}.block_count")
    if not isinstance(arch, str) or not isinstance(n_layer, int) or not 0 < n_layer <= 512:
        raise ModelError(
            f"{gguf.path}: holds no language model (general.type is '{meta.get('general.type', 'not given')}')"
        )

    def number(key: str, default: int) -> int:
        value = meta.get(f"{arch}.{key}", default)
        return value if isinstance(value, int) else default

    def per_layer(key: str, default: int) -> list[int]:
        value = meta.get(f"{arch}.{key}", default)
        return list(value[:n_layer]) if isinstance(value, list) else [value] * n_layer

    n_embd = number("embedding_length", 0)
    n_head = per_layer("attention.head_count", 1)
    n_head_kv = per_layer("attention.head_count_kv", n_head[0])
    head_dim = n_embd // max(1, *n_head) if n_head else 0
    width = number("attention.key_length", head_dim)
    if f"{arch}.attention.key_length_mla" not in meta:  # else V is read from the cached K
        width += number("attention.value_length", head_dim)
    n_with_kv = _GEMMA3N_LAYERS_WITH_KV if arch == "gemma3n" else n_layer - number("attention.shared_kv_layers", 0)
    kv = [heads * width * F16_BYTES if il < n_with_kv else 0 for il, heads in enumerate(n_head_kv)]

    layer_sizes = [0] * n_layer
    for tensor in gguf.tensors:
        block = _BLOCK.fullmatch(tensor.name)
        if block and int(block[1]) < n_layer:
            layer_sizes[int(block[1])] += tensor.size
    # a row of the embedding is looked up; the table is read whole only where it is the output layer as well
    unread = {"token_embd.weight"} if any(t.name == "output.weight" for t in gguf.tensors) else set()
    return ModelInfo(
        path=str(gguf.path),
        architecture=arch,
        name=meta.get("general.name"),
        n_layer=n_layer,
        n_embd=n_embd,
        n_ctx_train=number("context_length", 0),
        n_params=sum(_elements(t) for t in gguf.tensors),
        file_size=sum(path.stat().st_size for path in gguf.paths),
        layer_sizes=tuple(layer_sizes),
        token_bytes=sum(t.size for t in gguf.tensors if t.name not in unread),
        tensor_types=dict(Counter(t.type_name for t in gguf.tensors).most_common()),
        kv_bytes_per_cell=tuple(kv),
        has_recurrent_state=any(f"{arch}.{key}" in meta for key in _RECURRENT_KEYS),
        metadata=meta,
        loop=meta.get(METADATA_KEY),
    )


def _elements(tensor: Tensor) -> int:
    count = 1
    for n in tensor.shape:
        count *= n
    return count


def tag(
    path: str | os.PathLike,
    out: str | os.PathLike,
    loop: str | Loop,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    overwrite: bool = False,
) -> Loop:
    """Write the model with `loop` in its metadata, where loop="auto" finds it, or without one if it is off; return it.

    Tensors are copied bit for bit. `progress(done, total)` is told bytes.

    Raises LoopError when the loop does not fit the model, WriteError when `out` is there already or cannot be written.
    """
    with GGUFFile(path) as gguf:
        wanted = Loop.parse(loop)
        if wanted.is_auto:
            raise LoopError("auto is looked up when a model is loaded; name the loop itself, for example 12-20x3")
        loop = wanted.resolve(_info(gguf).n_layer)
        changes = {METADATA_KEY: str(loop) if loop else None}
        gguf.write_copy(out, [(t.name, t) for t in gguf.tensors], changes, progress, overwrite=overwrite)
        return loop


def export(
    path: str | os.PathLike,
    out: str | os.PathLike,
    loop: str | Loop,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    overwrite: bool = False,
) -> list[int]:
    """Write the model with the span's layers physically repeated, for programs without a loop; return their order.

    Only naive loops can be written: damping needs the states of the passes. The result behaves as naive with kv=own.
    Tensors are copied bit for bit. `progress(done, total)` is told bytes.

    Raises LoopError for another solver, ModelError for an architecture whose layers depend on their number, WriteError
    when `out` is there already or cannot be written.
    """
    with GGUFFile(path) as gguf:
        info = _info(gguf)
        loop = Loop.parse(loop).resolve(info.n_layer)
        if loop.is_off or loop.solver != "naive" or loop.kv != "own":
            raise LoopError(
                f"'{loop}' cannot be written as repeated layers; only naive with kv=own can, for example "
                f"'{'+'.join(map(str, loop.spans)) or '12-20x2'}:naive,kv=own'"
            )
        if info.architecture not in _EXPORTABLE:
            raise ModelError(f"{path}: layers of architecture '{info.architecture}' cannot be moved to other numbers")
        order = loop.expanded(info.n_layer)
        if {info.n_layer, len(order)} & _SPECIAL_COUNTS.get(info.architecture, set()):
            raise ModelError(
                f"{path}: {info.architecture} with {info.n_layer} or {len(order)} layers computes differently from its relatives, "
                "so the repeated model would not be this one"
            )

        prefix = f"{info.architecture}."
        changes: dict[str, int | str | list | None] = {f"{prefix}block_count": len(order), METADATA_KEY: None}
        for key in _PER_LAYER:
            value = gguf.metadata.get(prefix + key)
            if isinstance(value, list) and len(value) >= info.n_layer:
                changes[prefix + key] = [value[il] for il in order]
        pattern_key = f"{prefix}attention.sliding_window_pattern"
        has_window = f"{prefix}attention.sliding_window" in gguf.metadata
        if has_window and info.architecture in _WINDOW_PATTERN and pattern_key not in changes:
            every = gguf.metadata.get(pattern_key, _WINDOW_PATTERN[info.architecture])
            changes[pattern_key] = [il % every < every - 1 for il in order]

        by_layer: dict[int, list[tuple[str, Tensor]]] = {}
        others: list[tuple[str, Tensor]] = []
        for tensor in gguf.tensors:
            block = _BLOCK.fullmatch(tensor.name)
            if block:
                by_layer.setdefault(int(block[1]), []).append((block[2], tensor))
            else:
                others.append((tensor.name, tensor))
        repeated = [(f"blk.{new}.{name}", tensor) for new, il in enumerate(order) for name, tensor in by_layer[il]]
        gguf.write_copy(out, others + repeated, changes, progress, overwrite=overwrite)
        return order
