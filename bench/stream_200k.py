"""200,000 tokens through a small model with ``StreamingCache``: memory, speed, and whether the model stays itself.

    .venv/bin/python bench/stream_200k.py [--tokens 200000] [--piece 256]

A random Llama (4 layers, 8 heads, 4 KV heads of 32 channels) reads a stream in pieces, with a last stretch token by
token; every 10,000 tokens a line says the cache's bytes, the process's, and the time since. At the end the last pieces'
logits are compared with a fresh cache's that has only seen the sinks and the last ``layers`` windows: all that the last
tokens can depend on (positions count within the window, so nothing else may differ).

Measured on 2 shared CPU cores (fp32, 2026-11): 2,228,352 bytes of cache from the first token to the 200,000th, the
process at most 512 MiB (471 MiB after the first piece, most of it libraries), 268 s; largest difference 6.0e-07 of
1.27.
"""

import argparse
import resource
import time
from typing import Any

import fastok
import torch
import transformers
from fastok.sparse import StreamingCache

SINK, RECENT, STEPS = 4, 508, 200


def build() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, attn_implementation="fastok",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=200_000)
    options.add_argument("--piece", type=int, default=256)
    args = options.parse_args()
    fastok.register_transformers()
    model = build()
    stream = torch.randint(512, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    cache = StreamingCache(SINK, RECENT, model)
    pieces = list(stream[:, :-STEPS].split(args.piece, 1)) + list(stream[:, -STEPS:].split(1, 1))
    begun, told, logits = time.perf_counter(), 0, []
    for piece in pieces:
        logits = [*logits[-STEPS:], model(piece, past_key_values=cache, logits_to_keep=1).logits[:, -1]]
        if cache.get_seq_length() >= told or piece is pieces[-1]:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{cache.get_seq_length():8} tokens, cache {cache.nbytes:,} bytes, process at most {peak:.0f} MiB, "
                  f"{time.perf_counter() - begun:.1f} s", flush=True)  # fmt: skip
            told += 10_000
    fresh = StreamingCache(SINK, RECENT, model)
    # Sinks first, then what the last tokens can depend on. What comes right behind the sinks differs, further on not.
    enough = (model.config.num_hidden_layers + 1) * RECENT + STEPS
    model(torch.cat([stream[:, :SINK], stream[:, -enough:-STEPS]], 1), past_key_values=fresh)
    rows = [model(piece, past_key_values=fresh).logits[:, -1] for piece in pieces[-STEPS:]]
    got, wanted = torch.cat(logits[-STEPS:]), torch.cat(rows)
    error, size = (got - wanted).abs().max(), wanted.abs().max()
    print(f"last {STEPS} tokens against a fresh cache: largest difference {error:.2e} of {size:.2f}")


if __name__ == "__main__":
    main()
