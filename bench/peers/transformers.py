"""transformers on torch, static batches (`generate`)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.script import arguments, report


def main() -> None:
    """Runs in an environment with torch and transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    given = arguments()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def generate(prompts: Sequence[list[int]], output_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert made.shape[1] == ids.shape[1] + output_tokens, "transformers made another number of tokens"

    report(given, generate)


if __name__ == "__main__":
    main()
