"""On real pretrained weights: MODELS=folder,folder pytest tests/test_real.py (needs transformers)."""
import os

import pytest
import torch

from checkpoint import load
from sample import Sampler, SamplingParams

FOLDERS = [folder for folder in os.environ.get("MODELS", "").split(",") if folder]
pytestmark = pytest.mark.skipif(not FOLDERS, reason="MODELS names no folder of a pretrained model")
QUESTIONS = ["What is 17 * 23? Think step by step.", "Name three fruits."]


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_and_greedy_text_equal_transformers(folder):
    """Rules 1 and 7: logits within 1e-3 in float32, chat ids and greedy continuations token for token."""
    transformers = pytest.importorskip("transformers")
    ours, tokenizer = load(folder, "cpu", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompts.append(tokenizer.chat(chat))
        want = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert prompts[-1] == want
    groups = Sampler(ours, tokenizer).generate(prompts, 1, SamplingParams(48, temperature=0))
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        greedy = {"do_sample": False, "max_new_tokens": 48}
        with torch.no_grad():
            difference = ours.logits(ours(ids)) - theirs(ids).logits[..., :ours.vocab]
            want = theirs.generate(
                ids, eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.end_id, **greedy)
        assert difference.abs().max() < 1e-3
        assert completion.tokens == want[0, len(prompt):].tolist()
