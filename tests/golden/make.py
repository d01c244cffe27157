"""Make the golden files with transformers: python tests/golden/make.py

mini_logits.json: logits of the miniature. chat.json: the ids of conversations by public chat templates.
losses.json: the first steps of SFT and GRPO on the miniature, by this program itself.
"""
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import chat_template_utils

here = Path(__file__).parent
sys.path.insert(0, str(here.parent))
from losses import grpo_losses, sft_losses  # noqa: E402
from test_tokenizer import CONVERSATIONS, TEMPLATES, folder_with  # noqa: E402


class FixedDate(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def ids_by_transformers(case, conversation):
    """None where the template refuses."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder_with(Path(folder), case))
    try:
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False, **case.get("kwargs", {}))
    except Exception as e:
        print(f"{case['name']}: {e}")
        return None


def main():
    mini = here.parent.parent / "mini"
    messages = [{"role": "user", "content": "Numbers: 3 4 5\nTarget: 23\nTry."}]
    tokenizer = AutoTokenizer.from_pretrained(mini)
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1]
    golden = {"messages": messages, "tokens": tokens, "logits": [round(x, 5) for x in logits.tolist()]}
    (here / "mini_logits.json").write_text(json.dumps(golden))

    torch.set_num_threads(1)
    (here / "losses.json").write_text(json.dumps({"sft": sft_losses(), "grpo": grpo_losses()}) + "\n")

    chat_template_utils.datetime = FixedDate
    lines = []
    for case in TEMPLATES:
        ids = [ids_by_transformers(case, conversation) for conversation in CONVERSATIONS]
        lines.append(f"{json.dumps(case['name'])}: {json.dumps(ids, separators=(',', ':'))}")
    (here / "chat.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
