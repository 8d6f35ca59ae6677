"""Exact match of an exported folder on unseen items, and its parity with transformers; fills the model card's table.

`python evaluate.py --model DIR --items 20000` answers greedily in float32 with this folder's own torch code, prints the
table and writes it between the card's markers. `--parity` first compares logits with transformers.
About a minute for 20,000 items on two cores. Knows nothing of training.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tinychat.decode import greedy
from tinychat.export import RESULTS_BEGIN, RESULTS_END
from tinychat.model import LlamaWeights, ModelShape, RowGroup, rope_tables
from tinychat.scoring import Graded, answer_items, exact_match
from tokenizers import Tokenizer

from llmscale.embedded.tasks.splits import unseen_items

SEED = 20_000
MAX_PARITY_ERROR = 2e-4
"""Largest difference of float32 logits: the order of summation differs, nothing else."""
MAX_SHOWN_CHARACTERS = 80
COMPLETIONS = ("Once upon a time", "One day a little fox", "Long ago, in a village")


def load_folder(folder: Path) -> tuple[LlamaWeights, Tokenizer]:
    """Weights in float32 and the tokenizer of an exported folder."""
    config = json.loads((folder / "config.json").read_text())
    shape = ModelShape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        norm_epsilon=config["rms_norm_eps"],
    )
    weights = LlamaWeights(shape)
    weights.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return weights, Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def parity_error(folder: Path, weights: LlamaWeights, tokens: int) -> float:
    """Largest difference of our logits from transformers' in float32, on random ids."""
    from transformers import LlamaForCausalLM

    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(weights.shape.vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    cos, sin = (t[:, None] for t in rope_tables(weights.shape, torch.arange(tokens)))
    own = weights.logits(weights(ids, cos, sin, (RowGroup(0, 1, tokens),)))
    return float((own - oracle(ids[None]).logits[0]).abs().max())


def clipped(text: str) -> str:
    """At most 80 characters: an answer that has run away repeats itself up to the limit of tokens."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + " ..."


def table_of(graded: list[Graded], seconds: float) -> str:
    """The Markdown table of exact match per task."""
    lines = ["| task | exact match | items | example of a miss |", "|---|---:|---:|---|"]
    rng = random.Random(0)
    table = exact_match(graded)
    for name, (right, asked) in table.items():
        misses = [answer for answer in graded if answer.item.task == name and not answer.right]
        example = ""
        if misses:
            miss = rng.choice(misses)
            example = f"`{miss.item.question}` gave `{clipped(miss.given)}`, right is `{miss.item.answer}`"
        lines.append(f"| {name} | {right / asked:.1%} | {asked:,} | {example} |")
    right, asked = (sum(pair[place] for pair in table.values()) for place in (0, 1))
    lines.append(f"| **all** | **{right / asked:.1%}** | {asked:,} | |")
    return "\n".join(lines) + f"\n\n{asked:,} items of seed {SEED}, float32 on two CPU threads, {seconds:.0f} s."


def completions_of(weights: LlamaWeights, tokenizer: Tokenizer) -> str:
    """Greedy free completions, as the card shows them."""
    lines = []
    for start in COMPLETIONS:
        prompt = torch.tensor([tokenizer.encode(start).ids])
        lines.append(f"> **{start}**{tokenizer.decode(greedy(weights, prompt, 80, (0, 2))[0])}")
    return "Greedy completions:\n\n" + "\n\n".join(lines)


def write_results(card: Path, text: str) -> None:
    """Replace what stands between the markers; ValueError if the card has none."""
    before, begin, rest = card.read_text().partition(RESULTS_BEGIN)
    _, end, after = rest.partition(RESULTS_END)
    if not begin or not end:
        raise ValueError(f"{card} lacks the markers {RESULTS_BEGIN} and {RESULTS_END}: export the folder again")
    card.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parity", action="store_true", help="compare logits with transformers first")
    parser.add_argument(
        "--write", action=argparse.BooleanOptionalAction, default=True, help="write the table into MODEL_CARD.md"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weights, tokenizer = load_folder(arguments.model)
    if arguments.parity:
        for tokens in (17, 2048):
            error = parity_error(arguments.model, weights, tokens)
            print(f"largest logit difference from transformers at {tokens} tokens: {error:.2e}")
            if error > MAX_PARITY_ERROR:
                raise SystemExit(f"parity failed: {error:.2e} is above {MAX_PARITY_ERROR:.0e}")
    started = time.monotonic()
    graded = answer_items(weights, tokenizer, unseen_items(arguments.items, SEED), workers=arguments.threads)
    text = table_of(graded, time.monotonic() - started) + "\n\n" + completions_of(weights, tokenizer)
    print(text)
    if arguments.write:
        write_results(arguments.model / "MODEL_CARD.md", text)


if __name__ == "__main__":
    main()
