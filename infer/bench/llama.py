"""The same weights in llama.cpp, to compare ours with: dense models, one prompt at a time.

openPangu-Embedded is a Llama with biases, which llama.cpp's own architecture knows. This is the
only module of infer that needs llama-cpp-python and gguf, which nothing installs.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from infer.bench import bounds, published
from infer.bench.measure import Program
from pangu_jax.config import ModelConfig
from pangu_jax.model import Pangu

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def programs(model: Pangu, longest: int) -> dict[str, Program]:
    """Greedy generation for prompts and answers of `longest` tokens together, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _write(model, path)
        # Once it is open its memory is mapped: the file may go.
        peer = llama_cpp.Llama(
            str(path),
            n_ctx=longest,
            n_batch=min(longest, 512),
            n_threads=bounds.cores(),
            n_threads_batch=bounds.cores(),
            flash_attn=True,
            verbose=False,
        )

    def run(prompts: np.ndarray, tokens: int, first: Callable[[], None]) -> np.ndarray:
        (prompt,) = prompts.tolist()
        peer.reset()
        peer.eval(prompt)
        found = [peer.sample(temp=0.0)]
        first()
        while len(found) < tokens:
            peer.eval(found[-1:])
            found.append(peer.sample(temp=0.0))
        return np.array([found])

    return {f"llama-cpp-python {llama_cpp.__version__}": run}


def _write(model: Pangu, path: Path) -> None:
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")  # one is asked for; words are never made of it
    writer.add_token_list([f"<{i}>".encode() for i in range(c.vocab_size)])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    for name, array in published.weights(model).items():
        own, kind = _its_name(name), gguf.GGMLQuantizationType.F32
        array = _turned(own, array.astype(np.float32), c)
        if array.ndim == 2 and model.dtype.itemsize == 2:
            kind = gguf.GGMLQuantizationType.BF16
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(own, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _its_name(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, *rest, kind = name.split(".")
    return f"blk.{layer}.{IN_A_LAYER['.'.join(rest)]}.{kind}"


def _turned(name: str, array: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Its Llama rotates neighbours, where ours rotates halves: rows of a head in that order."""
    heads = {"attn_q": c.num_heads, "attn_k": c.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    pairs = array.reshape(heads, 2, c.head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
