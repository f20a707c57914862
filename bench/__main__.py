"""`python -m bench [NAME] [OPTIONS]`: list or run the benchmarks."""

from __future__ import annotations

import importlib
import sys

BENCHES = {
    "overhead": "TTFT and time per token over HTTP, JetStream and UCX against one process",
    "transfer": "latency and bandwidth of pulling tensors between two processes",
    "mixed_worker": "pauses of a running answer while its process prefills a long prompt, by step",
    "irp": "TTFT of requests with many pictures, spread over encoders or not; delays as compute",
    "overlap": "TTFT of texts computed while pictures are encoded, or after; delays as compute",
    "topologies": "separate stages against shared processes, eight workers; delays as compute",
    "role_switching": "latency as the load moves, with role switches or not; delays as compute",
    "encoder_memory": "bytes of an encode worker against a process of all stages",
    "media_capacity": "pictures of a request and an encode batch in a fixed memory",
    "colocated": "hand-over from prefill to decode in one process against two",
    "kv_transfer": "from the first to the second token, by the way the KV travels",
    "packing": "prompts of unequal lengths, packed end to end against padded to the longest",
    "speculation": "decoding with guesses from the text itself against plain decoding, same tokens",
    "embedding_cache": "time to the first token about pictures seen before against new ones",
    "prefix_cache": "measured hits of the prefix cache against a trie's, and what they save",
    "role_switch": "a worker changes its role: seconds by the roles before and after",
    "compare": "Triptych and other installed servers side by side on one model folder",
    "floors": "what memory and arithmetic allow a model, and how near the linear kernels come",
    "prefill": "one step on a CPU: time by part, compiled kernels against torch's",
    "tower": "a picture through a vision tower on a CPU: our layers against transformers'",
    "prompt_attention": "attention of a prompt on a CPU: pairs of bfloat16 against float32",
    "decode_step": "a decode step on a CPU, call by call and recorded, by kernels and weights",
    "gpu": "a 7 B model on one CUDA device: decode, prefill, pictures and hand-over over floors",
    "optimizer": "goodput of the planner's choice against random configurations, simulated",
    "planner_accuracy": "the planner's simulator against the running system at three rates",
    "accuracy": "the demo model's share of right answers through the running pipeline",
}


def main() -> None:
    """Run the bench named first, with the rest of the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        print("usage: python -m bench NAME [OPTIONS]\n")
        for bench, meaning in BENCHES.items():
            print(f"  {bench:<18}{meaning}")
        raise SystemExit(2 if name else 0)
    del sys.argv[1]
    importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
